"""Prompts by a template, and rows picked by split and tags: in files, in a recipe, and at the command line."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.columns import Columns, template_problem
from edgedistill.data.prompts import load_rows, rows_digest
from edgedistill.errors import RecipeError, UsageError
from edgedistill.inputs import read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import load_recipe
from edgedistill.recipe_base import Tabled
from edgedistill.recipes import copy_recipe
from tests.unit.test_plan import FACTS


def write(folder: Path, text: str, name: str = "a.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_template_takes_columns_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, 'id,a.b,note,gold,tags\n1,"{x} {a.b}",,7,t\n2,cats,hm,,\n')
    columns = Columns(template="Tell {{of}} {a.b}: {note}", reference="gold", system="Be {brief}.")
    first, second = load_rows(path, columns=columns)
    assert [one["content"] for one in first.messages] == ["Be {brief}.", "Tell {of} {x} {a.b}: "]
    assert (first.id, first.reference, first.tags) == ("1", "7", ("t",))
    assert second.reference is None  # an empty cell
    record = {"id": "1", "a.b": "{x} {a.b}", "note": None, "gold": 7, "tags": ["t"]}
    (other,) = load_rows(write(tmp_path, json.dumps(record), "a.jsonl"), columns=columns)
    assert rows_digest([other]) == rows_digest([first])


def test_a_template_makes_columns_of_anyones_form_its_own(tmp_path: Path) -> None:
    record = {
        "instruction": "Add.",
        "context": "1 2",
        "response": "3",
        "prompt": "old",
        "output": "x",
        "split": "train",
    }
    path = write(tmp_path, json.dumps(record), "dolly.jsonl")
    (row,) = load_rows(path, columns=Columns(template="{context}|{instruction}|{prompt}", reference="response"))
    assert (row.messages[0]["content"], row.reference, row.split) == ("1 2|Add.|old", "3", "train")
    (alpaca,) = load_rows(
        write(tmp_path, '{"instruction": "a", "output": "b"}', "b.jsonl"), columns=Columns(system="Be brief.")
    )
    assert ([one["role"] for one in alpaca.messages], alpaca.reference) == (["system", "user"], "b")


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, 'topic,gold\n"a\nb",x\ncats,y\n')
    for columns in (Columns(template="{topics}"), Columns(template="{topic}", reference="gould")):
        with pytest.raises(UsageError, match=r"a.csv:2: .*, and there is none") as caught:
            load_rows(path, columns=columns)
        assert "'topic', 'gold'" in caught.value.hint
    path = write(tmp_path, '{"topic": ["a"]}', "a.jsonl")
    with pytest.raises(UsageError, match=r"a.jsonl:1: the column 'topic' is no text"):
        load_rows(path, columns=Columns(template="{topic}"))


@given(st.text(max_size=20), st.dictionaries(st.sampled_from(["a", "b"]), st.text(max_size=5), min_size=2))
def test_any_text_can_stand_around_a_column(text: str, record: dict[str, str]) -> None:
    template = text.replace("{", "{{").replace("}", "}}") + "{a}{b}"
    assert template_problem(template) is None
    assert Columns(template=template).fill(record, "x:1")["prompt"] == text + record["a"] + record["b"]


def test_picking(tmp_path: Path) -> None:
    text = "id,prompt,split,tags,reference\na,x,train,t,y\nb,x,train,u;v,\nc,x,test,t,y\n"
    path = write(tmp_path, text)

    def ids(**picked: Any) -> list[str]:
        return [row.id for row in load_rows(path, columns=Columns(**picked))]

    assert ids(split="train") == ["a", "b"]
    assert ids(tags=("t", "v")) == ["a", "b", "c"]
    assert ids(split="train", tags=("v",)) == ["b"]
    assert [row.id for row in load_rows(path, columns=Columns(split="test"), need_reference=True)] == ["c"]
    with pytest.raises(UsageError, match=r"a.csv:3: row 'b' has no reference"):
        load_rows(path, columns=Columns(split="train"), need_reference=True)
    with pytest.raises(UsageError, match='no row has the split "dev"') as caught:
        ids(split="dev")
    assert caught.value.hint == 'There are: "train" (2), "test" (1).'
    with pytest.raises(UsageError, match="one of the tags 'u'") as caught:
        ids(split="test", tags=("u",))
    assert caught.value.hint == 'There are: "t" (1).'


def test_the_keys_of_a_recipe_are_those_of_its_readers() -> None:
    assert tuple(one.name for one in fields(Columns)) == Tabled.READ


# ── in a recipe ──


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart") / "recipe.toml"


def inputs(path: Path, **overrides: Any) -> Any:
    table = {key.replace("__", "."): value for key, value in overrides.items()}
    model = Resolved(source="path:m", kind="path", revision="1", digest="d", path=path, facts=ModelFacts(**FACTS))
    return read_inputs(load_recipe(path, table), path, model, model, ())


def test_one_table_serves_all(recipe: Path) -> None:
    lines = ["topic,gold,split"]
    lines += [f"{split} {number},g,{split}" for split in ("train", "test") for number in range(20)]
    write(recipe.parent, "\n".join(lines), "all.csv")
    table = {"files": ["all.csv"], "template": "On {topic}.", "reference": "gold"}
    more = {f"{name}__{key}": value for name in ("prompts", "adapt", "heal") for key, value in table.items()}
    more |= {f"{name}__split": "train" for name in ("prompts", "adapt", "heal")}
    more |= {f"{name}__rows": 5 for name in ("prompts", "adapt", "heal")}
    suite = {**table, "split": "test", "metric": "exact"}
    found = inputs(recipe, **more, suites={"holdout": suite}, gates={}, teacher__min_score={}, prompts__system="Hm.")
    assert [row.messages[-1]["content"] for row in found.prompts] == [f"On train {at}." for at in range(5)]
    assert found.prompts[0].messages[0] == {"role": "system", "content": "Hm."}
    assert found.gold[0].messages[0]["role"] == "user"
    assert [row.split for row in found.suites["holdout"]] == ["test"] * 20


def test_how_rows_are_read_is_in_no_key_beside_their_digest(recipe: Path) -> None:
    plain, read = (load_recipe(recipe, more) for more in ({}, {"adapt.split": "train", "adapt.system": "Hm."}))
    assert plain.adapt and read.adapt and read.adapt.split == "train"
    assert plain.adapt.keyed("files", "rows") == read.adapt.keyed("files", "rows")
    assert not set(Tabled.READ) & set(plain.adapt.keyed())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompts.template": "no column"}, "every prompt is the same"),
        ({"prompts.template": "a {} b"}, "names no column"),
        ({"prompts.template": "a {b"}, "name a column in braces"),
        ({"prompts.template": "a {b!r}"}, "taken as it is"),
        ({"suites.holdout.template": "a {b:>3}"}, "taken as it is"),
        ({"heal.files": [], "heal.rows": None, "heal.split": "train"}, "are about files"),
    ],
)
def test_what_cannot_work_is_refused_with_the_recipe(recipe: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_a_file_that_does_not_follow_a_key_is_refused_under_it(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompts.split: .*train.jsonl:1: row '.*' has no split"):
        inputs(recipe, prompts__split="train")
    with pytest.raises(RecipeError, match=r"suites.holdout.template: .*holdout.jsonl:1: template takes the column"):
        inputs(recipe, suites__holdout__template="{nothing}")
