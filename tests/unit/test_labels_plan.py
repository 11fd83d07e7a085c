"""Labels that cannot be meant are refused, and what they change is in the keys of the steps that they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.recipes import copy_recipe
from edgedistill.stages.evaluate import Evaluate
from edgedistill.stages.label_filter import LabelFilter
from tests.unit.test_plan import changed, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("classify", tmp_path / "classify")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"labels__names": ["one"]}, r"labels\.names"),
        ({"labels__names": ["Log in", "log  in!"]}, r"labels\.names: 'Log in' and 'log  in!' are the same"),
        ({"labels__names": ["a", " b"]}, r"labels\.names"),
        ({"labels__names": ["delivery", "refund"]}, r"the reference '\w+' is none of labels\.names"),
        ({"labels__by": "majority", "labels__smoothing": 1.0}, r"labels\.smoothing: this is for by = \"samples\""),
        ({"generate__samples": 1}, r"labels\.by: one sample of each prompt is no distribution"),
        ({"generate__style": "think"}, r"generate\.style: a label is a whole answer"),
        (
            {"filter": [{"kind": "reference", "metric": "exact"}]},
            r"filter\[0\]\.kind: reference chooses among the labels",
        ),
        ({"filter": [{"kind": "agreement", "metric": "exact"}]}, r"filter\[0\]\.kind: agreement chooses"),
        (
            {"filter": [{"kind": "pii", "otherwise": "hedge", "hedge": "?"}]},
            r"filter\[0\]\.otherwise: a hedge is no label",
        ),
        ({"distill__curriculum": "length"}, r"distill\.curriculum: it orders single rows"),
        ({"heal__curriculum": "length"}, r"heal\.curriculum: it orders single rows"),
        ({"labels": None}, r"suites\.holdout\.metric: which labels are there\?"),
    ],
)
def test_labels_that_cannot_be_meant(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, **overrides)


def test_a_reference_that_is_no_label_is_named_with_its_row(folder: Path) -> None:
    path = folder / "data" / "ood.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "reference": "other"})]) + "\n")
    with pytest.raises(RecipeError, match=r"row 'ood-0419': the reference 'other' is none of labels\.names") as error:
        make(folder)
    assert "suites.ood.metric" in str(error.value)


def test_what_labels_change(folder: Path) -> None:
    plan = make(folder)
    stage = plan.match("filter")[0].stage
    assert isinstance(stage, LabelFilter)
    assert (stage.by, stage.smoothing, len(stage.labels)) == ("samples", 0.0, 7)
    evaluation = plan.match("evaluate/student")[0].stage
    assert isinstance(evaluation, Evaluate)
    assert evaluation.labels == stage.labels
    untouched = {"adapt", "evaluate/teacher", "generate", "shape", "heal"}
    ways: tuple[dict[str, Any], ...] = ({"labels__by": "majority"}, {"labels__smoothing": 0.5})
    for keys in ways:
        found = changed(plan, make(folder, **keys))
        assert {"filter", "distill/1", "evaluate/student"} <= found
        assert not untouched & found
    # other names are other probabilities: models are evaluated anew, answers are not asked anew
    names = [*stage.labels[:-1], "cancel", "other"]
    found = changed(plan, make(folder, labels__names=names))
    assert {"evaluate/teacher", "filter"} <= found
    assert "adapt" not in found


def test_other_recipes_have_no_labels_in_their_keys(tmp_path: Path) -> None:
    plan = make(copy_recipe("think", tmp_path / "think"))
    for step in plan.steps:
        assert "labels" not in step.stage.fields()
