"""Every packaged recipe builds, reduced in rows and steps: same model, same code path, and nothing runs again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgedistill.recipes import copy_recipe, packaged
from edgedistill.report import collect
from edgedistill.report_sheets import verdict_notes
from edgedistill.runner import Runner
from edgedistill.session import prepare
from edgedistill.store import Store

# Cutting FFNs is the slowest step, and as slow for few rows: `sweep` and test_build.py do it.
WORDS: dict[str, Any] = {
    **{"adapt.rows": 96, "heal.rows": 48, "prompts.rows": 12, "calibrate.rows": 8},
    **{"student.ffn": None, "gates": {}},
}
# The recipes on the quickstart's task: the same teacher, so that the first one built adapts it for all.
CALLS: dict[str, Any] = {
    **{"teacher.min_score": {}, "adapt.rows": 32, "heal.rows": 16, "prompts.rows": 6},
    **{"calibrate.rows": 8, "gates": {}},
}
# As many rows as choose the neurons well: a fit to a few leaves weights so large that float32 feels them in the merge.
CUT = {"heal.rows": 32, "student.ffn_rows": 96}
REDUCED: dict[str, dict[str, Any]] = {
    "answer": {
        **{**CALLS, "student.ffn": None},
        "temperature": {"files": ["data/train.jsonl"], "skip": 2000, "rows": 24},
    },
    "chain": {**CALLS, "student.ffn": None, "chain.0.ffn": None},
    # every way of cutting but the FFNs', which test_build.py cuts
    "pocket": {**CALLS, "student.ffn": None, "tune.rows": 16},
    "rationale": WORDS,
    "rounds": {**CALLS, "student.ffn": None},
    "think": WORDS,
}
SWEPT = {**CALLS, **CUT, "sweep": {"student.ffn": [768], "distill.loss.kd": [0.0, 0.7]}}
ROWS = 10  # of each suite
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def reduced(name: str, folder: Path) -> Path:
    """Copy a recipe and keep the first rows of what it is scored on."""
    copy_recipe(name, folder)
    for suite in ("dev", "holdout", "ood"):
        path = folder / "data" / f"{suite}.jsonl"
        if path.exists():
            path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:ROWS]))
    return folder


def test_every_recipe_is_built_here() -> None:
    assert set(packaged()) == {
        "quickstart",
        "draft",
        "safety",
        "sweep",
        *REDUCED,
    }  # the others: in files of their own, and below


@pytest.mark.parametrize("name", sorted(REDUCED))
def test_a_recipe_builds_and_says_whether_its_method_helped(name: str, tmp_path: Path, shared_store: Store) -> None:
    session = prepare(reduced(name, tmp_path / name), overrides=REDUCED[name], store=Store(shared_store.root))
    plan = session.plan.only(session.plan.match("evaluate"))  # speed and packages: test_build.py
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []
    data = collect(session)
    recipe = session.recipe
    arms = [f"student@{arm}" for arm in recipe.compare] + ["gold-sft"] * recipe.baselines.gold_sft
    arms += ["before-rounds"] * bool(recipe.round)
    assert arms  # it compares itself with what one would do without it
    of_links = [f"{name}@link-{at}" for at, link in enumerate(recipe.chain, 1) for name in ("student", *link.targets)]
    assert bool(of_links) == bool(recipe.chain)  # the packaged chain ships its link, too
    scored = [name for name, suite in recipe.suites.items() if suite.metric != "perplexity"]
    for model in ("teacher", "student", *arms, *recipe.targets, *of_links):
        found = data.model(model)
        assert found is not None
        assert {suite: found.suites[suite].score.n for suite in scored} == dict.fromkeys(scored, ROWS)  # pyright: ignore[reportOptionalMemberAccess]
    assert {(one.other, one.suite) for one in data.comparisons} == {(arm, s) for arm in arms for s in scored}
    told = " ".join(verdict_notes(data))
    for one in data.comparisons:
        low, high = one.figure.low, one.figure.high
        assert low is not None and high is not None and one.figure.n == ROWS
        assert one.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
        assert f"[{low:+.3f}, {high:+.3f}], n = {ROWS}: {one.verdict}" in told
    assert [(one.step, one.kind) for one in data.rounds] == [
        (f"round-{number}", one.kind) for number, one in enumerate(recipe.round, 1)
    ]
    if recipe.generate.style == "think":
        thinking = data.model("teacher").suites["holdout"].thinking  # pyright: ignore[reportOptionalMemberAccess]
        assert thinking is not None and thinking["n"] == ROWS
    if recipe.temperature:
        assert data.temper["fitted_rows"] == 12 and 0.25 <= data.temper["temperature"] <= 4
        assert not data.temper["helped"] or data.temper["max_logit_difference"] < 1e-4
    if recipe.chain:
        sizes = [found.size for found in map(data.model, ("teacher", "student")) if found]
        assert sizes[0] and sizes[1] and sizes[0] / sizes[1] > 3


def test_the_sweep_prints_its_table_and_verdicts(tmp_path: Path, shared_store: Store) -> None:
    folder = reduced("sweep", tmp_path / "sweep")

    def swept(*more: str) -> subprocess.CompletedProcess[str]:
        changes = [part for key, value in SWEPT.items() for part in ("--set", f"{key}={toml(value)}")]
        command = [sys.executable, "-m", "edgedistill", "sweep", str(folder), *changes, *more]
        environment = {**os.environ, "EDGEDISTILL_STORE": str(shared_store.root)}
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    table = swept().stdout
    lines = json.loads(swept("--json").stdout)
    assert [line["values"] for line in lines] == [
        {"student.ffn": 768, "distill.loss.kd": kd} for kd in SWEPT["sweep"]["distill.loss.kd"]
    ]
    assert all(line["scores"]["dev"]["n"] == ROWS and line["size"] and line["tg"] for line in lines)
    assert any(line["best"] for line in lines) and lines[0]["difference"] is None
    found, verdict = lines[1]["difference"], lines[1]["verdict"]
    assert verdict == ("helped" if found["low"] > 0 else "hurt" if found["high"] < 0 else "undecided")
    assert verdict in table and f"[{found['low']:+.3f}, {found['high']:+.3f}]" in table
    for kd in SWEPT["sweep"]["distill.loss.kd"]:
        session = prepare(
            folder, overrides={**SWEPT, "student.ffn": 768, "distill.loss.kd": kd}, store=Store(shared_store.root)
        )
        plan = session.plan.only(session.plan.match("evaluate/laptop-x86"))
        assert Runner(plan, session.store).build().ran == []


def toml(value: Any) -> str:
    """Write a value for ``--set``."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
