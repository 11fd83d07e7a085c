"""Rounds run: a tiny model learns a handful of answers, through the real stages, and an interrupted round goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import UsageError
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "tiny"
targets = ["laptop-x86"]

[teacher]
model = "path:model"

[adapt]
files      = ["rows.jsonl"]
method     = "full"
epochs     = 40
batch_size = 8
lr         = 3e-3

[student]
model  = "teacher"
layers = 1

[prompts]
files = ["rows.jsonl"]

[generate]
max_new_tokens = 12
batch_size     = 4

[[filter]]
kind      = "reference"
metric    = "exact"
otherwise = "gold"

[distill]
method     = "full"
epochs     = 6
batch_size = 8
lr         = 2e-3

[[round]]
kind    = "self"
samples = 3

[[round]]
kind    = "online"
samples = 2
replay  = 0.5
"""
WORDS = ("alarm", "call", "volume", "song", "queue", "thirty", "percent", "turn", "play", "next", "down", "tomorrow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-rounds")
    make_model(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE)
    rows = [{"id": word, "prompt": f"Say {word}.", "reference": word} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def session_of(folder: Path, store: Path, **overrides: Any) -> Session:
    session = prepare(folder, store=Store(store), overrides=overrides)
    (merge,) = [step for step in session.plan.steps if "distill/3" in step.ids]
    return Session(**{**session.__dict__, "plan": session.plan.only([merge])})


def entry(session: Session, step: str) -> Any:
    found = session.store.load(session.plan.match(step)[0].key)
    assert found is not None
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rounds_run_and_an_interrupted_one_asks_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(folder, tmp_path / "store")
    add, left = RowStore.add, [2]

    def add_and_break(self: RowStore, answers: Any) -> None:
        add(self, answers)
        if len(list(Path(session.store.root / "entries").glob("*"))) and session.store.load(first) is not None:
            left[0] -= 1
            if left[0] == 0:
                raise UsageError("broken off", "go on")

    first = session.plan.match("distill/1")[0].key
    with monkeypatch.context() as patch:  # breaks off in the student's second batch of answers
        patch.setattr(RowStore, "add", add_and_break)
        outcome = Runner(session.plan, session.store).build()
    assert list(outcome.failed) == ["generate/round-1"]
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert outcome.ran[0] == "generate/round-1"
    assert RowStore(session.store.root).asked_again() == []
    assert Runner(session.plan, session.store).build().ran == []

    answered = entry(session, "generate/round-1").facts
    assert answered["rows"] == 3 * len(WORDS) and 0 < answered["from_store"] < answered["rows"]
    own = entry(session, "filter/round-1")
    kept = lines(own.path / "kept.jsonl")
    assert {one["id"] for one in kept} == set(WORDS) and own.facts["prompts"] == len(WORDS)
    assert all(one["text"].strip() == one["reference"] for one in kept)

    judged = lines(entry(session, "evaluate/round-2").path / "answers" / "prompts.jsonl")
    failed = {one["id"] for one in judged if one["score"] < 1}
    asked = lines(entry(session, "generate/round-2").path / "rows.jsonl")
    assert {one["id"] for one in asked} == failed and len(asked) == 2 * len(failed)
    again = lines(entry(session, "filter/round-2").path / "kept.jsonl")
    assert [one["id"] for one in again[:6]] == [f"{one['id']}+before" for one in kept[::2]]
    assert {one["id"] for one in again[6:]} == failed

    for number, start in ((2, "distill/1"), (3, "distill/2")):
        stage: Any = session.plan.match(f"distill/{number}")[0].stage
        assert stage.student == session.plan.match(start)[0].key
        assert entry(session, f"distill/{number}").facts["train"]["steps"] > 0


def test_a_student_with_a_trimmed_vocabulary_learns_its_own_answers_by_the_teachers_distributions(
    folder: Path, tmp_path: Path
) -> None:
    session = session_of(folder, tmp_path / "store", **{"student.vocabulary": 380, "adapt.epochs": 30})
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    own, found = entry(session, "filter/round-1").facts, entry(session, "distill/2").facts
    assert found["left_out"] < own["kept"] and found["train"]["kd"] > 0
