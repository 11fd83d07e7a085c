"""Speculative decoding through a real llama.cpp: whatever the draft guesses, the answer is the model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.devices import drafting
from edgedistill.devices.drafting import DraftMeasurement, measure_draft
from edgedistill.devices.engine_draft import DraftedEngine
from edgedistill.devices.local import Worker
from edgedistill.devices.protocol import Ratio, Samples, Settings
from edgedistill.errors import StepFailed, UsageError
from tests.unit.devices.conftest import write_tiny

PROMPTS = [[{"role": "user", "content": "ab" * n}] for n in range(1, 7)]
SETTINGS = Settings(threads=1, context=256, answer_tokens=24)


@pytest.fixture(scope="module")
def other_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokens: it guesses wrong."""
    return write_tiny(tmp_path_factory.mktemp("gguf") / "other.gguf", layers=1, seed=1)


def engine(path: Path, draft: Path, **options: Any) -> DraftedEngine:
    return DraftedEngine(path, draft, 1, **{"tokens": 3, "min_probability": 0.0, **options})


def test_a_draft_that_is_the_model_is_kept_whole_and_the_answer_is_the_models(tiny_gguf: Path) -> None:
    both = engine(tiny_gguf, tiny_gguf)
    for messages in PROMPTS:
        plain, drafted = (both.answer(messages, 22, 256, drafted=one) for one in (False, True))
        assert drafted.tokens == plain.tokens
        assert (plain.drafted, plain.checks) == (0, len(plain.tokens) - 1)
        assert drafted.accepted == drafted.drafted > 0
        if len(plain.tokens) == 22:  # 21 tokens after the first, four a check; the last check has room for none
            assert (drafted.checks, drafted.drafted) == (6, 15)


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("limit", [1, 2, 3, 24])
def test_a_draft_that_guesses_wrong_changes_no_answer(
    tiny_gguf: Path, other_gguf: Path, tokens: int, limit: int
) -> None:
    both = engine(tiny_gguf, other_gguf, tokens=tokens)
    for messages in PROMPTS[:3]:
        plain, drafted = (both.answer(messages, limit, 256, drafted=one) for one in (False, True))
        assert drafted.tokens == plain.tokens
        assert len(plain.tokens) <= limit
        assert drafted.accepted <= drafted.drafted
        assert len(drafted.tokens) - 1 <= drafted.accepted + drafted.checks  # an end cuts what was kept after it


def test_a_draft_stops_before_a_token_that_it_doubts(tiny_gguf: Path) -> None:
    sure, doubting = (engine(tiny_gguf, tiny_gguf, min_probability=p) for p in (0.0, 0.999))
    plain = sure.answer(PROMPTS[0], 12, 256, drafted=False)
    spoken = doubting.answer(PROMPTS[0], 12, 256, drafted=True)
    assert spoken.tokens == plain.tokens
    assert (spoken.drafted, spoken.checks) == (0, len(plain.tokens) - 1)
    token, probability = sure.model.best(-1, probability=True)
    logits = sure.model.logits(-1).astype("float64")
    expected = 1 / sum(2.718281828459045 ** (logits - logits[token]))
    assert probability == pytest.approx(expected, rel=1e-5)


def test_models_with_other_tokens_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its tokens are not those of"):
        engine(tiny_gguf, write_tiny(tmp_path / "renamed.gguf", word="term"))


@pytest.fixture(scope="module")
def measured(tiny_gguf: Path, other_gguf: Path) -> DraftMeasurement:
    return measure_draft(tiny_gguf, other_gguf, SETTINGS, prompts=PROMPTS, tokens=3, min_probability=0.0)


def test_a_measurement_pairs_every_prompt_and_counts_what_was_kept(measured: DraftMeasurement) -> None:
    assert measured.prompts == measured.answer.ours.n == measured.answer.baseline.n == len(PROMPTS)
    assert 0 <= measured.acceptance.low <= measured.acceptance.value <= measured.acceptance.high <= 1
    assert measured.acceptance.n >= 3 * len(PROMPTS)
    assert 1 <= measured.tokens_per_check.value <= 4
    assert measured.answer.low <= measured.answer.value <= measured.answer.high
    assert measured.peak_rss > 1 << 20
    assert measured.ties == 0
    data = json.loads(json.dumps(measured.to_json()))
    assert data["verdict"] == measured.verdict
    assert data["settings"]["answer_tokens"] == 24


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.01, 1.2, "helped"), (0.99, 1.2, "undecided"), (0.5, 0.99, "hurt")]
)
def test_the_verdict_is_the_intervals(measured: DraftMeasurement, low: float, high: float, verdict: str) -> None:
    samples = Samples(values=(1.0,))
    answer = Ratio(value=(low + high) / 2, low=low, high=high, ours=samples, baseline=samples)
    assert dataclasses.replace(measured, answer=answer).verdict == verdict


def test_another_answer_fails_unless_rounding_decides_it(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"path": str(tiny_gguf), "tokens": 2, "min_probability": 0.0}
    with Worker(tiny_gguf, 1, draft=options) as worker:
        said = worker.ask("draft", messages=PROMPTS[0], limit=8, context=256, drafted=False)["tokens"]
        other = [*said[:5], said[5] + 1]
        assert not drafting._differ(worker, PROMPTS[0], said, said, 256)
        with pytest.raises(StepFailed, match=r"writes 3 tokens where it writes \d+ without"):
            drafting._differ(worker, PROMPTS[0], said[:3], said, 256)
        with pytest.raises(StepFailed, match=rf"writes token {other[5]} where it writes {said[5]} without"):
            drafting._differ(worker, PROMPTS[0], other, said, 256)
        monkeypatch.setattr(drafting, "TIE", 1e9)
        assert drafting._differ(worker, PROMPTS[0], other, said, 256)


def test_answers_of_one_token_have_nothing_to_draft(tiny_gguf: Path) -> None:
    with pytest.raises(UsageError, match="no answer of 6 has a second token"):
        measure_draft(
            tiny_gguf,
            tiny_gguf,
            dataclasses.replace(SETTINGS, answer_tokens=1),
            prompts=PROMPTS,
            tokens=3,
            min_probability=0.0,
        )


def test_a_long_prompt_is_the_users_error(tiny_gguf: Path) -> None:
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        engine(tiny_gguf, tiny_gguf).answer([{"role": "user", "content": "ab" * 300}], 8, 256, drafted=True)
