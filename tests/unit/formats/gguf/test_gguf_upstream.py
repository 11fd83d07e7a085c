"""Our converter against llama.cpp's own, on a small random model of every family: the same tensors, byte for byte, and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.formats.gguf.imatrix import save
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info, read_tensor
from tests.unit.formats.gguf.test_gguf_convert import KINDS as LLAMAS
from tests.unit.formats.gguf.test_gguf_families import KINDS as OTHERS
from tests.unit.formats.gguf.test_gguf_reuse import stock
from tests.upstream_converter import convert_upstream

Tiny = Callable[..., Path]
pytestmark = pytest.mark.upstream
KINDS: dict[str, dict[str, Any]] = {
    **LLAMAS,
    **OTHERS,
    "qwen3 in bf16": {**OTHERS["qwen3-untied"], "to": "bf16"},
    "llama in f32": {"to": "f32", "dtype": "float16"},
}


@pytest.fixture(scope="module")
def theirs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of llama.cpp's converter, all made by one process."""
    work = tmp_path_factory.mktemp("upstream")
    made: dict[str, Path] = {}
    jobs = []
    for kind, options in KINDS.items():
        given = dict(options)
        to = given.pop("to", "f16")
        folder = Path(shutil.copytree(tiny(**given), work / kind))
        made[kind] = work / f"{kind}.gguf"
        _as_published(folder)
        jobs.append((folder, made[kind], to, given.get("pre", "smollm")))
    convert_upstream(jobs)
    return made


def _as_published(folder: Path) -> None:
    """Add what the converter takes for given: GPT-2's n_ctx, and that Phi-3 with a byte-level tokenizer is Phi-4."""
    changes = {
        "gpt2": ("config.json", {"n_ctx": 256}),
        "phi3": ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
    }
    name, values = changes.get(json.loads((folder / "config.json").read_text())["model_type"], ("config.json", {}))
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_upstreams(kind: str, theirs: dict[str, Path], tiny_gguf: Tiny) -> None:
    want, got = read_info(theirs[kind]), read_info(tiny_gguf(**KINDS[kind]))
    places = {one.name: one for one in want.tensors}
    assert {one.name: (one.type, one.shape) for one in got.tensors} == {
        name: (one.type, one.shape) for name, one in places.items()
    }
    own, other = got.path.read_bytes(), want.path.read_bytes()
    for tensor in got.tensors:
        there = places[tensor.name]
        if tensor.name == "rope_freqs.weight":  # theirs are computed in float32
            np.testing.assert_allclose(read_tensor(got, tensor.name), read_tensor(want, tensor.name), rtol=1e-6)
        else:
            data = own[tensor.offset : tensor.offset + tensor.nbytes]
            assert data == other[there.offset : there.offset + there.nbytes], tensor.name


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_upstreams(kind: str, theirs: dict[str, Path], tiny_gguf: Tiny) -> None:
    want, got = read_info(theirs[kind]).metadata, read_info(tiny_gguf(**KINDS[kind])).metadata
    left = {"general.name", "general.size_label"}  # made of the folder's name, and for people
    if kind.startswith(
        "phi3"
    ):  # both without effect in llama.cpp: no sliding window, and a context that only longrope asks for
        assert want["phi3.attention.sliding_window"] == 0
        left |= {"phi3.attention.sliding_window"}
        left |= set() if "long" in kind else {"phi3.rope.scaling.original_context_length"}
    if (
        kind == "gpt2-untied"
    ):  # they take GPT-2's own 4 x hidden size, whatever n_inner is: llama.cpp does not load that
        assert (want["gpt2.feed_forward_length"], got["gpt2.feed_forward_length"]) == (256, 96)
        left |= {"gpt2.feed_forward_length"}
    for key in set(want) - left:
        assert got[key] == want[key], key
    # What they leave to llama.cpp's defaults; the windows' pattern, which these are wrong for in an odd one, among it.
    arch = got["general.architecture"]
    more = {key.removeprefix(f"{arch}.") for key in set(got) - set(want)}
    assert more <= {
        "vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count", "attention.head_count_kv",
        "attention.sliding_window_pattern", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
    }  # fmt: skip


@pytest.mark.slow
def test_experts_are_quantized_as_llama_cpp_does(tiny: Tiny, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = tmp_path / "experts.gguf"
    convert_upstream([(tiny("mixtral", **wide), source, "f16", "smollm")])
    shapes = {tensor.name: tensor.shape for tensor in read_info(source).tensors}
    experts = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    assert len(experts) == 6 and all(shape[0] == 4 for shape in experts.values())
    rng = np.random.default_rng(2)  # a row of importance for each expert
    sums = {name: (rng.uniform(1, 9, shape[0] * shape[-1]), 10) for name, shape in experts.items()}
    save(tmp_path / "i.gguf", sums, 10, "x")
    for type_name in ("Q4_K_M", "IQ4_XS"):
        quantize(source, tmp_path / "ours.gguf", type_name, imatrix=tmp_path / "i.gguf", threads=2)
        want = stock(source, tmp_path / "stock.gguf", type_name, imatrix=tmp_path / "i.gguf")
        assert (tmp_path / "ours.gguf").read_bytes() == want, type_name
