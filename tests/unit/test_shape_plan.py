"""The shape of the student in the plan: its size, what it is chosen by, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.inputs import cut_rows, student_facts, taught_rows
from edgedistill.recipes import copy_recipe
from tests.unit.test_plan import changed, make, make_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_the_shape_of_the_student(folder: Path) -> None:
    facts = student_facts(make_inputs(folder))
    assert (facts.layers, facts.ffn, facts.vocab) == (30, 1024, 12800)
    facts = student_facts(make_inputs(folder, student__layers=[0, 1, 29], student__ffn=704))
    assert (facts.layers, facts.ffn) == (3, 704)
    facts = student_facts(make_inputs(folder, student__hidden=512))
    assert (facts.hidden, facts.heads, facts.head) == (512, 9, 64)
    assert facts.config()["head_dim"] == 64


def test_a_narrower_ffn_is_a_smaller_student_chosen_by_the_rows_that_heal_it(folder: Path) -> None:
    whole = make_inputs(folder, student__ffn=None)
    narrow = make_inputs(folder, student__ffn=704, student__ffn_rows=60)
    assert (student_facts(narrow).layers, student_facts(narrow).ffn) == (30, 704)
    cut = student_facts(whole).params() - student_facts(narrow).params()
    assert cut == 30 * 3 * 576 * (1536 - 704)
    rows = cut_rows(narrow)
    assert len(rows) == 60
    assert rows[0] == narrow.healing[0]
    assert len({row.id.split("-")[0] for row in rows}) == 3  # of all three files
    assert cut_rows(whole) == ()
    plans = [make(folder, student__ffn=704, student__ffn_rows=count) for count in (60, 61)]
    names = changed(*plans)
    assert {"shape", "heal", "distill/1"} <= names
    assert names.isdisjoint({"adapt", "generate", "filter", "score", "evaluate/teacher"})


def test_a_smaller_hidden_size_is_a_smaller_student_and_changes_no_key_until_it_is_used(folder: Path) -> None:
    whole, narrow = make_inputs(folder), make_inputs(folder, student__hidden=512)
    block = 2 * 64 * (9 + 3) + 3 * 1024 + 2  # parameters a layer for each dimension
    cut = student_facts(whole).params() - student_facts(narrow).params()
    assert cut == 64 * (30 * block + 12800 + 1)
    alone = make_inputs(folder, student__hidden=512, student__ffn=None, student__vocabulary=None)
    assert cut_rows(alone) == cut_rows(whole)
    plain, plan = make(folder), make(folder, student__hidden=512)
    names = changed(plain, plan)
    assert {"shape", "heal", "distill/1"} <= names
    assert names.isdisjoint({"adapt", "generate", "filter", "score", "evaluate/teacher"})
    (shape,) = plain.match("shape")
    assert "hidden" not in shape.stage.fields() and plan.match("shape")[0].memory > shape.memory
    chained = make(folder, chain=[{"hidden": 544}, {"layers": 20}], student__hidden=512)
    stages = {name: step.stage for step in chained.steps for name in step.ids}
    widths = [stages[name].hidden for name in ("shape/1", "shape/2", "shape")]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == [544, None, 512]
    with pytest.raises(RecipeError, match="the hidden size of teacher is 512") as error:
        make(folder, chain=[{"hidden": 512}, {"hidden": 544}])
    assert error.value.key == "chain.1.hidden"


def test_columns_that_k_quants_cannot_pack_are_told(folder: Path) -> None:
    def told(**changes: Any) -> list[str]:
        plan = make(folder, **{"quantize__laptop-x86__type": "Q4_K_M"}, **changes)
        return [one for one in plan.warnings if "laptop-x86:" in one and "no multiple of 256" in one]

    (much,) = told()
    assert "576 columns" in much and "so much of Q4_K_M" in much
    (odd,) = told(student__hidden=480)
    assert "480, 576 columns" in odd and "; hidden = 256 would not" in odd
    (part,) = told(student__hidden=512, student__ffn=1280)
    assert "576 columns are no multiple of 256, so a part of Q4_K_M" in part  # the attention's output
    assert told(student={"head_dim": 128, "heads": 4, "kv_heads": 2}, student__hidden=512, student__ffn=1280) == []


def test_a_trimmed_vocabulary_is_a_smaller_student_chosen_by_all_that_is_taught(folder: Path) -> None:
    whole, small = make_inputs(folder, student__vocabulary=None), make_inputs(folder)
    assert student_facts(small).vocab == 12800
    assert student_facts(whole).params() - student_facts(small).params() == (49152 - 12800) * 576
    assert taught_rows(whole) == ()
    rows = taught_rows(small)
    assert len({row.id for row in rows}) == len(rows)
    assert {row.id for row in (*small.gold, *small.healing, *small.prompts)} == {row.id for row in rows}
    plans = [make(folder, student__vocabulary=size) for size in (16384, 20480)]
    names = changed(*plans)
    assert {"shape", "heal", "distill/1"} <= names
    assert names.isdisjoint({"adapt", "generate", "filter", "score", "evaluate/teacher"})
