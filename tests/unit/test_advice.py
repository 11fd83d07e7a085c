"""What ``plan`` tells of a recipe before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.advice import advise
from edgedistill.inputs import Inputs, read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.target import find_target
from tests.unit.test_plan import FACTS


def inputs(tmp_path: Path, *, student: dict[str, Any] | None = None, **overrides: Any) -> Inputs:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    path = copy_recipe("quickstart", folder) / "recipe.toml"
    recipe = load_recipe(path, {key.replace("__", "."): value for key, value in overrides.items()})

    def resolved(facts: dict[str, Any]) -> Resolved:
        return Resolved(source="x", kind="pypi", revision="1", digest="d", path=path, facts=ModelFacts(**facts))

    targets = [find_target(name, folder) for name in recipe.targets]
    return read_inputs(recipe, path, resolved(FACTS), resolved({**FACTS, **(student or {})}), targets)


def test_what_to_expect_by_the_size_and_the_family(tmp_path: Path) -> None:
    (narrow, *_) = advise(inputs(tmp_path))
    assert "87 million parameters, 1/1.5 of the teacher's" in narrow and "85 to 95 %" in narrow
    small: dict[str, Any] = {"student__layers": 4, "student__ffn": 512, "student__vocabulary": 4096}
    assert "60 to 80 %" in advise(inputs(tmp_path, **small))[0]
    other = advise(
        inputs(
            tmp_path, student={"tokenizer": "another"}, student__ffn=None, student__vocabulary=None, student__layers=20
        )
    )
    assert "70 to 85 %" in other[0]
    whole = inputs(tmp_path, student__ffn=None, student__vocabulary=None)
    assert not any("parameters" in line for line in advise(whole))


def test_quantizing_alone_is_said_where_the_teacher_fits(tmp_path: Path) -> None:
    assert not any("fits" in line for line in advise(inputs(tmp_path)))  # the quickstart shows it already
    found = advise(inputs(tmp_path, baselines={}))
    assert any(
        "phone-midrange" in line and "of 600 MiB" in line and "quantizing it alone may do" in line for line in found
    )
    assert not any("laptop-x86-onnx" in line for line in found)


def test_a_recipe_that_measures_no_forgetting_is_told(tmp_path: Path) -> None:
    assert not any("forgets" in line for line in advise(inputs(tmp_path)))
    suites = {"holdout": {"files": ["data/holdout.jsonl"], "metric": "exact"}}
    found = advise(inputs(tmp_path, suites=suites, gates={}, teacher__min_score={}))
    assert any('no suite has metric = "perplexity"' in line for line in found)
