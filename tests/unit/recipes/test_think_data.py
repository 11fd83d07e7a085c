"""Check the data of the recipe ``think``: it is what its generator makes, its sums are right, and nothing leaks."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from edgedistill.recipes.think import make_data

OPERATIONS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
    "divided by": lambda a, b: a / b,
}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (make_data.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


def question(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def test_the_generator_makes_the_shipped_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_data.main(["--check"]) == 0
    assert {name: len(rows(name)) for name in make_data.SIZES} == make_data.SIZES


@pytest.mark.parametrize("name", sorted(make_data.SIZES))
def test_every_step_is_right_and_the_last_is_the_answer(name: str) -> None:
    for row in rows(name):
        steps = re.findall(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.", row["rationale"])
        assert len(steps) >= 2
        for left, operation, right, result in steps:
            assert OPERATIONS[operation](int(left), int(right)) == int(result), row["id"]
        assert steps[-1][3] == row["reference"]
        known = set(re.findall(r"\d+", question(row))) | {"2"}  # "twice"
        for left, _, right, result in steps:
            assert {left, right} <= known, row["id"]  # a number of the problem, or of an earlier step
            known.add(result)


def test_no_problem_stands_in_two_files_and_no_wording_of_ood_is_taught() -> None:
    seen: dict[str, str] = {}
    for name in make_data.SIZES:
        for row in rows(name):
            assert seen.setdefault(question(row), name) == name
            seen[question(row)] = name
    taught, ood = ({re.sub(r"\d+", "#", row["tags"][0]) for row in rows(name)} for name in ("train", "ood"))
    assert not taught & ood


def test_copying_the_nearest_training_answer_is_no_way() -> None:
    def words(row: dict[str, Any]) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", question(row).lower()))

    train = [(words(row), row["reference"]) for row in rows("train")]
    for name in ("holdout", "ood"):
        right = 0
        for row in rows(name)[:120]:
            own = words(row)
            nearest = max(train, key=lambda one: len(own & one[0]) / len(own | one[0]))
            right += nearest[1] == row["reference"]
        assert right / 120 < 0.3
