"""Targets whose matrices have types of their own share one table, and another size asks the model nothing anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.recipes import copy_recipe
from tests.unit.test_plan import changed, make

ONNX = "laptop-x86-onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def auto(name: str, size: str) -> dict[str, Any]:
    return {f"quantize__{name}__type": "auto", f"quantize__{name}__size": size, f"quantize__{name}__imatrix": True}


def test_targets_share_the_table_and_a_size_reruns_the_choice(folder: Path) -> None:
    phone: dict[str, Any] = {"quantize__phone-midrange__embedding_type": None, **auto("phone-midrange", "60 MiB")}
    plan = make(folder, **phone, **auto("laptop-x86", "80 MiB"))
    (table,) = plan.match("sensitivity")
    merged, gguf = plan.match("merge")[0].key, plan.match("convert/student")[0].key
    assert {merged, gguf} < set(table.stage.inputs())
    for name in ("phone-midrange", "laptop-x86"):
        (choice,), (file,) = plan.match(f"allocate/{name}"), plan.match(f"quantize/{name}")
        assert table.key in choice.stage.inputs() and {choice.key, table.key} < set(file.stage.inputs())
    other = make(folder, **phone, **auto("laptop-x86", "81 MiB"))
    assert changed(plan, other) == {
        f"{stage}/laptop-x86" for stage in ("allocate", "quantize", "evaluate", "measure", "package")
    }
    assert not any(step.stage.name in ("sensitivity", "allocate") for step in make(folder).steps)


def test_what_the_student_writes_itself_is_shared_by_all_that_calibrates(folder: Path) -> None:
    sized = auto("laptop-x86", "80 MiB")
    plain, plan = make(folder, **sized), make(folder, **sized, calibrate__general=8)
    assert not any(step.stage.name == "converse" for step in plain.steps)
    (own,), (gguf,) = plan.match("converse"), plan.match("convert/student")
    assert set(own.stage.inputs()) == {gguf.key}
    for name in ("calibrate", "sensitivity"):
        (step,) = plan.match(name)
        assert own.key in step.stage.inputs()
    untouched = {"generate", "filter", "distill/1", "merge", "convert/student", "quantize/laptop-x86-onnx"}
    assert not changed(plain, plan) & untouched and "quantize/phone-midrange" in changed(plain, plan)


def test_conversations_that_no_target_goes_by_are_warned_of(folder: Path) -> None:
    alone: dict[str, Any] = {"targets": [ONNX], "quantize": {}, "tune": None, "gates": {}}
    told = "calibrate.general: it is for GGUF targets, and the recipe has none"
    assert told in make(folder, **alone, calibrate__general=8).warnings
    assert told not in make(folder, **alone).warnings + make(folder, calibrate__general=8).warnings


def test_a_size_that_no_choice_meets_is_refused(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no type brings this student under 20 MiB: the smallest choice makes about \d+"
    ):
        make(folder, **auto("laptop-x86", "20 MiB"))


def onnx(**types: Any) -> dict[str, Any]:
    return {f"quantize__{ONNX}__{key}": value for key, value in types.items()}


def test_onnx_targets_round_on_kept_rows_and_share_a_table_of_their_own(folder: Path) -> None:
    plain = make(folder)
    (kept,), (merged,) = plain.match("filter"), plain.match("merge")
    rounded = make(folder, **onnx(type="int4", rounding="gptq"))
    (file,) = rounded.match(f"quantize/{ONNX}")
    assert set(file.stage.inputs()) == {kept.key, merged.key}
    own = {f"{stage}/{ONNX}" for stage in ("quantize", "evaluate", "measure", "package")}
    assert changed(plain, rounded) == own
    assert changed(rounded, make(folder, **onnx(type="int4", rounding="gptq", symmetric=False))) == own
    chosen = make(folder, **onnx(type="auto", size="90 MiB"))
    (table,), (choice,) = chosen.match("sensitivity-onnx"), chosen.match(f"allocate/{ONNX}")
    (file,) = chosen.match(f"quantize/{ONNX}")
    assert set(table.stage.inputs()) == {kept.key, merged.key}
    assert {choice.key, table.key, merged.key} == set(file.stage.inputs())
    assert not any(step.stage.name == "sensitivity" for step in chosen.steps)
    (said,) = (line for line in chosen.warnings if "does not look at" in line)
    assert said.startswith(f'{ONNX}: type = "auto" does not look at pp512') and "kernels" not in said  # they are GGUF's


def test_what_onnx_cannot_reach_or_make_is_refused(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"no type brings this student under 20 MiB: the smallest choice makes about \d+"
    ):
        make(folder, **onnx(type="auto", size="20 MiB"))
    with pytest.raises(RecipeError, match=r"hidden size of 576 has 9 blocks of 64"):
        make(folder, **onnx(type="mixed", block=64))
