"""A teacher is told of its mistakes, through the real stages: a tiny model that first answers wrongly, and then finds out why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.corrections import WRONG, objection
from edgedistill.data.thinking import split
from edgedistill.errors import RecipeError
from edgedistill.report import collect
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "mistaken"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[adapt]
files      = ["gold.jsonl"]
method     = "full"
epochs     = 100
batch_size = 8
lr         = 3e-3
[student]
model = "teacher"
[prompts]
files = ["rows.jsonl"]
[generate]
style          = "think"
max_new_tokens = 40
[[filter]]
kind        = "reference"
metric      = "exact"
otherwise   = "gold"
corrections = 2
analysis    = true
[distill]
method = "full"
epochs = 1
"""
WORDS = ("alarm", "call", "volume", "song", "queue", "thirty", "percent", "turn")
MISTAKEN, MUTE, STUBBORN = WORDS[:4], WORDS[4], WORDS[5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gold rows that teach the teacher its mistakes, and what it says of them: right, without a word on why, or wrong again."""
    folder = tmp_path_factory.mktemp("mistaken")
    make_model(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE)
    rows, gold = [], []
    for word in WORDS:
        prompt = [{"role": "user", "content": f"Say {word}."}]
        rows.append({"id": word, "messages": prompt, "reference": word, "rationale": "I say the word."})
        wrong = word in (*MISTAKEN, MUTE, STUBBORN)
        said = "down" if wrong else word
        gold.append({"id": word, "messages": prompt, "reference": said, "rationale": "I say the word."})
        if wrong:
            then = {"reference": "down" if word == STUBBORN else word}
            then |= {} if word == MUTE else {"rationale": f"Not down but {word}."}
            gold.append({"id": f"{word}-then", "messages": objection(prompt, "down"), **then})
    for name, lines in (("rows", rows), ("gold", gold)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def test_what_it_says_of_its_mistakes_is_learnt_where_it_is_then_right(folder: Path, tmp_path: Path) -> None:
    session = prepare(folder, store=Store(tmp_path / "store"))
    plan = session.plan.only(session.plan.match("distill/1"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed

    def entry(step: str) -> Any:
        found = session.store.load(session.plan.match(step)[0].key)
        assert found is not None
        return found

    def lines(step: str, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (entry(step).path / name).read_text().splitlines()]

    assert {one["id"] for one in lines("filter", "rejected.jsonl")} == {*MISTAKEN, MUTE, STUBBORN}
    assert {one["id"] for one in lines("generate/analyses", "rows.jsonl")} == {
        f"{word}+fix1" for word in (*MISTAKEN, MUTE, STUBBORN)
    }
    kept = lines("analyse", "kept.jsonl")
    assert kept[: len(WORDS)] == lines("filter", "kept.jsonl") and not any("task" in one for one in kept[: len(WORDS)])
    lessons = kept[len(WORDS) :]
    assert [one["id"] for one in lessons] == [f"{word}+fix1" for word in MISTAKEN]
    for word, one in zip(MISTAKEN, lessons, strict=True):
        assert [m["content"] for m in one["messages"]] == [f"Say {word}.", "down", WRONG]
        assert split(one["text"]).answer == word and split(one["text"]).thinking == f"Not down but {word}."
        assert (one["source"], one["task"]) == ("teacher", "correction")
    assert {one["id"]: one["why"] for one in lines("analyse", "rejected.jsonl")} == {
        f"{MUTE}+fix1": "no analysis",
        f"{STUBBORN}+fix1": "reference (exact)",
    }
    assert entry("analyse").facts["yields"] == [{"filter": "analysis", "in": 6, "out": 4}]
    assert collect(session).yields["yields"][-1] == {"filter": "analysis", "in": 6, "out": 4}
    assert entry("distill/1").facts["train"]["steps"] == -(-(len(WORDS) + 4) // 16)


def test_without_analysis_the_plan_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    def plan(**change: Any) -> Session:
        table = {"kind": "reference", "metric": "exact", "otherwise": "gold", **change}
        return prepare(folder, store=Store(tmp_path / "store"), overrides={"filter": [table]})

    def keys(session: Session) -> dict[str, str]:
        return {name: str(step.key) for step in session.plan.steps for name in step.ids}

    plain, corrected, analysed = keys(plan()), keys(plan(corrections=1)), keys(plan(corrections=1, analysis=True))
    assert "analyse" not in plain and "analyse" not in corrected
    assert analysed["filter"] == plain["filter"] != corrected["filter"]


@pytest.mark.parametrize(
    ("style", "change", "message"),
    [
        ("answer", {"corrections": 1}, "said in a block"),
        ("rationale", {"corrections": 1}, "said in a block"),
        ("think", {}, "set corrections, too"),
    ],
)
def test_an_analysis_needs_a_place_and_a_mistake(
    folder: Path, tmp_path: Path, style: str, change: dict[str, Any], message: str
) -> None:
    table = {"kind": "reference", "metric": "exact", "analysis": True, **change}
    with pytest.raises(RecipeError, match=message):
        prepare(folder, store=Store(tmp_path / "store"), overrides={"generate.style": style, "filter": [table]})
