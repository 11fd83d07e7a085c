"""Chain of thought all the way on the reduced quickstart: a teacher that thinks, and the two ways to teach it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.thinking import split
from edgedistill.runner import Runner
from tests.e2e.conftest import read_jsonl, reduce

TARGET = "phone-midrange"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reduced quickstart, with a rationale on every row that teaches."""
    folder = reduce(tmp_path_factory.mktemp("recipes") / "thinking")
    for name in ("train", "drills", "lists"):
        path = folder / "data" / f"{name}.jsonl"
        rows = read_jsonl(path)
        for row in rows:
            asked = json.loads(row["reference"])
            name = asked["name"] if isinstance(asked, dict) else "a list"
            row["rationale"] = f"This asks for {name}, and I write it as JSON."
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def build(session_of: Callable[..., Any], folder: Path, **overrides: Any) -> Any:
    session = session_of(
        targets=[TARGET],
        folder=folder,
        **{
            "gates.min_speedup": None,
            "baselines": {},
            "prompts.rows": [32, 8],
            "adapt.rows": [48, 16, 12],
            "heal.rows": [48, 16, 12],
            "adapt.epochs": 3.0,
            "generate.max_new_tokens": 96,
            "suites.holdout.max_new_tokens": 96,
            "suites.ood.max_new_tokens": 96,
            "suites.holdout.grammar": None,
            **overrides,
        },
    )
    plan = session.plan.only(session.plan.match("evaluate/student"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []
    return session


def facts(session: Any, step: str) -> Any:
    return session.store.load(session.plan.match(step)[0].key)


def test_a_student_learns_to_think_first(session_of: Callable[..., Any], folder: Path) -> None:
    session = build(session_of, folder, **{"generate.style": "think", "distill.think_weight": 2.0})
    found = facts(session, "filter")
    lines = read_jsonl(found.path / "kept.jsonl")
    assert all(not split(line["text"]).empty for line in lines)
    assert found.facts["thinking"]["empty"] <= 0.5
    distilled = facts(session, "distill/1").facts["thinking"]
    assert distilled["n"] == 16 and distilled["empty"] <= 0.5
    summary = facts(session, "evaluate/student").facts["suites"]["holdout"]
    assert summary["metric"] == "think:json-exact"
    assert summary["thinking"]["blocks"] > 0.5


def test_an_answer_is_explained_after_it_and_a_wrong_one_corrected(
    session_of: Callable[..., Any], folder: Path
) -> None:
    reference = {"kind": "reference", "metric": "json-exact", "otherwise": "gold", "corrections": 1}
    session = build(
        session_of,
        folder,
        **{
            "generate.style": "explanation",
            "generate.samples": 3,
            "generate.temperature": 0.8,
            "filter": [reference, {"kind": "best", "keep": 2}],
        },
    )
    found = facts(session, "filter")
    lines = read_jsonl(found.path / "kept.jsonl")
    fixes = [line for line in lines if line.get("task") == "correction"]
    assert len(fixes) == found.facts["corrections"] > 0
    assert all(line["messages"][-2]["role"] == "assistant" for line in fixes)
    ids = [line["id"].partition("#")[0] for line in lines if "task" not in line]
    assert max(ids.count(one) for one in ids) <= 2
    assert all(split(line["text"]).after for line in lines)
    assert facts(session, "score").facts["rows"] == len(lines)
    summary = facts(session, "evaluate/student").facts["suites"]["holdout"]
    assert summary["metric"] == "think:json-exact" and summary["thinking"]["blocks"] > 0.5


def test_a_rationale_is_learnt_beside_the_answer(session_of: Callable[..., Any], folder: Path) -> None:
    session = build(session_of, folder, **{"generate.style": "rationale", "distill.think_weight": 0.5})
    lines = read_jsonl(facts(session, "filter").path / "kept.jsonl")
    answers = [line for line in lines if "task" not in line]
    assert len(lines) > len(answers) > 0
    assert all(split(line["text"]).thinking is None for line in answers)
    scored = facts(session, "score").facts["rows"]
    assert scored == len(lines)
    summary = facts(session, "evaluate/student").facts["suites"]["holdout"]
    assert summary["metric"] == "think:json-exact"
