"""What is kept of several answers that are labels: each label once, with its share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.labels import most_frequent, read_label, shares
from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.stages.label_filter import LabelFilter
from tests.unit.stages.test_filter import run

NAMES = ("Billing", "a", "log in")


def stage(*ids: str, filters: tuple[dict[str, Any], ...] = (), **more: Any) -> LabelFilter:
    rows = tuple(
        Row(id=name, messages=({"role": "user", "content": f"ticket {name}"},), reference="Billing") for name in ids
    )
    fields = {"by": "samples", "smoothing": 0.0, **more}
    return LabelFilter(answers=Key("a" * 64), rows_digest="", filters=filters, rows=rows, labels=NAMES, **fields)


SAMPLES = [
    *[("x", "billing", "stop"), ("x", " Billing.", "stop"), ("x", "A", "stop"), ("x", "Billing", "stop")],
    *[("x", "a parcel", "stop"), ("x", "Billing", "length")],  # no label, and did not end: neither counts
    *[("y", "Log  in", "stop")] * 2,
    *[("z", "no idea", "stop")] * 2,
]


def test_labels_are_read_but_for_case_punctuation_and_spacing() -> None:
    assert [read_label(text, NAMES) for text in ("BILLING!", '"log  in"', "A.", "login", "", "billing a")] == [
        *("Billing", "log in", "a", None, None, None)
    ]


def test_shares_are_of_the_answers_that_are_labels(tmp_path: Path) -> None:
    facts, read = run(tmp_path, stage("x", "y", "z"), SAMPLES)
    kept = [(one["id"], one["prompt"], one["text"], one["weight"]) for one in read("kept.jsonl")]
    assert kept == [("x", "x", "Billing", 0.75), ("x#1", "x", "a", 0.25), ("y", "y", "log in", 1.0)]
    assert facts["yields"][-1] == {"filter": "labels", "in": 9, "out": 6}
    assert facts["kept"] == 3
    assert [one["why"] for one in read("rejected.jsonl")] == ["did not end", *["no label"] * 3]
    told = facts["labels"]
    assert (told["prompts"], told["split"], told["answers"]) == (2, 1, 3)
    assert told["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2)
    assert told["shares"] == pytest.approx({"Billing": 0.375, "a": 0.125, "log in": 0.5})


def test_smoothing_gives_every_label_a_share_of_what_was_answered(tmp_path: Path) -> None:
    gold = ({"kind": "pii", "metric": "exact", "otherwise": "gold"},)
    _, read = run(tmp_path, stage("x", "y", "z", smoothing=0.5, filters=gold), SAMPLES)
    kept = {(one["prompt"], one["text"]): (one["weight"], one["source"]) for one in read("kept.jsonl")[:-1]}
    total = {"x": 4 + 1.5, "y": 2 + 1.5}
    assert kept == {
        ("x", "Billing"): (3.5 / total["x"], "teacher"),
        ("x", "a"): (1.5 / total["x"], "teacher"),
        ("x", "log in"): (0.5 / total["x"], "smoothing"),
        ("y", "Billing"): (0.5 / total["y"], "smoothing"),
        ("y", "a"): (0.5 / total["y"], "smoothing"),
        ("y", "log in"): (2.5 / total["y"], "teacher"),
    }
    last = read("kept.jsonl")[-1]  # no label was given: nothing is smoothed, the reference is taught, and whole
    assert (last["id"], last["text"], last["source"], "weight" in last) == ("z", "Billing", "gold", False)


def test_the_majority_is_one_row_of_each_prompt(tmp_path: Path) -> None:
    _, read = run(
        tmp_path, stage("x", "y", by="majority"), [*SAMPLES[:4], ("y", "a", "stop"), ("y", "billing", "stop")]
    )
    assert [(one["text"], one["weight"]) for one in read("kept.jsonl")] == [("Billing", 1.0), ("a", 1.0)]
    assert most_frequent(["b", "a", "a", "b"]) == "b"  # of equals the one drawn first


def test_no_labels_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="is one of the labels"):
        run(tmp_path, stage("z"), [("z", "who knows", "stop")])


def test_shares_of_nothing_are_nothing() -> None:
    assert shares([], NAMES, 1.0) == {}
    assert shares(["a"], NAMES) == {"a": 1.0}
    assert sum(shares(["a", "a", "log in"], NAMES, 0.3).values()) == pytest.approx(1.0)
