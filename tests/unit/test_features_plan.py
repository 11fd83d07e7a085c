"""Hidden states of the teacher in the plan: beside the student or stored, in every link."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.recipes import copy_recipe
from edgedistill.refusals import refuse
from tests.unit.test_plan import changed, make, make_inputs, stages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_features_keep_the_teacher_beside_the_student_and_plan_says_what_that_takes(folder: Path) -> None:
    plain, plan = make(folder), make(folder, distill__features__weight=2.0)
    (adapt,), (distill,), (before,) = (
        one.match(name) for one, name in ((plan, "adapt"), (plan, "distill/1"), (plain, "distill/1"))
    )
    assert adapt.key in distill.stage.inputs() and adapt.key not in before.stage.inputs()
    assert plan.match("score")[0].key in distill.stage.inputs()  # the distributions are still the stored draws
    assert distill.memory > before.memory and distill.work.amount > before.work.amount
    assert any("distill.features keeps the teacher beside the student: about 256.6 MiB" in one for one in plan.warnings)
    names = changed(plain, plan)
    assert "distill/1" in names and "distill/gold-sft" not in names
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape", "heal"})
    assert changed(plan, make(folder, distill__features__weight=2.0, distill__features__distance="cosine")) >= {
        "distill/1"
    }
    off = make(folder, distill__features={"weight": 0.0, "pairs": [[99, 99]]})
    assert changed(plain, off) == set() and not any("features" in one for one in off.warnings)
    related = make(folder, distill__features={"weight": 0.0, "relations": {"distances": 25.0, "angles": 50.0}})
    assert adapt.key in related.match("distill/1")[0].stage.inputs()


def test_stored_states_are_a_step_of_their_own_and_the_teacher_is_not_beside(folder: Path) -> None:
    live, plan = make(folder, distill__features={"weight": 2.0}), make(folder, distill__features={"cached": True})
    (states,), (distill,), (adapt,) = (plan.match(name) for name in ("states", "distill/1", "adapt"))
    assert states.key in distill.stage.inputs() and adapt.key not in distill.stage.inputs()
    assert adapt.key in states.stage.inputs() and states.disk > 0
    assert distill.memory < live.match("distill/1")[0].memory
    assert not any("keeps the teacher beside the student" in one for one in plan.warnings)
    again = make(folder, distill__features={"cached": True, "distance": "cosine"}, distill__seed=7)
    assert again.match("states")[0].key == states.key and again.match("distill/1")[0].key != distill.key
    few = make(folder, distill__features={"cached": True, "pairs": [[19, 9], [29, 14]]})
    assert few.match("states")[0].stage.fields()["layers"] == (19, 29)
    with pytest.raises(RecipeError, match="keeps the teacher beside the student") as error:
        make(folder, distill__features={"cached": True}, score__kind="dense")
    assert error.value.key == "distill.features.cached"


def test_features_are_matched_in_every_link_of_a_chain(folder: Path) -> None:
    chain: dict[str, Any] = {"chain": [{"layers": 20}], "student__layers": 10}
    plan = make(folder, **chain, distill__features__pairs=[[19, 9]])
    (one,), (two,) = plan.match("distill/1"), plan.match("distill/2")
    assert plan.match("adapt")[0].key in one.stage.inputs() and plan.match("merge/1")[0].key in two.stage.inputs()
    with pytest.raises(
        RecipeError, match=r"\[20, 9\] is no pair of layers: the teacher's are 0 to 19, the student's 0 to 9"
    ):
        make(folder, **chain, distill__features__pairs=[[20, 9]])


def test_a_teacher_whose_layers_nobody_knows_has_no_features(folder: Path) -> None:
    """A server tells no layers, nor does a config.json in other words."""
    given = make_inputs(folder, distill__features={})
    facts = dataclasses.replace(given.teacher.facts, layers=0)
    teacher = dataclasses.replace(given.teacher, facts=facts)
    with pytest.raises(RecipeError, match=r"are not known, and distill\.features compares") as error:
        refuse(dataclasses.replace(given, teacher=teacher))
    assert error.value.key == "distill.features"
