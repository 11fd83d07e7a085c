"""Rows that do not fit a model's context are refused with file and line before anything runs, and cost an ordinary plan nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill import refusals_length
from edgedistill.chat import read_chat
from edgedistill.errors import RecipeError
from edgedistill.inputs import Inputs
from edgedistill.models import Resolved
from edgedistill.recipes import copy_recipe
from edgedistill.refusals import refuse
from edgedistill.refusals_length import refuse_long
from edgedistill.target import find_target
from tests.unit.formats.gguf.conftest import make_tokenizer
from tests.unit.test_plan import make_inputs

LONG = "turn the volume up " * 600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def here(folder: Path, *, context: int = 4096, student: int | None = None, **overrides: Any) -> Inputs:
    """Return inputs whose models have a tokenizer here; the student's context may be another."""
    make_tokenizer(folder / "model")
    inputs = make_inputs(folder, **{"baselines.few_shot": 0, **overrides})

    def model(size: int) -> Resolved:
        facts = dataclasses.replace(inputs.teacher.facts, context=size, template=True)
        return dataclasses.replace(inputs.teacher, path=folder / "model", facts=facts)

    return dataclasses.replace(inputs, teacher=model(context), student=model(student or context))


def write(folder: Path, name: str, *prompts: str, reference: str = "{}") -> str:
    path = folder / "data" / name
    rows = [{"id": f"r{at}", "prompt": prompt, "reference": reference} for at, prompt in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return f"data/{name}"


def holdout(file: str) -> dict[str, Any]:
    return {"suites.holdout.files": [file]}


def rows_of(table: str, file: str) -> dict[str, Any]:
    return {f"{table}.files": [file], f"{table}.rows": None}


SHORT = [f"say {number}" for number in range(20)]


@pytest.mark.parametrize(
    ("key", "room"),
    [("adapt", ""), ("prompts", " and 64 new ones"), ("heal", ""), ("suites.holdout", " and 40 new ones")],
)
def test_a_row_beyond_the_context_is_told_with_its_line_and_its_tokens(folder: Path, key: str, room: str) -> None:
    file = write(folder, "long.jsonl", *SHORT, LONG)
    changes: dict[str, Any] = {f"{key}.files": [file]}
    if not key.startswith("suites"):
        changes[f"{key}.rows"] = None
    with pytest.raises(RecipeError) as error:
        refuse(here(folder, **changes))
    said = str(error.value)
    assert f"recipe.toml: {key}.files: " in said and f"{file}:21: row 'r20': " in said
    assert f" tokens{room} do not fit the context of x of 4096" in said
    assert "shorten it" in error.value.hint


def test_the_count_is_the_one_that_the_model_makes(folder: Path) -> None:
    from tokenizers import Tokenizer

    file = write(folder, "long.jsonl", *SHORT, LONG)
    inputs = here(folder, **holdout(file))
    text = read_chat(inputs.teacher).render(inputs.suites["holdout"][20].messages)
    tokens = len(Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).encode(text).ids)
    with pytest.raises(RecipeError, match=f" {tokens} tokens and 40 new ones do not fit"):
        refuse_long(here(folder, context=tokens + 39, **holdout(file)))
    assert refuse_long(here(folder, context=tokens + 40, **holdout(file))) == []


def test_examples_before_a_prompt_count(folder: Path) -> None:
    file = write(folder, "long.jsonl", *SHORT, LONG)
    changes: dict[str, Any] = {"adapt.files": [file], "adapt.rows": None, "baselines.few_shot": 21}
    assert len(here(folder, **changes).gold) == 21
    with pytest.raises(RecipeError, match=r"holdout\.jsonl:\d+: .* tokens and 40 new ones do not fit") as error:
        refuse_long(here(folder, context=4700, **changes))
    assert "whose 21 examples stand before it" in error.value.hint
    assert refuse_long(here(folder, context=4700, **{**changes, "baselines.few_shot": 0})) == []


def test_what_fits_the_teacher_may_be_too_long_for_another_student(folder: Path) -> None:
    file = write(folder, "long.jsonl", *SHORT, LONG)
    changes: dict[str, Any] = {"prompts.files": [file], "prompts.rows": None}
    assert refuse_long(here(folder, context=65536, **changes)) == []
    with pytest.raises(RecipeError, match="and 2 new ones do not fit the context of x of 1000"):
        refuse_long(here(folder, context=65536, student=1000, **changes))


def test_a_reference_may_be_the_long_half(folder: Path) -> None:
    file = write(folder, "long.jsonl", *SHORT, reference=LONG)
    with pytest.raises(RecipeError, match=r"row 'r1?\d': \d+ tokens do not fit"):
        refuse_long(here(folder, **rows_of("adapt", file)))
    suites = {"kept": {"files": [file], "metric": "perplexity"}}
    with pytest.raises(RecipeError, match=r"suites\.kept\.files: .*: \d+ tokens do not fit"):
        refuse_long(here(folder, suites=suites, gates={}, teacher__min_score={}))


def test_the_rows_that_are_timed_have_to_fit_the_context_of_the_timing(folder: Path) -> None:
    first, last = write(folder, "first.jsonl", LONG, *SHORT), write(folder, "last.jsonl", *SHORT, LONG)
    with pytest.raises(RecipeError, match="and 32 new ones do not fit the context in which speed is measured of 2048"):
        refuse_long(here(folder, context=65536, **holdout(first)))
    inputs = here(folder, context=65536, **holdout(last))
    assert refuse_long(inputs) == []
    targets = tuple(find_target(name, folder) for name in ("phone-midrange", "laptop-x86"))
    (warning,) = refuse_long(dataclasses.replace(inputs, targets=targets))
    assert f"{last}:21: row 'r20': " in warning and "phone-midrange" in warning
    assert "no such device could answer them" in warning


def test_ordinary_rows_are_not_encoded_and_of_long_ones_a_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def count(path: Path) -> Any:
        return lambda text: asked.append(text) or 1

    monkeypatch.setattr(refusals_length, "_encoder", count)
    assert refuse_long(here(folder)) == [] and asked == []
    many = write(folder, "many.jsonl", *(f"{LONG} {number}" for number in range(100)))
    assert refuse_long(here(folder, **rows_of("heal", many))) == []
    assert len(asked) == 2 * refusals_length.CHECKED  # a prompt and a reference of each


def test_a_model_whose_tokenizer_is_not_here_refuses_no_row(folder: Path) -> None:
    file = write(folder, "long.jsonl", *SHORT, LONG)
    inputs = make_inputs(folder, **holdout(file))
    assert inputs.teacher.path.suffix == ".toml"  # no model
    assert refuse_long(inputs) == []


def test_one_turn_of_a_trace_stands_where_the_trace_does(folder: Path) -> None:
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "ok"}]
    (folder / "data" / "traces.jsonl").write_text("\n" + json.dumps({"id": "t", "messages": [*turns, *turns]}) + "\n")
    inputs = here(folder)
    recipe = inputs.recipe.model_copy(
        update={
            "generate": inputs.recipe.generate.model_copy(update={"style": "tool-trace"}),
            "heal": inputs.recipe.heal
            and inputs.recipe.heal.model_copy(update={"files": (Path("data/traces.jsonl"),)}),
        }
    )
    row = dataclasses.replace(inputs.healing[0], id="t/2", trace="t")
    from edgedistill.inputs import placed

    found = placed(dataclasses.replace(inputs, recipe=recipe), "heal.files", row)
    assert found.endswith("data/traces.jsonl:2: row 't/2'")
