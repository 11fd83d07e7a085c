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


def fresh(folder: Path) -> Path:
    (folder / "fresh").mkdir()
    return folder / "fresh"


SCORED = [
    *[("x", '{"Billing": 9, "a": 7, "log in": 1}', "stop"), ("x", '{"Billing": 5, "a": 7, "log in": 1}', "stop")],
    *[("x", '{"Billing": 9, "a": 7}', "stop"), ("x", "Billing", "stop")],
    *[("x", '{"Billing": 9, "a": 7, "log in": 11}', "stop"), ("x", '{"Billing": 9, "a"', "length")],
    *[("y", "nothing fits", "stop")] * 2,
]


def test_scores_of_several_answers_are_averaged_into_one_row_of_each_label(tmp_path: Path) -> None:
    facts, read = run(tmp_path, stage("x", "y", by="scores", scale=2.0, least=0.1), SCORED)
    kept = [(one["id"], one["prompt"], one["text"], one["weight"], one["source"]) for one in read("kept.jsonl")]
    # both have a mean of 7; that of "log in" is 6 points less, e^-3 times the share, which is under least
    assert kept == [("x", "x", "Billing", 0.5, "teacher"), ("x#1", "x", "a", 0.5, "teacher")]
    assert [one["why"] for one in read("rejected.jsonl")] == [
        *("did not end", "no score for log in", "no JSON object of scores"),
        *("a score for log in that is not from 0 to 10", *["no JSON object of scores"] * 2),
    ]
    assert facts["yields"][-1] == {"filter": "labels", "in": 7, "out": 2}
    told = facts["labels"]
    assert (told["by"], told["prompts"], told["split"], told["answers"]) == ("scores", 1, 1, 2)
    assert told["entropy"] == pytest.approx(math.log(2))
    assert told["shares"] == pytest.approx({"Billing": 0.5, "a": 0.5, "log in": 0.0})
    _, read = run(fresh(tmp_path), stage("x", by="scores", scale=2.0), SCORED[:1])
    total = 1 + math.exp(-1) + math.exp(-4)
    assert {one["text"]: one["weight"] for one in read("kept.jsonl")} == pytest.approx(
        {"Billing": 1 / total, "a": math.exp(-1) / total, "log in": math.exp(-4) / total}
    )


def test_orders_of_several_answers_are_averaged(tmp_path: Path) -> None:
    samples = [
        *[("x", '["a", "Billing", "log in"]', "stop"), ("x", "billing > log in", "stop"), ("x", "a", "stop")],
        ("y", "no idea", "stop"),
    ]
    gold = ({"kind": "pii", "metric": "exact", "otherwise": "gold"},)
    facts, read = run(tmp_path, stage("x", "y", by="ranking", decay=0.5, first=2, filters=gold), samples)
    *kept, last = [(one.get("prompt"), one["text"], one.get("weight"), one["source"]) for one in read("kept.jsonl")]
    weights = {text: weight for _, text, weight, _ in kept}
    assert weights == pytest.approx({"Billing": 1 / 2, "a": 1 / 3, "log in": 1 / 6})
    assert last == (None, "Billing", None, "gold")
    assert [one["why"] for one in read("rejected.jsonl")] == ["an order of 1 of 2 labels", "no label: no idea"]
    assert (facts["labels"]["split"], facts["labels"]["prompts"]) == (1, 1)


def test_probabilities_are_the_shares(tmp_path: Path) -> None:
    said = '{"Billing": 0.75, "a": 0.249, "log in": 0.001}'
    _, read = run(tmp_path, stage("x", by="logits", least=0.01), [("x", said, "stop")])
    assert {one["text"]: one["weight"] for one in read("kept.jsonl")} == pytest.approx(
        {"Billing": 0.75 / 0.999, "a": 0.249 / 0.999}
    )


def test_why_no_answer_does_as_it_is_asked_is_told(tmp_path: Path) -> None:
    samples = [("x", "Billing", "stop"), ("x", "a", "stop"), ("x", '{"Billing": 1}', "stop")]
    with pytest.raises(StepFailed, match=r"none of 3 answers .* most often \(2\): no JSON object of scores") as failed:
        run(tmp_path, stage("x", by="scores", scale=2.0), samples)
    assert "labels.guided" in failed.value.hint
    with pytest.raises(StepFailed, match=r"says something of all labels \(labels.by = \"ranking\"\) passed"):
        run(fresh(tmp_path), stage("x", by="ranking", decay=0.5), [("x", "a", "length")])
