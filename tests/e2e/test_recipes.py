"""Every packaged recipe builds, reduced in rows and steps: same model, same code path, and nothing runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.recipes import copy_recipe, packaged
from edgedistill.report import collect
from edgedistill.runner import Runner
from edgedistill.session import prepare
from edgedistill.store import Store

REDUCED: dict[str, dict[str, Any]] = {
    # As many rows as choose the neurons well: a fit to a few leaves weights so large that float32 feels them in the merge.
    "think": {"adapt.rows": 96, "heal.rows": 96, "student.ffn_rows": 96, "prompts.rows": 16, "calibrate.rows": 8},
}
ROWS = 12  # of each suite
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_every_recipe_is_built_here() -> None:
    assert set(packaged()) == {"quickstart", "draft", *REDUCED}  # they have test_build.py, test_draft_recipe.py


@pytest.mark.parametrize("name", sorted(REDUCED))
def test_a_recipe_builds_and_says_what_it_found(name: str, tmp_path: Path, shared_store: Store) -> None:
    folder = copy_recipe(name, tmp_path / name)
    for suite in ("holdout", "ood"):
        path = folder / "data" / f"{suite}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:ROWS]))
    session = prepare(folder, overrides=REDUCED[name], store=Store(shared_store.root))
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(session.plan, session.store).build().ran == []
    data = collect(session)
    for model in ("teacher", "student", "gold-sft", *session.recipe.targets):
        found = data.model(model)
        assert found is not None
        assert all(found.suites[suite].score is not None for suite in ("holdout", "ood"))
    against = [one for one in data.differences if (one.before, one.after) == ("gold-sft", "student")]
    assert {one.suite for one in against} == {"holdout", "ood"}
    for one in against:
        low, high = one.figure.low, one.figure.high
        assert low is not None and high is not None
        assert one.noticed == ("gain" if low > 0 else "loss" if high < 0 else "")
    if session.recipe.generate.style == "think":
        thinking = data.model("teacher").suites["holdout"].thinking  # pyright: ignore[reportOptionalMemberAccess]
        assert thinking is not None and thinking["n"] == ROWS
