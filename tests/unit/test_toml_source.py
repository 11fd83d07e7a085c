"""Every mistake in a TOML file is named with its line, its key and what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgedistill.errors import RecipeError, UsageError
from edgedistill.toml_lines import key_lines
from edgedistill.toml_source import (
    apply_overrides,
    key_error,
    load_toml,
    parse_override,
    read_text,
    schema,
    split_dotted,
    with_line,
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Strict):
    rank: int = Field(default=16, gt=0)


class Distill(Strict):
    method: Literal["lora", "full"] = "lora"
    lr: float = 2e-4
    lora: Lora = Lora()

    @field_validator("lr")
    @classmethod
    def small(cls, lr: float) -> float:
        if lr > 1:
            raise ValueError("a learning rate above 1 diverges")
        return lr


class Reference(Strict):
    kind: Literal["reference"]


class Length(Strict):
    kind: Literal["length"]
    max_tokens: int


class Student(Strict):
    layers: int | list[int] | Literal["all"] = "all"


class Recipe(Strict):
    name: str
    seed: int = 0
    deterministic: bool = True
    targets: tuple[str, ...] = ()
    distill: Distill = Distill()
    student: Student = Student()
    filter: list[Annotated[Reference | Length, Field(discriminator="kind")]] = []
    quantize: dict[str, Lora] = {}
    data: Path | None = None

    @model_validator(mode="after")
    def seed_is_even(self) -> Recipe:
        if self.seed % 2:
            raise key_error("seed", "seeds are even here")
        return self


def load(text: str, **overrides: Any) -> Recipe:
    return load_toml(Path("r.toml"), Recipe, text=text, overrides=overrides)


def refused(text: str, **overrides: Any) -> str:
    with pytest.raises(RecipeError, match=r"r\.toml|--set") as caught:
        load(text, **overrides)
    return str(caught.value)


def test_valid_recipe_loads_with_defaults() -> None:
    recipe = load('name = "a"\ntargets = ["x"]\ndata = "d.jsonl"\n[distill]\nlr = 1\n')
    assert recipe.targets == ("x",)
    assert recipe.distill.lr == 1.0
    assert recipe.distill.lora.rank == 16
    assert recipe.data == Path("d.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a"\n[distill]\nlern = 1\nlr_ = 2e-4\n', 'r.toml:4: distill.lr_: unknown key; did you mean "lr"?'),
        ('name = "a"\nlr = 2e-4\n', "r.toml:2: lr: unknown key; it belongs at distill.lr"),
        ('name = "a"\n[distill]\nlr = "2e-4"\n', 'r.toml:3: distill.lr: expected a number; found "2e-4" (a string)'),
        ('name = "a"\nseed = 2.0\n', "r.toml:2: seed: expected a whole number; found 2.0 (a number)"),
        ('name = "a"\nseed = true\n', "r.toml:2: seed: expected a whole number; found true (a boolean)"),
        (
            'name = "a"\ndeterministic = "no"\n',
            'r.toml:2: deterministic: expected true or false; found "no" (a string)',
        ),
        ('name = "a"\ndistill = 3\n', "r.toml:2: distill: expected a table; found 3 (a whole number)"),
        ('name = "a"\ntargets = "x"\n', 'r.toml:2: targets: expected a list; found "x" (a string)'),
        (
            'name = "a"\n[distill]\nmethod = "lorra"\n',
            'r.toml:3: distill.method: expected "lora", "full"; found "lorra" (a string); did you mean "lora"?',
        ),
        (
            'name = "a"\n[student]\nlayers = "al"\n',
            'r.toml:3: student.layers: expected a whole number, a list or "all"; found "al" (a string); did you mean',
        ),
        ('name = "a"\n[distill]\nlr = 4.0\n', "r.toml:3: distill.lr: a learning rate above 1 diverges"),
        (
            'name = "a"\n[distill.lora]\nrank = 0\n',
            "r.toml:3: distill.lora.rank: expected a value greater than 0; found 0 (a whole number)",
        ),
        ("seed = 2\n", "r.toml:1: name: this key is missing"),
        ('name = "a"\n\n[[filter]]\nkind = "length"\n', "r.toml:3: filter[0].max_tokens: this key is missing"),
        (
            'name = "a"\n[[filter]]\nkind = "reference"\n[[filter]]\nkind = "lenght"\n',
            'r.toml:4: filter[1]: kind = "lenght" is none of "reference", "length"; did you mean "length"?',
        ),
        (
            'name = "a"\n[[filter]]\nkind = "length"\nmax_token = 3\nmax_tokens = 3\n',
            'r.toml:4: filter[0].max_token: unknown key; did you mean "max_tokens"?',
        ),
        (
            'name = "a"\n[quantize.phone]\nrnk = 3\n',
            'r.toml:3: quantize.phone.rnk: unknown key; did you mean "rank"?',
        ),
        ('name = "a"\nseed = 3\n', "r.toml:2: seed: seeds are even here"),
    ],
)
def test_mistake_names_line_key_and_remedy(text: str, message: str) -> None:
    assert message in refused(text)


def test_all_mistakes_in_one_message_in_order_of_lines() -> None:
    text = 'name = 1\nsed = 2\n[distill]\nlr = "x"\nmetod = "lora"\n'
    said = refused(text).splitlines()
    assert [line.split(": ")[0] for line in said] == ["r.toml:1", "r.toml:2", "r.toml:4", "r.toml:5"]
    with pytest.raises(RecipeError, match="name") as caught:
        load(text)
    assert (caught.value.line, caught.value.key, caught.value.file) == (1, "name", Path("r.toml"))


@pytest.mark.parametrize(
    ("text", "line"),
    [('name = "a"\nlr = 2e-4x\n', 2), ("name = a\n", 1), ('name = "a"\n[distill\n', 2), ('a = [1,\n2\n\nb = "c"', 4)],
)
def test_syntax_error_has_a_line(text: str, line: int) -> None:
    assert f"r.toml:{line}: not valid TOML" in refused(text)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "phone.toml").write_text("")
    with pytest.raises(UsageError, match=r"no such file; did you mean .*phone\.toml"):
        load_toml(tmp_path / "phon.toml", Recipe)
    with pytest.raises(UsageError, match="is a directory"):
        load_toml(tmp_path, Recipe)


def test_binary_file_is_refused_and_byte_order_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"GGUF\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_text(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b'\xef\xbb\xbfname = "a"')
    assert load_toml(tmp_path / "b.toml", Recipe).name == "a"


def test_lines_of_keys_in_every_form_of_toml() -> None:
    text = '''# a comment with = and [brackets]
title = """
[not.a.table]
still = "text" \\""" """
a.b . "c d" = 1   # dotted
inline = { x = 1, y = [1, 2], "z.z" = { w = 'it''s' } }
list = [
  # inside
  "one]",
  { deep = true },

  [1, 2],
]
[[arms]]
kind = "x"
  [arms.sub]
  v = 1979-05-27T07:32:00Z
