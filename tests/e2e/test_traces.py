"""Traces of tool use all the way on the reduced quickstart: the call, what the phone says to it, and the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.evals.suites import WHOLE_TRACES
from edgedistill.runner import Runner
from tests.e2e.conftest import SIZES, read_jsonl, reduce

TARGET = "phone-midrange"
TRACES = 40
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reduced quickstart, whose rows go on after the call."""
    folder = reduce(tmp_path_factory.mktemp("recipes") / "traces")
    for name in ("train", "drills", "lists", "holdout", "ood"):
        path = folder / "data" / f"{name}.jsonl"
        rows = read_jsonl(path)
        for row in rows:
            asked = json.loads(row["reference"])
            named = asked["name"] if isinstance(asked, dict) else "all"
            row["messages"] += [
                {"role": "assistant", "content": row.pop("reference")},
                {"role": "tool", "content": json.dumps({"done": named})},
                {"role": "assistant", "content": f"Done: {named.replace('_', ' ')}."},
            ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_student_learns_calls_and_answers(session_of: Callable[..., Any], folder: Path) -> None:
    session = session_of(
        targets=[TARGET],
        folder=folder,
        **{
            "generate.style": "tool-trace",
            "filter.0.metric": "tool-calls",
            "baselines": {"gold_sft": True},
            "suites.holdout.metric": "tool-calls",
            "suites.holdout.grammar": None,
            "suites.ood.metric": "tool-calls",
            "gates.min_speedup": None,
            "prompts.rows": [TRACES - 8, 8],
            "adapt.rows": [48, 16, 12],
            "heal.rows": [48, 16, 12],
            "adapt.epochs": 3.0,
        },
    )
    plan = session.plan.only(session.plan.match("evaluate"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []

    def found(step: str) -> Any:
        return session.store.load(session.plan.match(step)[0].key)

    lines = read_jsonl(found("filter").path / "kept.jsonl")
    assert len(lines) == 2 * TRACES and len({line["trace"] for line in lines}) == TRACES
    assert all(line["messages"][-1]["role"] == ("tool" if line["id"].endswith("/2") else "user") for line in lines)
    scored = found("score").facts["rows"]
    assert TRACES <= scored < len(lines)  # recorded calls and their answers are one sequence each
    for step in ("evaluate/teacher", "evaluate/student", "evaluate/gold-sft", f"evaluate/{TARGET}"):
        summary = found(step).facts["suites"]["holdout"]
        assert summary["metric"] == "tool-calls" and summary["n"] == 2 * SIZES["holdout"]
        assert summary["by_tag"][WHOLE_TRACES]["n"] == SIZES["holdout"]
        assert {"turn 1", "turn 2"} <= set(summary["by_tag"])
    # After the phone's word the student answers, and does not call again: it has learnt what a result is for.
    assert found("evaluate/student").facts["suites"]["holdout"]["by_tag"]["turn 2"]["value"] > 0.5
