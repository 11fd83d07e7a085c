"""What a package says it is made of: the same however it was asked for, and everything that had a say in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgedistill import session as sessions
from edgedistill.artifact import model_card
from edgedistill.expand import expand
from edgedistill.inputs import sources
from edgedistill.model_facts import ModelFacts
from edgedistill.models import HubFile, Resolved
from edgedistill.plan import Plan, closure
from edgedistill.recipes import copy_recipe
from edgedistill.session import Session, prepare
from edgedistill.stages.package import Package
from edgedistill.store import Store
from tests.tuned import TUNE
from tests.unit.stages.test_package_draft import manifest
from tests.unit.test_plan import FACTS


@pytest.fixture(autouse=True)
def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the real model: a plan never opens it."""

    def resolved(recipe: Any, path: Path, *rest: Any) -> tuple[list[Resolved], Resolved]:
        return [model(path)], model(path)

    monkeypatch.setattr(sessions, "_models", resolved)


def model(path: Path, source: str = "pypi:x", **facts: Any) -> Resolved:
    known = ModelFacts(**{**FACTS, **facts})
    return Resolved(source=source, kind="pypi", revision="1", digest="d" * 64, path=path, facts=known)


def planned(recipe: Path, *targets: str, **changes: Any) -> Session:
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return prepare(recipe, targets=targets, overrides=overrides, store=Store(recipe / "store"))


def packages(plan: Plan) -> dict[str, Package]:
    by_key = plan.by_key
    return {name: stage for name, key in plan.packages.items() if isinstance(stage := by_key[key].stage, Package)}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("quickstart", {}),
        ("quickstart", {"tune": TUNE, "draft": {"targets": ["phone-midrange", "laptop-x86"]}}),
        # one file for two targets: its steps have two names each
        ("quickstart", {f"quantize__{name}": {"type": "Q8_0"} for name in ("phone-midrange", "laptop-x86")}),
        ("chain", {"compare": {}}),
    ],
)
def test_a_manifest_names_what_is_upstream_and_the_same_whatever_else_is_planned(
    recipe: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_recipe(recipe, tmp_path / "r")
    whole = planned(folder, **changes).plan
    for name, stage in packages(whole).items():
        assert set(stage.upstream.values()) == closure(stage.inputs(), whole.by_key)
        assert f"quantize/{name}" in stage.upstream and f"package/{name}" not in stage.upstream
        alone = planned(folder, name.partition("@")[0], **changes).plan
        assert len(alone.steps) < len(whole.steps)
        same = packages(alone)[name]
        assert same.key() == stage.key() and dict(same.upstream) == dict(stage.upstream)


def test_sources_are_all_that_had_a_say_in_the_text(tmp_path: Path) -> None:
    session = planned(copy_recipe("quickstart", tmp_path / "r"))
    judge, grader = model(tmp_path, "hf:own/judge"), model(tmp_path, "hf:own/grader", licence=None, quantized_from=None)
    rows = HubFile(source="hf:own/set/a.jsonl", revision="7", digest="e" * 64, path=tmp_path)
    inputs = replace(session.inputs, judge=judge, graders={"hf:own/grader": grader}, data=(rows,))
    found = sources(inputs)
    assert [(one["role"], one["source"]) for one in found] == [
        ("teacher", "pypi:x"),
        ("student", "pypi:x"),
        ("judge", "hf:own/judge"),
        ("filter", "hf:own/grader"),
        ("data", "hf:own/set/a.jsonl"),
    ]
    assert all(list(stage.sources) == found for stage in packages(expand(inputs)).values())
    card = model_card(replace(manifest({}), sources=found), grammar=False)
    told = [line for line in card.splitlines() if " revision " in line]
    assert told == [
        f"- derived from `pypi:x` revision 1 (sha256 {'d' * 16}…), licence apache-2.0, dequantized from Q4_1",
        f"- answers judged by `hf:own/judge` revision 1 (sha256 {'d' * 16}…), licence apache-2.0, dequantized from Q4_1",
        f"- answers filtered by `hf:own/grader` revision 1 (sha256 {'d' * 16}…), licence unknown",
        f"- rows of `hf:own/set/a.jsonl` revision 7 (sha256 {'e' * 16}…)",
    ]
