"""The recipe ``safety``, reduced: rates of each kind with their n, what every filter let through, and what balance brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.augmenters import REFUSING
from edgedistill.data.filters import refuses
from edgedistill.evals.stance import stance_of
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect
from edgedistill.report_sheets import stances_sheet, verdict_notes
from edgedistill.runner import Runner
from edgedistill.session import prepare
from edgedistill.store import Store
from tests.e2e.conftest import read_jsonl
from tests.e2e.test_recipes import toml

REDUCED: dict[str, Any] = {
    **{"teacher.min_score": {}, "adapt.rows": 64, "heal.rows": 32, "prompts.rows": 12, "calibrate.rows": 8},
    "gates": {},
}
KINDS = {"help": 8, "refuse": 4, "ask": 4}  # rows of each suite's file
SUITES = {"harmful": ("refuse",), "harmless": ("help",), "ambiguous": ("ask",), "ood": ("help", "refuse", "ask")}
ARM = "student@helpful rows alone"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_balanced_recipe_tells_how_often_each_kind_is_taken_the_right_way(
    tmp_path: Path, shared_store: Store
) -> None:
    folder = copy_recipe("safety", tmp_path / "safety")
    for name in ("holdout", "ood"):
        path = folder / "data" / f"{name}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[: sum(KINDS.values())]))
    whole = (folder / "recipe.toml").read_text()
    uncut = whole.replace("ffn      = 1184\nffn_rows = 200\n", "")  # test_build.py cuts FFNs
    assert uncut != whole
    (folder / "recipe.toml").write_text(uncut)
    session = prepare(folder, overrides=REDUCED, store=Store(shared_store.root))
    plan = session.plan.only(session.plan.match("evaluate"))  # speed and packages: test_build.py
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []

    def entry(step: str) -> Any:
        return session.store.load(session.plan.match(step)[0].key)

    for model in ("teacher", "student", "phone-midrange", "gold-sft", ARM):
        found = entry(f"evaluate/{model}")
        for suite, kinds in SUITES.items():
            summary = found.facts["suites"][suite]
            wanted = summary["stances"]["wanted"]
            assert set(wanted) == set(kinds) and summary["n"] == sum(KINDS[kind] for kind in kinds)
            lines = read_jsonl(found.path / "answers" / f"{suite}.jsonl")
            for kind, shares in wanted.items():
                of_kind = [line for line in lines if kind in line["tags"]]
                for took, share in shares.items():
                    assert share["method"] == "wilson" and share["n"] == len(of_kind) == KINDS[kind]
                    assert 0 <= share["low"] <= share["value"] <= share["high"] <= 1 and share["high"] > share["low"]
                    assert round(share["value"] * share["n"]) == sum(one["details"]["took"] == took for one in of_kind)
                right = sum(one["score"] for one in of_kind) / KINDS[kind]
                assert shares[kind]["value"] == pytest.approx(right)
            assert summary["stances"]["tags"].keys() == {tag for line in lines for tag in line["tags"]}

    filtered = entry("filter")
    yields = filtered.facts["yields"]
    assert [one["filter"] for one in yields] == ["ended", "reference", "refusals", "pii", "duplicates"]
    assert yields[0]["in"] == REDUCED["prompts.rows"] * session.recipe.generate.samples
    assert all(before["out"] == after["in"] for before, after in pairwise(yields))
    assert json.loads((filtered.path / "yields.json").read_text()) == yields
    tags = {row["id"]: row["tags"] for row in read_jsonl(folder / "data" / "train.jsonl")}
    kept = read_jsonl(filtered.path / "kept.jsonl")
    assert kept
    for line in kept:  # what is taught refuses where it should, and only there
        of = tags[line["id"].partition("#")[0]]
        assert stance_of(line["text"]) in of and (REFUSING in of or not refuses(line["text"])), line
    assert {"help", "refuse"} <= {tag for line in kept for tag in tags[line["id"].partition("#")[0]]}
    only_help = read_jsonl(entry("filter@helpful rows alone").path / "kept.jsonl")
    assert all("help" in tags[line["id"].partition("#")[0]] for line in only_help)

    data = collect(session)
    assert {(one.other, one.suite) for one in data.comparisons} == {
        (other, suite) for other in (ARM, "gold-sft") for suite in SUITES
    }
    told = " ".join(verdict_notes(data))
    for one in data.comparisons:
        low, high, n = one.figure.low, one.figure.high, sum(KINDS[kind] for kind in SUITES[one.suite])
        assert low is not None and high is not None and one.figure.n == n
        assert one.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
        assert f"{one.suite} {one.figure.value:+.3f} [{low:+.3f}, {high:+.3f}], n = {n}: {one.verdict}" in told
    rates = stances_sheet(data)
    assert {(row[0], row[1]) for row in rates.rows} == {(m.label, s) for m in data.models for s in SUITES}

    changes = [part for key, value in REDUCED.items() for part in ("--set", f"{key}={toml(value)}")]
    command = [sys.executable, "-m", "edgedistill", "report", str(folder), *changes]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(shared_store.root), "COLUMNS": "400"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "filters: " + ", ".join(f"{one['filter']} {one['out']} of {one['in']}" for one in yields) in printed
    assert "helps, refuses, asks back" in printed and f"n = {KINDS['refuse']}" in printed
