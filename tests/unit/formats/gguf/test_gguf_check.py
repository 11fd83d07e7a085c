"""The gates on the hop from transformers to llama.cpp open for a good file and name what is wrong with a bad one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf import model_io
from edgedistill.formats.gguf.check import compare_config, compare_logits, compare_tokens, farthest, kld
from edgedistill.formats.gguf.convert import convert

Tiny = Callable[..., Path]
MESSAGES = [{"role": "user", "content": "Set an alarm for 7:45"}]


def changed(tiny: Tiny, tmp_path: Path, **changes: object) -> Path:
    folder = shutil.copytree(tiny(), tmp_path / "changed")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_messages_texts_and_ids_are_all_prompts(tiny: Tiny, tiny_gguf: Tiny) -> None:
    report = compare_logits(tiny(), tiny_gguf(), [MESSAGES, "play it", [5, 6, 7]], texts=["more"], greedy=4)
    assert report.prompts == 3 and report.texts.texts == 3 and report.greedy_tokens > 4
    assert json.loads(json.dumps(report.to_json()))["echo"]["num_hidden_layers"] == 2


def test_transformers_rebuilding_a_tokenizer_is_caught(tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    # The digits of this vocabulary are never merged, so the difference must be seen on contractions.
    data["pre_tokenizer"]["pretokenizers"].append({"type": "Punctuation", "behavior": "Isolated"})
    path.write_text(json.dumps(data))
    with pytest.raises(StepFailed, match="tokenizes"):
        compare_tokens(folder, tiny_gguf(), ["I'm sure it's Bob's", "the next song in the queue please"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"eos_token_id": 0}, "eos_token_id"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_the_file_does_not_echo_is_named(
    changes: dict[str, object], words: str, tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(StepFailed, match=words):
        compare_config(changed(tiny, tmp_path, **changes), tiny_gguf())


def test_another_chat_template_is_named(tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(StepFailed, match="chat_template"):
        compare_config(folder, tiny_gguf())
    assert compare_config(folder, convert(folder, folder / "b.gguf").path)["chat_template"]


def test_other_weights_are_caught(tiny: Tiny, tiny_gguf: Tiny) -> None:
    with pytest.raises(StepFailed, match="logits differ"):
        compare_logits(tiny(), tiny_gguf(seed=1), ["Set an alarm"], greedy=0)


def test_a_wrong_token_is_caught(tiny: Tiny, tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io, "greedy", lambda model, ids, count: [3] * count)
    with pytest.raises(StepFailed, match="greedy decoding parts at token 1"):
        compare_logits(tiny(), tiny_gguf(), ["Set an alarm"], greedy=4)


def test_nothing_to_compare_on_is_refused(tiny: Tiny, tiny_gguf: Tiny) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        compare_logits(tiny(), tiny_gguf(), [""])
    with pytest.raises(UsageError, match="no text"):
        compare_tokens(tiny(), tiny_gguf(), [])


def test_a_token_that_says_the_same_is_left_out_of_the_largest_difference() -> None:
    rng = np.random.default_rng(0)
    want = rng.normal(0, 6, (40, 300)).astype(np.float32)
    got = want + rng.normal(0, 0.01, want.shape).astype(np.float32)
    near = float(np.abs(want - got).max())
    assert farthest(want, got) == (near, 0)
    got[1] += 1.5  # all alike: no probability moves
    assert farthest(want, got) == (pytest.approx(near, rel=0.3), 1)
    best = int(want[7].argmax())
    got[7, best] -= 3.0  # this is another answer
    assert farthest(want, got) == (pytest.approx(3.0, abs=0.1), 1)
    assert float(kld(want, got)[7]) > 0.1


def test_kld_is_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 9)).astype(np.float32), rng.normal(size=(4, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a.astype(float), b.astype(float)))
    np.testing.assert_allclose(kld(a, b), (p * np.log(p / q)).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(kld(a, a + 7), 0, atol=1e-6)


def test_the_real_model_agrees(smollm2: Path, tmp_path: Path) -> None:
    report = compare_logits(
        smollm2,
        convert(smollm2, tmp_path / "f16.gguf").path,
        [MESSAGES],
        texts=["Straße 12345"],
        greedy=10,
        threads=1,
    )
    assert report.kld < 1e-4 and report.max_diff < 0.03 * report.spread and report.greedy_tokens >= 8
