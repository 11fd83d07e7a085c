"""From easy to hard: what the measures say, what the first epoch keeps, and that a run in this order resumes and accumulates."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training import curriculum
from edgedistill.training.checkpoint import State
from edgedistill.training.curriculum import difficulty, losses_of, unsureness
from edgedistill.training.data import WINDOWS, Example, counter_rng, eased_batches, make_batches, padding_share
from edgedistill.training.losses import LossTerms
from edgedistill.training.recipe import encode_rows, load_kept
from edgedistill.training.settings import check_loss, plan_steps, run_digest
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

EASED = TrainSettings(
    method="full", lr=1e-3, epochs=2.0, batch_size=4, dtype="float32", schedule="constant", curriculum="loss"
)


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _bytes(out: Path) -> bytes:
    return next(out.glob("*/*.safetensors")).read_bytes()


def _measure(by: str, examples: list[Example], folder: Path, soft: Any = None, **more: Any) -> list[float]:
    return difficulty(make_llama(), examples, soft, by, vocab_size=VOCAB, folder=folder, digest="d", **more)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0.0, 0.5, 1.5, 7.0])), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_an_eased_epoch_holds_what_a_shuffled_one_does_window_by_window(
    rows: list[tuple[int, float]], batch_size: int, seed: int
) -> None:
    sizes, hard = [size for size, _ in rows], [level for _, level in rows]
    batches = eased_batches(sizes, hard, batch_size=batch_size, seed=seed)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert len(batches) == len(make_batches(sizes, batch_size=batch_size, seed=seed))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == eased_batches(sizes, hard, batch_size=batch_size, seed=seed)
    window = max(1, min(16, len(batches) // WINDOWS))
    levels = [
        [hard[row] for batch in batches[at : at + window] for row in batch] for at in range(0, len(batches), window)
    ]
    assert len(levels) >= min(WINDOWS, len(batches))
    assert all(max(before) <= min(after) for before, after in pairwise(levels))


def test_batches_of_an_eased_epoch_pad_little_and_differ_by_seed() -> None:
    rng = counter_rng("eased")
    rows = [Example(str(at), tuple(range(int(rng.integers(20, 200)))), (1,) * 10) for at in range(600)]
    hard = rng.random(600).tolist()
    first = eased_batches(rows, hard, batch_size=8, seed=0)
    assert padding_share(rows, first) < 0.15
    assert first != eased_batches(rows, hard, batch_size=8, seed=1)
    with pytest.raises(UsageError, match="batch_size is 0"):
        eased_batches(rows, hard, batch_size=0, seed=0)


def test_only_the_first_epoch_is_in_order_and_no_step_is_more() -> None:
    examples = make_examples(30)
    hard = [float(len(one.completion_ids)) for one in examples]
    plan, plain = plan_steps(examples, EASED, hard), plan_steps(examples, EASED)
    assert len(plan) == len(plain) == 16
    assert plan[8:] == plain[8:] == make_batches(examples, batch_size=4, seed=0, epoch=1)
    assert plan[:8] == eased_batches(examples, hard, batch_size=4, seed=0)
    tokens = [sum(examples[row].length for rows in steps for row in rows) for steps in (plan, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_rows_loss_is_that_of_a_plain_forward(weighted: bool) -> None:
    model, examples = make_llama().train(), make_examples(37)
    if weighted:
        examples = [replace(one, weights=tuple(float(token % 3) for token in one.completion_ids)) for one in examples]
    found = losses_of(model, examples, vocab_size=VOCAB)
    assert model.training
    plain = make_llama().double()
    for one, loss in zip(examples, found, strict=True):
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(one.completion_ids), reduction="none")
        weights = torch.tensor(one.token_weights, dtype=torch.float64)
        assert loss == pytest.approx(float((each * weights).sum() / (weights.sum() or 1.0)), rel=1e-4, abs=1e-6)


def test_the_teachers_confidence_is_the_mean_of_its_largest_probability() -> None:
    teacher, examples = make_llama(seed=1), make_examples(12)
    exact = [unsureness(one) for one in score(teacher, examples, kind="top-k", n=2)]
    for one, found in zip(examples, exact, strict=True):
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].softmax(-1)
        assert found == pytest.approx(1 - float(p.amax(-1).mean()), abs=2e-3)
    for kind, temperature in (("sampled", 1.0), ("sampled", 2.0), ("top-sampled", 1.0)):
        drawn = [unsureness(one) for one in score(teacher, examples, kind=kind, n=50, temperature=temperature)]  # pyright: ignore[reportArgumentType]
        assert max(abs(a - b) for a, b in zip(drawn, exact, strict=True)) < 0.1
        assert temperature != 1.0 or np.corrcoef(drawn, exact)[0, 1] > 0.8


def test_each_measure_by_its_name(tmp_path: Path) -> None:
    examples = [replace(one, evolution=at % 3) for at, one in enumerate(make_examples(9))]
    soft = score(make_llama(seed=1), examples)
    assert _measure("length", examples, tmp_path) == [len(one.completion_ids) for one in examples]
    assert _measure("evolution", examples, tmp_path) == [0, 1, 2] * 3
    assert _measure("confidence", examples, tmp_path, soft) == [unsureness(one) for one in soft]
    with pytest.raises(UsageError, match="needs the stored distributions") as error:
        _measure("confidence", examples, tmp_path)
    assert "score.kind" in error.value.hint
    assert list(tmp_path.iterdir()) == []
    assert _measure("loss", examples, tmp_path) == losses_of(make_llama(), examples, vocab_size=VOCAB)


def test_losses_are_measured_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(9)
    first = _measure("loss", examples, tmp_path)
    monkeypatch.setattr(curriculum, "losses_of", lambda *_, **__: [5.0] * 9)
    assert _measure("loss", examples, tmp_path) == first
    assert difficulty(make_llama(), examples, None, "loss", vocab_size=VOCAB, folder=tmp_path, digest="other") == [
        5.0
    ] * len(examples)


def test_the_loss_rises_through_the_first_epoch(tmp_path: Path) -> None:
    """With a rate of next to nothing the log shows how hard the rows of each step are for the student's start."""
    settings = replace(EASED, lr=1e-9, gradient_norms=0)
    train(make_llama(), make_examples(64), None, settings=settings, out=tmp_path)
    log = _log(tmp_path)
    losses = [line["ce"] for line in log]
    assert [line["step"] for line in log if line.get("eased")] == list(range(1, 17))
    quarters = [np.mean(losses[at : at + 4]) for at in range(0, 16, 4)]
    assert quarters == sorted(quarters) and quarters[3] > 1.1 * quarters[0]
    plain = tmp_path / "plain"
    train(make_llama(), make_examples(64), None, settings=replace(settings, curriculum="none"), out=plain)
    both = [_log(plain), log]
    assert sum(line["tokens"] for line in both[0]) == sum(line["tokens"] for line in both[1])
    assert not any("eased" in line for line in both[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.jsonl", "model", "plain", "train.json"]


@pytest.mark.parametrize("by", ["loss", "confidence"])
def test_cut_off_mid_epoch_it_ends_the_same(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(30)
    soft = score(make_llama(seed=1), examples)
    settings = replace(
        EASED, curriculum=by, method="lora", micro_batch=3, checkpoint_steps=1, loss=LossTerms(kd=0.5, ce=0.5)
    )  # pyright: ignore[reportArgumentType]
    train(make_llama(), examples, soft, settings=settings, out=tmp_path / "whole")

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_llama(), examples, soft, settings=settings, out=tmp_path / "cut", progress=stop)
    monkeypatch.setattr(curriculum, "losses_of", lambda *_, **__: pytest.fail("measured again"))
    result = train(make_llama(), examples, soft, settings=settings, out=tmp_path / "cut")
    assert 0 < result.resumed_at < 8 and result.steps == 16
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "whole")
    assert not (tmp_path / "cut" / curriculum.FILE).exists()


def test_accumulation_changes_nothing_of_an_eased_run(tmp_path: Path) -> None:
    examples = make_examples(24)
    logs = []
    for micro in (None, 3, 1):
        out = tmp_path / str(micro)
        train(make_llama(), examples, None, settings=replace(EASED, epochs=1.0, micro_batch=micro), out=out)
        logs.append(_log(out))
    for line, *others in zip(*logs, strict=True):
        for other in others:
            assert other["tokens"] == line["tokens"]
            assert other["loss"] == pytest.approx(line["loss"], rel=2e-4)


def test_rows_that_get_harder_are_no_loss_that_runs_away() -> None:
    def passes(losses: list[float], eased: int) -> bool:
        state = State()
        try:
            for step, loss in enumerate(losses, 1):
                check_loss({"step": step, "loss": loss, "gradient": 1.0}, state, EASED, eased=eased)
        except StepFailed:
            return False
        return True

    harder = [0.1 + 0.05 * step for step in range(100)]
    assert passes(harder, eased=100) and not passes(harder, eased=0)
    assert passes([*harder, *[2.5] * 60], eased=100)
    assert not passes([*harder, *[2.5] * 30, *[9.0] * 30], eased=100)
    assert not passes([*harder[:50], math.nan], eased=100)


def test_a_checkpoint_of_another_order_is_refused_and_off_is_what_it_was() -> None:
    model, examples = make_llama(), make_examples(9)
    evolved = [replace(one, evolution=2) for one in examples]

    def digest(rows: list[Example], by: Any) -> str:
        return run_digest(model, rows, None, replace(EASED, curriculum=by), VOCAB)

    assert len({digest(examples, by) for by in ("none", "length", "loss", "evolution")}) == 4
    assert digest(examples, "none") == digest(evolved, "none")
    assert digest(examples, "evolution") != digest(evolved, "evolution")


def test_a_row_keeps_its_round_of_evolution_on_the_way_to_the_trainer(tmp_path: Path) -> None:
    from edgedistill.data.prompts import Row
    from tests.unit.formats.gguf.conftest import make_model

    make_model(tmp_path / "model")
    rows = [
        Row(id=f"r{at}", messages=({"role": "user", "content": "play"},), reference="{}", evolution=at) for at in (1, 0)
    ]
    assert [one.evolution for one in encode_rows(rows, tmp_path / "model")] == [1, 0]
    lines = [
        {
            "id": "r1",
            "messages": [{"role": "user", "content": "play"}],
            "text": "{}",
            "reference": None,
            "evolution": 3,
        },
        {"id": "r2", "messages": [{"role": "user", "content": "play"}], "text": "{}", "reference": None},
    ]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, _ = load_kept(tmp_path / "kept.jsonl", tmp_path / "model")
    assert [one.evolution for one in examples] == [3, 0]
