"""Check the data of the recipe ``code``: its generator makes it, its references pass their tests, and nothing leaks."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Any

import pytest

from edgedistill.evals.execution import at_once, code_of, verdict
from edgedistill.recipes.code import make_data
from edgedistill.recipes.code.steps import STEPS

# Whoever changes the data changes them here too, and says so.
DIGESTS = {
    "dev": "61a58aae24833a23d351c71179d2a1fae18e3cef1a9cbb810c9491a2459a31e1",
    "holdout": "3ae1c31c093c857dd740b910bc23de98e0891bcef224c41610745b667deca125",
    "ood": "78534106b97ee290299e603accac26db573d76acd60c996043eb5fadfd1c9694",
    "prompts": "b2070fd93049fa7b17c8bbfb68f710f66547a7997410c0caeb63d523ea27c098",
    "train": "5cd341aad5961f99104ebe927490b5fe40560d538bbd4f20c866d16888c96d64",
}
SIZES = {"train": 1000, "prompts": 500, "dev": 160, "holdout": 400, "ood": 400}
EVERY = 80  # rows from one that is run here to the next


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (make_data.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


def prompt(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_a_shipped_file_has_the_committed_digest(name: str) -> None:
    assert hashlib.sha256((make_data.HERE / "data" / f"{name}.jsonl").read_bytes()).hexdigest() == DIGESTS[name]
    assert len(rows(name)) == SIZES[name]


def test_the_generator_makes_the_shipped_files() -> None:
    assert make_data.main(["--check"]) == 0
    assert set(DIGESTS) == set(make_data.SIZES)


def failing(chosen: list[dict[str, Any]]) -> list[str]:
    found = at_once(lambda row: verdict(row["reference"], row["tests"]), chosen)
    return [f"{row['id']}: {why}" for row, why in zip(chosen, found, strict=True) if why]


@pytest.mark.sandbox
def test_references_pass_their_tests() -> None:
    assert failing([row for name in SIZES for row in rows(name)[::EVERY]]) == []


@pytest.mark.slow
@pytest.mark.sandbox
def test_every_reference_passes_its_tests() -> None:
    assert failing([row for name in SIZES for row in rows(name)]) == []


@pytest.mark.sandbox
def test_tests_tell_a_task_from_half_of_it() -> None:
    """A line less, and the tests of a row with two fail."""
    chosen = [row for row in rows("holdout") if len(code_of(row["reference"]).splitlines()) == 3][::30]
    assert len(chosen) > 8
    for row in chosen:
        head, first, last = code_of(row["reference"]).splitlines()
        halves = [f"{head}\n{last}", f"{head}\n{first}\n    return {first.split('=')[0].strip()}"]
        assert all(at_once(lambda code, row=row: verdict(code, row["tests"]), halves)), row["id"]


def test_no_prompt_stands_twice() -> None:
    prompts = [prompt(row) for name in SIZES for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def recipe_of(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the lines of a reference without the names and values that differ."""
    _, *lines = code_of(row["reference"]).splitlines()
    argument = re.search(r"\((\w+)\):", row["reference"])
    assert argument

    def value(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith("% 2") else "#"  # even and odd are tasks, not values

    return tuple(
        re.sub(r'% 2 == \d|\d+|"\w"', value, re.sub(rf"\b{argument[1]}\b", "v", line).replace("return", "v ="))
        for line in lines
    )


def test_new_pairs_are_in_no_file_that_teaches() -> None:
    pairs = {name: {(row["tags"][0], *recipe_of(row)) for row in rows(name)} for name in SIZES}
    pairs = {name: {one for one in found if one[0].endswith("-2")} for name, found in pairs.items()}
    taught = pairs["train"] | pairs["prompts"]
    for name in ("dev", "holdout"):
        assert not pairs[name] & taught
        assert len(pairs[name]) > 30
    single = {line for row in rows("train") for line in recipe_of(row)}
    assert {line for name in ("dev", "holdout", "ood") for row in rows(name) for line in recipe_of(row)} <= single


def test_new_names_are_new() -> None:
    def names(name: str) -> set[str]:
        found = (re.search(r"def (\w+)\((\w+)\)", row["reference"]) for row in rows(name))
        return {word for one in found if one for word in (one[1], one[2])}

    for name in ("dev", "holdout", "ood"):
        assert not names(name) & (names("train") | names("prompts"))


def test_no_wording_of_ood_is_taught() -> None:
    for steps in STEPS.values():
        for name, step in steps.items():
            assert not set(step.say) & set(step.ood), name
    every = [step for steps in STEPS.values() for step in steps.values()]
    openings = {wording.partition("{")[0].strip() for step in every for wording in step.ood}
    taught = " ".join(prompt(row) for name in ("train", "prompts") for row in rows(name))
    found = {one for one in openings if len(one.split()) > 2 and one in taught}
    assert found == set()
    frames = {frame.partition("{")[0] for frame in (*make_data.FRAMES, *make_data.OF_ONE)}
    assert not any(prompt(row).startswith(tuple(frames)) for row in rows("ood"))


def test_a_prompt_tells_all_that_a_reference_needs() -> None:
    for name in ("train", "holdout"):
        for row in rows(name):
            head = re.search(r"def (\w+\(\w+\)):", row["reference"])
            assert head and f"`{head[1]}`" in prompt(row)
            for quoted in re.findall(r'"(\w)"', row["reference"]):
                assert f'"{quoted}"' in prompt(row), row["id"]


def test_copying_the_nearest_training_answer_is_no_way() -> None:
    def words(row: dict[str, Any]) -> set[str]:
        return set(re.findall(r"[a-z0-9]+", prompt(row).lower()))

    train = [(words(row), recipe_of(row)) for row in rows("train")]
    for name in ("holdout", "ood"):
        chosen, right = rows(name)[:120], 0
        for row in chosen:
            own = words(row)
            right += max(train, key=lambda one: len(own & one[0]) / len(own | one[0]))[1] == recipe_of(row)
        assert right / len(chosen) < 0.5
