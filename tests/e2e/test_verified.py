"""Problems of reasoning-gym all the way on the reduced quickstart: made, asked, judged by their verifiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.evals.reasoning import credit, make_rows
from edgedistill.runner import Runner
from tests.e2e.conftest import read_jsonl, reduce

TARGET = "phone-midrange"
pytestmark = [pytest.mark.slow, pytest.mark.reasoning, pytest.mark.timeout(1800)]


def test_verdicts_filter_and_score(session_of: Callable[..., Any], tmp_path: Path) -> None:
    folder = reduce(tmp_path / "sums")
    made = {row["prompt"]: row for row in make_rows("chain_sum", 160, 1, {"max_terms": 2, "max_digits": 2})}
    train, new = list(made.values())[8:104], list(made.values())[:8]
    for name, rows in (("train", train), ("holdout", new)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files: dict[str, Any] = {f"{name}.files": ["data/train.jsonl"] for name in ("adapt", "heal", "prompts")}
    session = session_of(
        targets=[TARGET],
        folder=folder,
        **{
            **files,
            **{
                "adapt.rows": 96,
                "adapt.epochs": 2.0,
                "heal.rows": 48,
                "prompts.rows": 24,
                "tune": None,
                "baselines": {},
            },
            "suites": {"holdout": {"files": ["data/holdout.jsonl"], "metric": "reasoning-gym", "max_new_tokens": 8}},
            "filter": [{"kind": "reference", "metric": "reasoning-gym", "otherwise": "gold"}],
            "gates.min_speedup": None,
        },
    )
    plan = session.plan.only(session.plan.match("evaluate/student"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []

    def found(step: str) -> Any:
        return session.store.load(session.plan.match(step)[0].key)

    problems = {row["id"]: row["reasoning_gym"] for row in train}
    for line in read_jsonl(found("filter").path / "kept.jsonl"):
        assert credit(line["text"], problems[line["id"]]) == 1.0
    for line in read_jsonl(found("filter").path / "rejected.jsonl"):
        if line["why"] == "reference (reasoning-gym)":
            assert credit(line["text"], problems[line["id"]]) < 1.0
    summary = found("evaluate/student").facts["suites"]["holdout"]
    assert summary["metric"] == "reasoning-gym" and summary["n"] == len(new)
