"""An order of the rows in the plan: what it makes anew, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.prompts import Row, load_rows, rows_digest
from edgedistill.errors import RecipeError, UsageError
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.stages.filter import Filter
from tests.unit.test_plan import changed, make, stages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_an_order_makes_anew_what_is_trained_in_it(folder: Path) -> None:
    plain = make(folder)
    assert changed(plain, make(folder, distill__curriculum="none", heal__curriculum="none")) == set()
    names = changed(plain, make(folder, distill__curriculum="length"))
    assert {"distill/1", "distill/gold-sft", "merge"} <= names
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape", "heal"})
    assert "heal" in changed(plain, make(folder, heal__curriculum="loss"))
    for name, changes in (("distill/1", {}), ("heal", {})):
        (step,) = make(folder, **changes).match(name)
        assert "curriculum" not in step.stage.training  # pyright: ignore[reportAttributeAccessIssue]


def test_references_alone_have_no_teacher_to_be_sure(folder: Path) -> None:
    names = changed(make(folder), make(folder, distill__curriculum="confidence"))
    assert "distill/1" in names and "distill/gold-sft" not in names


def evolve(folder: Path, file: str) -> None:
    path = folder / "data" / file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "evolution": at % 2}) + "\n" for at, row in enumerate(rows)))


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"distill__curriculum": "loss", "distill__epochs": 0.5}, "distill.curriculum", "hardest rows would never"),
        ({"heal__curriculum": "length", "heal__epochs": 0.9}, "heal.curriculum", "hardest rows would never"),
        ({"distill__curriculum": "confidence", "score__kind": "dense"}, "distill.curriculum", "stores no"),
        ({"heal__curriculum": "confidence"}, "heal.curriculum", "have no distributions of the teacher"),
        ({"distill__curriculum": "evolution"}, "distill.curriculum", r"no row of prompts\.files has"),
        ({"heal__curriculum": "evolution"}, "heal.curriculum", r"no row of heal\.files has"),
        ({"distill__curriculum": "size"}, "distill.curriculum", "length"),
    ],
)
def test_an_order_that_cannot_be_is_refused_with_its_key(
    folder: Path, changes: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        make(folder, **changes)
    assert key in str(error.value) and error.value.hint


def test_rows_tell_their_round_of_evolution(folder: Path) -> None:
    plain = make(folder)
    evolve(folder, "train.jsonl")
    plan = make(folder, distill__curriculum="evolution", heal__curriculum="evolution")
    assert {"filter", "distill/1"} <= changed(plain, plan)


def test_a_round_of_evolution_is_a_whole_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "one", "evolution": 2}\n{"id": "b", "prompt": "two"}\n')
    first, second = load_rows(path)
    assert (first.evolution, second.evolution) == (2, None)
    assert first.to_json()["evolution"] == 2 and "evolution" not in second.to_json()
    assert rows_digest([first]) != rows_digest([Row(id="a", messages=first.messages)])
    for wrong in ("-1", "true", '"2"', "1.5"):
        path.write_text(f'{{"prompt": "one", "evolution": {wrong}}}\n')
        with pytest.raises(UsageError, match=r"rows\.jsonl:1: evolution must be a whole number from 0"):
            load_rows(path)


def test_the_filter_hands_the_round_on_and_writes_nothing_where_there_is_none(tmp_path: Path) -> None:
    message = ({"role": "user", "content": "wake me"},)
    rows = (Row(id="a", messages=message, evolution=2), Row(id="b", messages=message))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": row.id, "text": "{}", "finish": "stop", "row": row.id}) + "\n" for row in rows)
    )
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(), rows=rows)
    ctx: Any = SimpleNamespace(progress=lambda *_: None, out=tmp_path, path=lambda key, name: tmp_path / name)
    stage.run(ctx)
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [line.get("evolution") for line in lines] == [2, None] and "evolution" not in lines[1]
