"""What ``init`` copies is complete by itself, though the package holds each data file once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from edgedistill.fingerprint import file_digest
from edgedistill.recipes import HERE, copy_recipe, packaged, taken
from tests.unit.test_plan import make

NEEDED = {"reasoning": pytest.mark.reasoning}  # what a recipe cannot be planned without


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDED.get(name, ())) for name in packaged()])
def test_init_writes_all_that_the_recipe_needs(name: str, tmp_path: Path) -> None:
    folder = copy_recipe(name, tmp_path / name)
    plan = make(folder)  # reads every file that the recipe names, and refuses leaks between them
    assert plan.packages
    for file in taken(name):
        assert (folder / file).is_file()
    assert not list(folder.rglob("*.py"))


@pytest.mark.parametrize("name", packaged())
def test_what_is_taken_lies_in_one_place(name: str) -> None:
    for file, source in taken(name).items():
        assert source.is_file(), source
        assert not (HERE / name / file).exists(), f"{name} has a {file} of its own"


def test_the_package_holds_each_data_file_once() -> None:
    digests = Counter(file_digest(path) for path in HERE.glob("*/data/*") if path.is_file())
    assert max(digests.values()) == 1


def test_files_are_taken_beside_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import edgedistill.recipes.think as recipe

    monkeypatch.setattr(recipe, "TAKES", {"quickstart": ("grammar.gbnf", "data/general.jsonl")}, raising=False)
    folder = copy_recipe("think", tmp_path / "think")
    assert (folder / "data" / "train.jsonl").read_bytes() == (HERE / "think" / "data" / "train.jsonl").read_bytes()
    for file in ("grammar.gbnf", "data/general.jsonl"):
        assert (folder / file).read_bytes() == (HERE / "quickstart" / file).read_bytes()
