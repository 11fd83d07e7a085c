"""The packaged recipes ``code`` and ``reasoning``, reduced in rows and steps: what their filters let through is told and true."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.data.thinking import split
from edgedistill.evals.execution import verdict
from edgedistill.report import collect, write_html
from edgedistill.report_sheets import verdict_notes
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.e2e.conftest import read_jsonl
from tests.e2e.test_recipes import ROWS, WORDS, reduced, toml

# Few rows: the teacher is to fail some of them, for the second one to answer.
CODE: dict[str, Any] = {**WORDS, "adapt.rows": 64, "teacher.min_score": {}}
# No reference stands in where nothing passes: enough rows of one task for a few answers that do.
REASONING: dict[str, Any] = {**WORDS, "adapt.rows": 160, "prompts.rows": 10}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def built(folder: Path, store: Store, overrides: dict[str, Any]) -> Session:
    """Build a reduced recipe as far as its evaluations, and once more."""
    session = prepare(folder, overrides=overrides, store=Store(store.root))
    plan = session.plan.only(session.plan.match("evaluate"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []
    return session


def entry(session: Session, step: str) -> Any:
    (own,) = [one for one in session.plan.steps if step in one.ids]  # a name may be a stage, too
    found = session.store.load(own.key)
    assert found is not None
    return found


def check_yields(
    session: Session, kinds: list[str], overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Check that each filter got what the one before it left, and that ``data stats`` and the report say so; return the stats."""
    yields = entry(session, "filter").facts["yields"]
    assert [one["filter"] for one in yields] == ["ended", *kinds]
    for before, after in pairwise(yields):
        assert before["out"] == after["in"] >= after["out"]
    monkeypatch.setenv("EDGEDISTILL_STORE", str(session.store.root))
    # What is None reaches no step before the student's, and TOML cannot say it.
    changes = [f"--set={key}={toml(value)}" for key, value in overrides.items() if value is not None]
    asked = ["data", "stats", str(session.path), *changes]
    told = CliRunner().invoke(app, [*asked, "--json"])
    assert told.exit_code == 0, told.output
    stats = json.loads(told.stdout)
    assert stats["yields"] == yields
    table = CliRunner().invoke(app, asked)
    assert table.exit_code == 0 and all(kind in table.stdout for kind in kinds)
    write_html(collect(session), session.path.parent / "report.html")
    page = (session.path.parent / "report.html").read_text()
    assert "filters: " + ", ".join(f"{one['filter']} {one['out']} of {one['in']}" for one in yields) in page
    return stats


def check_scores(session: Session) -> None:
    """Check that every model has a score of every suite, with its n, and that verdicts go by the intervals beside them."""
    data, recipe = collect(session), session.recipe
    arms = [f"student@{arm}" for arm in recipe.compare] + ["gold-sft"]
    for model in ("teacher", "student", *arms, *recipe.targets):
        found = data.model(model)
        assert found is not None
        for name, suite in recipe.suites.items():
            scored = found.suites[name]
            assert scored.score is not None and scored.score.n == ROWS and 0 <= scored.score.value <= 1
            assert suite.metric in scored.metric
    assert {(one.other, one.suite) for one in data.comparisons} == {(arm, s) for arm in arms for s in recipe.suites}
    told = " ".join(verdict_notes(data))
    for one in data.comparisons:
        low, high = one.figure.low, one.figure.high
        assert low is not None and high is not None and one.figure.n == ROWS
        assert one.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
        assert f"[{low:+.3f}, {high:+.3f}], n = {ROWS}: {one.verdict}" in told


def test_code_is_taught_as_far_as_it_runs(tmp_path: Path, shared_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    session = built(reduced("code", tmp_path / "code"), shared_store, CODE)
    stats = check_yields(session, ["format", "execution", "best"], CODE, monkeypatch)
    check_scores(session)
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "code" / "data" / "prompts.jsonl")}
    found = entry(session, "filter")
    kept = read_jsonl(found.path / "kept.jsonl")
    assert {line["id"].partition("#")[0] for line in kept} == set(list(rows)[:12])  # no prompt is lost
    for line in kept:
        assert verdict(line["text"], rows[line["id"].partition("#")[0]]["tests"]) == "", line
    ran = [line for line in read_jsonl(found.path / "rejected.jsonl") if line["why"].startswith("execution")]
    for line in ran:
        assert verdict(line["text"], rows[line["id"]]["tests"]) != "", line
    # The second teacher was asked what no answer of the first was kept for, and nothing else.
    judged = read_jsonl(entry(session, "filter/1").path / "kept.jsonl")
    first = {line["id"].partition("#")[0] for line in judged if line["source"] == "teacher"}
    asked = {line["id"] for line in read_jsonl(entry(session, "generate/untuned").path / "rows.jsonl")}
    assert asked == {line["id"].partition("#")[0] for line in kept} - first
    recovered = {line["id"].partition("#")[0] for line in kept if line["source"] == "untuned"}
    assert found.facts["recovery"] == {"untuned": {"asked": len(asked), "good": len(recovered)}}
    assert sum(stats["sources"].values()) == len(kept)
    alone = entry(session, "filter@no recovery")
    assert "recovery" not in alone.facts and alone.facts["teacher"] == found.facts["teacher"]


@pytest.mark.reasoning
def test_reasoning_keeps_what_verifiers_take(
    tmp_path: Path, shared_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill.evals.reasoning import credit

    folder = reduced("reasoning", tmp_path / "reasoning")
    for name, longest in (("train", 9), ("prompts", 5)):  # characters of a sum: 3 + 9
        path = folder / "data" / f"{name}.jsonl"
        sums = [row for row in read_jsonl(path) if row["tags"] == ["chain_sum"]]
        short = [row for row in sums if len(row["reasoning_gym"]["metadata"]["expression"]) <= longest]
        path.write_text("".join(json.dumps(row) + "\n" for row in short))
    session = built(folder, shared_store, REASONING)
    check_yields(session, ["thinking", "agreement", "reference", "best"], REASONING, monkeypatch)
    check_scores(session)
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "reasoning" / "data" / "prompts.jsonl")}
    kept = read_jsonl(entry(session, "filter").path / "kept.jsonl")
    assert kept and {line["source"] for line in kept} == {"teacher"}
    for line in kept:
        thought = split(line["text"])
        assert not thought.empty and credit(thought.answer, rows[line["id"]]["reasoning_gym"]) == 1.0
    alone = read_jsonl(entry(session, "filter@no verifier").path / "kept.jsonl")
    assert {line["id"] for line in kept} <= {line["id"] for line in alone}
    thinking = entry(session, "evaluate/teacher").facts["suites"]["holdout"]["thinking"]
    assert thinking["n"] == ROWS
