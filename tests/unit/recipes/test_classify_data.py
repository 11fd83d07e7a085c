"""Check the data of the recipe ``classify``: it is what its generator makes, its labels are drawn as it says, and nothing leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import pytest

from edgedistill.recipe import load_recipe
from edgedistill.recipes.classify import make_data

DIGESTS = {
    "train": "96aea9a47f91cb39588441d384b12ae6a4db6896f9496acc68f4a7e47c330cfb",
    "dev": "145f7ae53a0c1ddb1835e09ac9bc85bd5ef67ab81823009fc64aa722d415c654",
    "holdout": "5eebe7689bee7b543c35ba2b72e96dddc72917d34182057ec3bae3588b72f416",
    "ood": "8b4735883059c1a99d2350c7180ddf508638f2a8228fa44315b2e7078b9a22ce",
}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (make_data.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


def message(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def test_the_generator_makes_the_shipped_files() -> None:
    assert make_data.main(["--check"]) == 0
    assert {name: len(rows(name)) for name in make_data.SIZES} == make_data.SIZES
    found = {
        name: hashlib.sha256((make_data.HERE / "data" / f"{name}.jsonl").read_bytes()).hexdigest() for name in DIGESTS
    }
    assert found == DIGESTS


def test_no_message_stands_in_two_files_and_no_wording_of_ood_is_taught() -> None:
    seen: dict[str, str] = {}
    for name in make_data.SIZES:
        assert len({message(row) for row in rows(name)}) == len(rows(name))
        for row in rows(name):
            assert seen.setdefault(message(row), name) == name
    assert not {text for text, _ in make_data.TAUGHT} & {text for text, _ in make_data.NEVER_TAUGHT}


@pytest.mark.parametrize("name", ["train", "holdout", "ood"])
def test_labels_are_drawn_by_the_shares_of_their_wording(name: str) -> None:
    recipe = load_recipe(make_data.HERE / "recipe.toml")
    assert recipe.labels is not None and recipe.labels.names == make_data.LABELS
    assert set(make_data.LABELS) == {row["reference"] for row in rows(name)}
    drawn: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows(name):
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert row["reference"] in row["shares"]
        assert row["tags"] == ["clear" if len(row["shares"]) == 1 else "ambiguous"]
        drawn[json.dumps(row["shares"])][row["reference"]] += 1
    for shares, counts in drawn.items():
        total = counts.total()
        for label, share in json.loads(shares).items():
            error = (share * (1 - share) / total) ** 0.5
            assert abs(counts[label] / total - share) <= 3.5 * error + 1e-9, (shares, counts)
    ambiguous = sum(row["tags"] == ["ambiguous"] for row in rows(name)) / len(rows(name))
    assert 0.2 < ambiguous < 0.4
    best = sum(max(row["shares"].values()) for row in rows(name)) / len(rows(name))
    assert 0.8 < best < 0.9  # what a model that knows the shares gets right
