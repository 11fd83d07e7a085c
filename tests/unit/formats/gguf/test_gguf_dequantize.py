"""A GGUF comes back as a Hugging Face folder that computes and tokenizes as llama.cpp does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.check import compare_tokens
from edgedistill.formats.gguf.checkpoint import open_checkpoint, read_entry
from edgedistill.formats.gguf.convert import PROBES, convert, permute
from edgedistill.formats.gguf.dequantize import gguf_to_hf, unpermute
from edgedistill.formats.gguf.read import read_info, read_tensor

Tiny = Callable[..., Path]


def test_permutations_are_inverse() -> None:
    weights = np.arange(48 * 5, dtype=np.float32).reshape(48, 5)
    for heads in (1, 2, 3, 4, 6):
        np.testing.assert_array_equal(unpermute(permute(weights, heads), heads), weights)
    assert not np.array_equal(permute(weights, 3), weights)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"head_dim": 32, "pre": "gpt-2"}, {"attention_bias": True, "mlp_bias": True},
     {"pre": "llama-bpe", "bos": True}],
    ids=["tied", "untied", "wide-heads", "biases", "bos"],
)  # fmt: skip
def test_a_round_trip_in_f32_gives_the_same_model(
    options: dict[str, object], tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(**options)
    told = gguf_to_hf(tiny_gguf(to="f32", **options), tmp_path / "hf")
    assert told["quantized_from"] == "" and told["tied"] == (not options or "tie_word_embeddings" not in options)
    want, got = open_checkpoint(folder), open_checkpoint(tmp_path / "hf")
    assert set(want) == set(got)
    for name in want:
        np.testing.assert_array_equal(read_entry(want[name]), read_entry(got[name]))
    config, first = (
        json.loads((tmp_path / "hf" / "config.json").read_text()),
        json.loads((folder / "config.json").read_text()),
    )
    for key in (
        "rope_parameters",
        "rms_norm_eps",
        "head_dim",
        "attention_bias",
        "mlp_bias",
        "eos_token_id",
        "vocab_size",
    ):
        assert config[key] == first[key], key
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(folder)
    for text in PROBES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.eos_token == "<|im_end|>" and ours.pad_token_id == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    again = convert(tmp_path / "hf", tmp_path / "again.gguf", dtype="f32", name="tiny")
    assert again.sha256 == convert(folder, tmp_path / "first.gguf", dtype="f32", name="tiny").sha256


def test_the_dtype_and_the_replacement_of_an_old_folder(tiny_gguf: Tiny, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").touch()
    gguf_to_hf(tiny_gguf(), tmp_path / "hf", dtype="bfloat16")
    assert {entry.dtype for entry in open_checkpoint(tmp_path / "hf").values()} == {"BF16"}
    assert not (tmp_path / "hf" / "old").exists() and not list(tmp_path.glob("*.partial"))
    with pytest.raises(UsageError, match="dtype 'int8'"):
        gguf_to_hf(tiny_gguf(), tmp_path / "hf", dtype="int8")


def test_what_cannot_be_written_back_is_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(UsageError, match="RoPE scaling 'linear'"):
        gguf_to_hf(tiny_gguf(rope_parameters=scaled), tmp_path / "hf")
    with pytest.raises(UsageError, match="qwen2 family"):
        gguf_to_hf(tiny_gguf("qwen2", pre="qwen2"), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_unknown_splitter_is_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_gguf(), tmp_path / "x.gguf"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"smollm", b"falcon", 1))
    with pytest.raises(UsageError, match="'falcon'"):
        gguf_to_hf(path, tmp_path / "hf")


def test_the_real_model_tokenizes_as_llama_cpp(smollm2: Path, smollm2_gguf: Path) -> None:
    files = sorted(Path(np.__file__).parent.glob("_core/*.py"))[:12]
    texts = [path.read_text(errors="ignore")[:8000] for path in files]
    digits = [f"Order {n} costs {n * 7 % 1000}.{n % 100:02d} EUR, ref 00{n}" for n in range(0, 100_000, 997)]
    assert compare_tokens(smollm2, smollm2_gguf, [*PROBES, *texts, *digits]).tokens > 40_000


def test_the_real_weights_are_the_quantized_ones(smollm2: Path, smollm2_gguf: Path) -> None:
    info, ours = read_info(smollm2_gguf), open_checkpoint(smollm2)
    for theirs, name in (
        ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.3.attn_v.weight", "model.layers.3.self_attn.v_proj.weight"),
    ):
        np.testing.assert_array_equal(read_tensor(info, theirs), read_entry(ours[name]))
    assert len(ours) == 272 and json.loads((smollm2 / "config.json").read_text())["rms_norm_eps"] == 1e-5
