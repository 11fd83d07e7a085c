"""Labels are built: a tiny model is taught ambiguous words, through the real stages, and what it learnt is in the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgedistill.report import collect
from edgedistill.report_html import page
from edgedistill.report_sheets import labels_sheet, verdict_notes
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "tiny-labels"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[adapt]
files      = ["gold.jsonl"]
method     = "full"
epochs     = 12
batch_size = 8
lr         = 3e-3
[student]
model  = "teacher"
layers = 1
[prompts]
files = ["asked.jsonl"]
[generate]
samples        = 6
temperature    = 1.0
max_new_tokens = 6
[labels]
names = ["play", "call", "alarm"]
[score]
kind = "none"
[distill]
method     = "full"
loss       = { kd = 0.0, ce = 1.0 }
epochs     = 4
batch_size = 4
lr         = 2e-3
[suites.holdout]
files          = ["holdout.jsonl"]
metric         = "label"
max_new_tokens = 6
[compare]
"most frequent" = { labels.by = "majority" }
[baselines]
gold_sft = true
"""
WORDS = ("queue", "song", "thirty", "percent", "volume", "tomorrow", "turn", "next")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", max_position_embeddings=512)
    (tmp_path / "recipe.toml").write_text(RECIPE)

    def rows(name: str, prompts: list[tuple[str, str]]) -> None:
        lines = [{"id": f"{name}-{at}", "prompt": text, "reference": label} for at, (text, label) in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    clear = [(f"{word} music", "play") for word in WORDS]
    split = [(f"{word} {at}", label) for word in WORDS for at, label in enumerate(("call", "alarm", "call", "alarm"))]
    rows("gold", clear + split)
    rows("asked", [(f"{word} music now", "play") for word in WORDS] + [(f"{word} 9", "call") for word in WORDS])
    rows("holdout", [(f"{word} 7", "alarm") for word in WORDS] + [(f"do {word} music", "play") for word in WORDS])
    return tmp_path


def read(session: Session, step: str, name: str) -> list[dict[str, Any]]:
    entry = session.store.load(session.plan.match(step)[0].key)
    assert entry is not None
    return [json.loads(line) for line in (entry.path / name).read_text().splitlines()]


@pytest.mark.slow
def test_shares_are_taught_and_shown(folder: Path) -> None:
    session = prepare(folder, store=Store(folder / "store"))
    plan = session.plan.only(
        [
            step
            for step in session.plan.steps
            if {"evaluate/student", "evaluate/gold-sft", "evaluate/student@most frequent"} & {*step.ids}
        ]
    )
    assert not Runner(plan, session.store).build().failed
    assert Runner(plan, session.store).build().ran == []
    given: dict[str, Counter[str]] = {}
    for one in read(session, "generate", "rows.jsonl"):
        if one["finish"] == "stop" and one["text"].strip() in ("play", "call", "alarm"):
            given.setdefault(one["id"], Counter())[one["text"].strip()] += 1
    taught: dict[str, dict[str, float]] = {}
    for one in read(session, "filter", "kept.jsonl"):
        taught.setdefault(one["prompt"], {})[one["text"]] = one["weight"]
    assert taught == {row: {k: n / counts.total() for k, n in counts.items()} for row, counts in given.items()}
    assert any(len(one) > 1 for one in taught.values())
    assert len(read(session, "filter@most frequent", "kept.jsonl")) == len(given)
    data = collect(session)
    assert [(one.other, one.measure) for one in data.comparisons] == [
        (other, measure) for other in ("student@most frequent", "gold-sft") for measure in ("score", "brier")
    ]
    for one in data.comparisons:
        low, high = one.figure.low, one.figure.high
        assert low is not None and high is not None and one.figure.n == 16
        assert one.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
    for name in ("teacher", "student", "gold-sft"):
        model = data.model(name)
        assert model is not None
        figures = model.suites["holdout"].labels
        assert {key: one.n for key, one in figures.items()} == dict.fromkeys(
            ("macro_f1", "error", "gap", "brier", "nll", "top"), 16
        )
    brier = next(one for one in data.comparisons if one.measure == "brier")
    means = [data.model(name).suites["holdout"].labels["brier"].value for name in (brier.other, "student")]  # type: ignore[union-attr]
    assert brier.figure.value == pytest.approx(means[0] - means[1], abs=1e-5)
    assert len(labels_sheet(data).rows) == len(data.models)
    assert "macro-F1" in page(data) and f"of {len(given)} prompts" in page(data)
    assert "Brier score lower by" in " ".join(verdict_notes(data))
