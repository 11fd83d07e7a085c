"""Check the data of the recipe ``reasoning``: its generator makes it, its sums are right, and nothing leaks."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Any

import pytest

from edgedistill.recipes.reasoning import make_data

# Whoever changes the data changes them here too, and says so.
DIGESTS = {
    "dev": "64a888a27c16f0baed62c42fdc7d4c33c3d8781093090acd098740c9aed986c6",
    "holdout": "f2ef9238061b07a951694cf38a66613971799622d59742b3f9ccad342fb3ee41",
    "ood": "7779968c7509973c1b38059703a04e52128c797052e0398ffad907762e245016",
    "prompts": "bebabe7b4d67694eca5efdf8958142987b4cf394d21e074fc1b10bd5c0a3a56d",
    "train": "b98f6779db0498a76ef8427ec35c4631332fee56cbf13c3f98195401d670f1ae",
}
SIZES = {"train": 1500, "prompts": 400, "dev": 160, "holdout": 400, "ood": 400}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (make_data.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_shipped_file_has_the_committed_digest(name: str) -> None:
    assert hashlib.sha256((make_data.HERE / "data" / f"{name}.jsonl").read_bytes()).hexdigest() == DIGESTS[name]
    assert len(rows(name)) == SIZES[name]


@pytest.mark.reasoning
def test_the_generator_makes_the_shipped_files() -> None:
    assert make_data.main(["--check"]) == 0
    assert set(DIGESTS) == set(make_data.SIZES)


def test_every_step_is_right_and_the_last_is_the_answer() -> None:
    for row in rows("train"):
        steps = re.findall(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)\.", row["rationale"])
        assert steps and row["rationale"].count("=") == len(steps)
        for left, sign, right, result in steps:
            assert OPERATIONS[sign](int(left), int(right)) == int(result), row["id"]
        assert steps[-1][3] == row["reference"], row["id"]


def test_no_step_uses_a_number_from_nowhere() -> None:
    tens = {"10", *map(str, range(1, 6))}  # products are parted into tens and ones
    for row in rows("train"):
        task = row["tags"][0]
        known = set(re.findall(r"\d+", row["prompt"])) | (tens if task == "products" else set())
        known |= {"2", "4", "6", "8"} if task == "leg_counting" else set()
        for left, _, right, result in re.findall(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)\.", row["rationale"]):
            assert {left, right} <= known, row["id"]
            known.add(result)


def test_only_train_says_how() -> None:
    assert all("rationale" in row for row in rows("train"))
    assert not any("rationale" in row for name in SIZES if name != "train" for row in rows(name))


@pytest.mark.reasoning
def test_verifiers_take_the_references_and_nothing_near_them() -> None:
    from edgedistill.evals.reasoning import credit

    for name in SIZES:
        for row in rows(name)[::7]:
            assert credit(row["reference"], row["reasoning_gym"]) == 1.0
            assert credit(str(int(row["reference"]) + 1), row["reasoning_gym"]) < 1.0


def test_no_problem_stands_twice() -> None:
    prompts = [row["prompt"] for name in SIZES for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def test_ood_has_what_train_has_not() -> None:
    def kind(row: dict[str, Any]) -> tuple[str, int]:
        made = row["reasoning_gym"]["metadata"]
        return row["tags"][0], made.get("num_terms", made.get("num_animals", 0))

    taught, ood, new = ({kind(row) for row in rows(name)} for name in ("train", "ood", "holdout"))
    assert not taught & ood
    assert new <= taught


def test_one_answer_for_all_is_no_way() -> None:
    for name in ("holdout", "ood"):
        answers = [row["reference"] for row in rows(name)]
        assert max(map(answers.count, set(answers))) / len(answers) < 0.1
