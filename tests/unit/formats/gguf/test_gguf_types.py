"""The tables agree with gguf and llama.cpp, and sizes are known before anything is converted."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.types import (
    FILE_TYPES,
    GGML_TYPES,
    estimate_file_size,
    file_type,
    fits,
    ggml_type,
    plan_tensors,
    predict_type,
    smallest_type,
    tensor_shapes,
)

LLAMA_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 128256, "num_hidden_layers": 32, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "vocab_size": 49152, "num_hidden_layers": 30, "tie_word_embeddings": True,
}  # fmt: skip


def test_ggml_types_are_those_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for number, (block, nbytes) in GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[number.name]
        assert (ours.number, ours.block, ours.bytes) == (int(number), block, nbytes)


def test_file_types_are_those_of_the_gguf_package() -> None:
    from gguf.constants import LlamaFileType

    known = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind) for kind in LlamaFileType}
    for name, kind in FILE_TYPES.items():
        if name in known:
            assert kind.number == known[name]
        assert kind.base in GGML_TYPES


@pytest.mark.parametrize("name", FILE_TYPES)
def test_the_mix_reproduces_the_published_bits_per_weight(name: str) -> None:
    shapes = tensor_shapes(LLAMA_8B)
    kind = FILE_TYPES[name]
    plans = plan_tensors(shapes, name, gqa=4, imatrix=kind.imatrix == "required")
    bpw = 8 * sum(plan.nbytes for plan in plans) / sum(math.prod(shape) for shape in shapes.values())
    assert bpw == pytest.approx(kind.bpw, abs=6e-5)


def test_every_required_imatrix_is_known() -> None:
    shapes = tensor_shapes(LLAMA_8B)
    for name, kind in FILE_TYPES.items():
        needy = any(plan.needs_imatrix for plan in plan_tensors(shapes, name, gqa=4))
        assert needy == (kind.imatrix == "required"), name


@pytest.mark.parametrize(
    ("wrong", "right"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("Q4-0", "Q4_0"), ("IQ4XS", "IQ4_XS"),
     ("fp16", "F16"),
     ("int4", "Q4_0")]
)  # fmt: skip
def test_an_unknown_type_is_refused_with_the_likely_one(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{right}'"):
        file_type(wrong)


def test_an_unknown_tensor_type_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'Q8_0'"):
        ggml_type("q8_0")
    with pytest.raises(UsageError, match="Q4_K_M"):
        estimate_file_size(SMOLLM2, None, "Q4_KM")


@pytest.mark.parametrize(
    ("asked", "columns", "got"),
    [("Q4_K", 576, "Q5_0"), ("Q6_K", 576, "Q8_0"), ("Q5_K", 896, "Q5_1"), ("Q2_K", 640, "Q4_0"),
     ("IQ4_XS", 960, "IQ4_NL"),
     ("Q4_K", 1536, "Q4_K"), ("Q4_0", 576, "Q4_0"), ("Q4_0", 100, "F16"), ("Q4_K", 100, "F16")],
)  # fmt: skip
def test_rows_that_are_no_multiple_of_the_block_fall_back(asked: str, columns: int, got: str) -> None:
    assert fits(asked, columns) == got


def test_a_type_without_fallback_is_refused() -> None:
    with pytest.raises(UsageError, match="no fallback"):
        fits("Q1_0", 576)


def test_predict_type() -> None:
    assert predict_type("Q4_K_M", "blk.0.attn_q.weight", 576) == "Q5_0"
    assert predict_type("Q4_K_M", "blk.0.attn_norm.weight", 576) == "F32"


def test_sizes_of_smollm2_are_those_measured() -> None:
    for name, megabytes in (("F16", 270.9), ("Q8_0", 144.8), ("Q4_K_M", 105.5), ("Q4_0", 91.7), ("Q2_K", 88.2)):
        assert estimate_file_size(SMOLLM2, None, name) / 1e6 == pytest.approx(megabytes, rel=0.005)
    assert estimate_file_size(SMOLLM2, 10, "F16") < 0.6 * estimate_file_size(SMOLLM2, None, "F16")
    smaller = estimate_file_size(SMOLLM2, None, "Q4_0", embedding_type="Q5_0")
    assert estimate_file_size(SMOLLM2, None, "Q4_0") - smaller == 49152 * 576 // 32 * (34 - 22)


def test_the_smallest_type_bounds_every_other() -> None:
    for imatrix in (True, False):
        name, size = smallest_type(SMOLLM2, imatrix=imatrix)
        assert FILE_TYPES[name].imatrix != "required" or imatrix
        for other, kind in FILE_TYPES.items():
            if other in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0") or (kind.imatrix == "required" and not imatrix):
                continue
            assert size <= estimate_file_size(SMOLLM2, None, other, imatrix=imatrix)


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match="'hidden_size'"):
        tensor_shapes({"n_embd": 768})


def test_types_and_reader_import_nothing_heavy() -> None:
    code = (
        "import sys; import edgedistill.formats.gguf.types, edgedistill.formats.gguf.read; "
        "print([m for m in ('numpy', 'torch', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
