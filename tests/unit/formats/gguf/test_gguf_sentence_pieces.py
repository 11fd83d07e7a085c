"""SentencePiece tokenizers, as transformers keeps them, give the same token ids in llama.cpp; others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf import vocabulary
from edgedistill.formats.gguf.check import compare_logits, compare_tokens
from edgedistill.formats.gguf.convert import PROBES, convert
from edgedistill.formats.gguf.read import read_info
from tests.unit.formats.gguf.sentence_pieces import make_pieces

Tiny = Callable[..., Path]
# Special tokens inside a text: Llama 2 puts a space after each.
TEXTS = (*PROBES, "set an alarm for seven please", "a <s> b", "<s>x</s> y", "call<tool> me", "    four   spaces ")


@pytest.fixture
def llama(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a tiny Llama with Llama 2's kind of tokenizer."""
    folder = shutil.copytree(tiny(vocab_size=600), tmp_path / "llama")
    make_pieces(folder, prefix=True)
    return folder


def test_llama_cpp_splits_as_llama_2_does(llama: Path, tmp_path: Path) -> None:
    report = convert(llama, tmp_path / "a.gguf", dtype="f32")
    hop = compare_logits(llama, report.path, ["set an alarm", PROBES[0]], texts=TEXTS, greedy=8, threads=1)
    assert hop.texts.tokens > 900 and hop.kld < 1e-4
    info = read_info(report.path)
    assert info.tokenizer_model == "llama" and report.echo["add_bos"] and report.echo["special_ids"]["unk"] == 0
    assert info.metadata["tokenizer.ggml.add_space_prefix"] is True
    kinds = info.metadata["tokenizer.ggml.token_type"]
    assert (
        kinds[:4] == [2, 3, 3, 4] and set(kinds[4:260]) == {6} and kinds[-1] == 5
    )  # <unk>, <s>, </s>, <tool>; bytes; padding


def test_llama_cpp_splits_as_gemma_does(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("gemma3_text", vocab_size=600, head_dim=16, query_pre_attn_scalar=16)
    folder = shutil.copytree(source, tmp_path / "gemma")
    make_pieces(folder, prefix=False)
    report = convert(folder, tmp_path / "a.gguf", dtype="f32")
    hop = compare_logits(folder, report.path, ["set an alarm", PROBES[0]], texts=TEXTS, greedy=8, threads=1)
    assert hop.texts.tokens > 900 and hop.kld < 1e-4
    assert read_info(report.path).metadata["tokenizer.ggml.add_space_prefix"] is False


def test_scores_in_another_order_are_caught(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_scores", lambda tokens, merges: tuple(map(float, range(len(tokens)))))
    with pytest.raises(StepFailed, match=r"llama\.cpp tokenizes"):
        compare_tokens(llama, convert(llama, tmp_path / "a.gguf").path, TEXTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"normalizer": None, "pre_tokenizer": {
                "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}},
            "puts spaces otherwise .* Metaspace first",
        ),
        ({"normalizer": {"type": "NFKC"}}, "puts spaces otherwise .*'NFKC'"),
    ],
)  # fmt: skip
def test_other_ways_with_spaces_are_refused(llama: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = llama / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=words) as caught:
        convert(llama, tmp_path / "a.gguf")
    assert "choose a model" in caught.value.hint


def test_a_missing_byte_is_refused(llama: Path, tmp_path: Path) -> None:
    path = llama / "tokenizer.json"
    data = json.loads(path.read_text())
    del data["model"]["vocab"]["<0x41>"]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="1 of the 256 byte tokens"):
        convert(llama, tmp_path / "a.gguf")
