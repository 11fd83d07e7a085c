"""Tuning after quantizing in the plan: what it changes, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.recipes import copy_recipe
from tests.tuned import TUNE
from tests.unit.test_plan import changed, make, write_chat

BLOCKS: dict[str, Any] = {"tune": TUNE, "tune__parts": "weights", "tune__general": {"files": ["chat.jsonl"]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_tuned_blocks_change_the_step_that_tunes_and_what_follows(folder: Path) -> None:
    write_chat(folder)
    norms, plan = make(folder, tune=TUNE), make(folder, **BLOCKS)
    assert changed(norms, plan) == {f"{step}/phone-midrange" for step in ("tune", "evaluate", "measure", "package")}
    (before,), (after,) = (one.match("tune/phone-midrange") for one in (norms, plan))
    assert after.memory > before.memory and after.work.amount > before.work.amount
    fewer = {**BLOCKS, "tune__general": {"files": ["chat.jsonl"], "rows": 15}}
    assert changed(plan, make(folder, **fewer)) == changed(norms, plan)
    assert changed(norms, make(folder, tune=TUNE, tune__parts="norms", tune__code_lr=1.5e-3)) == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tune__parts": "weights"}, "name rows of other text"),
        ({"tune__code_lr": 1e-2}, "code_lr is of tuned blocks"),
        ({"tune__general": {"files": ["chat.jsonl"]}}, "general is of tuned blocks"),
        ({**BLOCKS, "tune__weight_decay": 0.1}, "leave weight_decay out"),
        ({**BLOCKS, "tune__lr": 1e-2}, "set code_lr, scale_lr or norm_lr"),
        ({**BLOCKS, "tune__general": {"files": ["chat.jsonl"], "rows": 9}}, "9 general rows are too few"),
        ({**BLOCKS, "tune__rows": 4}, "8 rows are too few to tune weights on"),
        ({"tune__rows": 4}, "8 rows are too few to tune norms on"),
        (
            {**BLOCKS, "tune__general": {"files": ["data/general.jsonl"]}},
            "stands in the training rows and in the suite",
        ),
        ({**BLOCKS, "tune__general": {"files": ["chat.jsonl"], "rows": [5, 5]}}, "has 2 counts for 1 files"),
        ({**BLOCKS, "tune__targets": ["laptop-x86-onnx"]}, "weights are tuned in GGUF files"),
        (
            {**BLOCKS, "tune__targets": ["laptop-x86"], "quantize__laptop-x86__type": "F16"},
            "no matrix of laptop-x86 in F16 has blocks",
        ),
    ],
)
def test_blocks_that_cannot_be_tuned_are_refused(folder: Path, overrides: dict[str, Any], message: str) -> None:
    write_chat(folder)
    with pytest.raises(RecipeError, match=message) as caught:
        make(folder, **{"tune": TUNE, **overrides})
    assert "tune" in str(caught.value) or "suites" in str(caught.value)