[[arms]]
[arms.sub]
v = 2
[[arms.leaf]]
q = \'\'\'
'quoted' # text
\'\'\'
r = -inf
[x.y]
[x]
z = 1
'''.replace("'it''s'", "'its'")
    lines = key_lines(text)
    expected: dict[tuple[str | int, ...], int] = {
        ("title",): 2,
        ("a",): 5,
        ("a", "b"): 5,
        ("a", "b", "c d"): 5,
        ("inline", "x"): 6,
        ("inline", "y", 1): 6,
        ("inline", "z.z", "w"): 6,
        ("list",): 7,
        ("list", 0): 9,
        ("list", 1, "deep"): 10,
        ("list", 2): 12,
        ("list", 2, 1): 12,
        ("arms", 0): 14,
        ("arms", 0, "kind"): 15,
        ("arms", 0, "sub"): 16,
        ("arms", 0, "sub", "v"): 17,
        ("arms", 1): 18,
        ("arms", 1, "sub", "v"): 20,
        ("arms", 1, "leaf", 0, "q"): 22,
        ("arms", 1, "leaf", 0, "r"): 25,
        ("x", "y"): 26,
        ("x",): 27,
        ("x", "z"): 28,
    }
    assert {key: lines.get(key) for key in expected} == expected
    assert ("not",) not in lines
    assert ("still",) not in lines


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("distill.lr=1e-4", ("distill.lr", 1e-4)),
        ("student.layers=10", ("student.layers", 10)),
        ('targets=["a", "b"]', ("targets", ["a", "b"])),
        ("student.model=path:models/x", ("student.model", "path:models/x")),
        ("name=true", ("name", True)),
        ("name=a=b", ("name", "a=b")),
        ("name=1\nseed = 3", ("name", "1\nseed = 3")),
    ],
)
def test_override_is_toml_or_text(argument: str, expected: tuple[str, Any]) -> None:
    assert parse_override(argument) == expected


@pytest.mark.parametrize("argument", ["lr", "=3", " = "])
def test_override_without_key_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="not of the form KEY=VALUE"):
        parse_override(argument)


def test_overrides_reach_lists_and_make_tables() -> None:
    data: dict[str, Any] = {"filter": [{"kind": "length", "max_tokens": 1}]}
    apply_overrides(data, {"filter.0.max_tokens": 2, "distill.lora.rank": 4, 'quantize."my phone".rank': 8})
    assert data == {
        "filter": [{"kind": "length", "max_tokens": 2}],
        "distill": {"lora": {"rank": 4}},
        "quantize": {"my phone": {"rank": 8}},
    }
    assert split_dotted("filter[0].kind") == ("filter", 0, "kind")
    assert split_dotted("quantize.raspberry-pi-5.type") == ("quantize", "raspberry-pi-5", "type")
    with pytest.raises(UsageError, match="its items are 0 to 0"):
        apply_overrides(data, {"filter.1.kind": "x"})
    with pytest.raises(UsageError, match="it has no keys"):
        apply_overrides({"seed": 3}, {"seed.x": 1})


def test_a_table_that_is_laid_over_a_recipe_stays_as_the_caller_made_it() -> None:
    table = {"rank": 4}
    data: dict[str, Any] = {}
    apply_overrides(data, {"lora": table, "lora.rank": 8})
    assert data == {"lora": {"rank": 8}} and table == {"rank": 4}


def test_wrong_override_names_the_flag_not_a_line() -> None:
    assert refused('name = "a"\n', **{"distill.lr": "fast"}).startswith(
        '--set distill.lr: expected a number; found "fast" (a string)'
    )
    assert 'did you mean "lr"?' in refused('name = "a"\n', **{"distill.lrr": 1.0})


TABLES = """
name = "a"
[distill]
lr = 1e-4

[[filter]]
kind = "length"
[[filter]]
kind = "reference"
metric = "exact"
"""


@pytest.mark.parametrize(
    ("key", "overrides", "told"),
    [
        ("distill.lr", {}, "{path}:4: distill.lr: no"),
        ("filter.1.metric", {}, "{path}:10: filter.1.metric: no"),
        ("filter.1.max_tokens", {}, "{path}:8: filter.1.max_tokens: no"),  # at its default: its table
        ("distill.lora.rank", {}, "{path}:3: distill.lora.rank: no"),
        ("heal.files", {}, "{path}: heal.files: no"),  # nowhere
        ("distill.lr", {"distill.lr": 1.0}, "--set distill.lr: no"),
        ("filter.1.metric", {"filter.1.metric": "f1"}, "--set filter.1.metric: no"),
        ("distill.lr", {"distill": {"lr": 1.0}}, "--set distill: distill.lr: no"),
        ("distill.lr", {"distill.lora.rank": 2, "heal.lr": 1.0}, "{path}:4: distill.lr: no"),
    ],
)
def test_what_a_plan_refuses_is_told_with_the_line_of_its_key(
    tmp_path: Path, key: str, overrides: dict[str, Any], told: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TABLES)
    found = with_line(RecipeError("no", "hint", file=path, key=key), path, overrides)
    assert str(found) == told.format(path=path) and found.hint == "hint"


def test_the_line_of_a_profile_is_that_of_its_own_file(tmp_path: Path) -> None:
    profile = tmp_path / "laptop.toml"
    profile.write_text('name = "laptop"\n[limits]\nfile_size = "5 MiB"\n')
    error = RecipeError("no", file=profile, key="limits.file_size")
    assert str(with_line(error, tmp_path / "recipe.toml", {"limits": 1})) == f"{profile}:3: limits.file_size: no"


def test_an_error_that_has_its_line_or_no_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for one in (
        RecipeError("no", file=path, line=3, key="distill.lr"),
        RecipeError("no", key="distill.lr"),
        RecipeError("no", file="--set distill.lr", key="distill.lr"),
    ):
        assert with_line(one, path, {}) is one


def test_schema_is_json_schema_that_forbids_unknown_keys() -> None:
    document = schema(Recipe)
    assert document["$schema"].startswith("https://json-schema.org/")
    assert document["additionalProperties"] is False
    assert document["properties"]["seed"]["default"] == 0
