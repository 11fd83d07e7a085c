"""Filters that cannot be meant are refused, and what a filter reads is in its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.recipes import copy_recipe
from tests.unit.test_plan import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([{"kind": "format"}], r"a format of what\?"),
        ([{"kind": "format", "pattern": "("}], r"filter\[0\]\.pattern: no regular expression"),
        ([{"kind": "format", "min_chars": 9, "max_chars": 3}], "nothing would pass"),
        ([{"kind": "format", "json_schema": "missing.json"}], r"filter\.0\.json_schema: .*missing\.json: No such file"),
        ([{"kind": "format", "json_schema": "recipe.toml"}], "no JSON"),
        ([{"kind": "format", "json_schema": "wrong.json"}], "no JSON Schema"),
        ([{"kind": "agreement"}], "raise generate.samples to 3"),
        ([{"kind": "agreement", "metric": "contains"}], r"metric: contains does not tell"),
        ([{"kind": "pii", "similarity": 0.5}], r'similarity: this is for kind = "duplicates"'),
        ([{"kind": "duplicates", "similarity": 0.1}], r"filter\[0\]\.similarity"),
    ],
)
def test_filters_that_cannot_be_meant(folder: Path, filters: list[dict[str, Any]], message: str) -> None:
    (folder / "wrong.json").write_text('{"type": "objekt"}')
    with pytest.raises(RecipeError, match=message):
        make(folder, filter=filters)


def test_a_filters_files_and_suites_are_in_its_key(folder: Path) -> None:
    schema = folder / "schema.json"
    schema.write_text('{"type": "object"}')
    filters = [{"kind": "reference", "otherwise": "gold"}, {"kind": "format", "json_schema": "schema.json"}]
    key = make(folder, filter=filters).match("filter")[0].key
    schema.write_text('{ "type":\n"object" }')
    assert make(folder, filter=filters).match("filter")[0].key == key  # spaces say nothing
    schema.write_text('{"type": "object", "required": ["name"]}')
    assert make(folder, filter=filters).match("filter")[0].key != key
    clean = [{"kind": "reference", "otherwise": "gold"}, {"kind": "decontaminate"}]
    before = make(folder, filter=clean).match("filter")[0].key
    suite = folder / "data" / "holdout.jsonl"
    suite.write_text("".join(suite.read_text().splitlines(keepends=True)[:-1]))
    assert make(folder, filter=clean).match("filter")[0].key != before
    assert make(folder).match("generate")[0].key == make(folder, filter=clean).match("generate")[0].key


def test_a_schema_guides_no_teacher_that_writes_freely(folder: Path) -> None:
    (folder / "call.json").write_text('{"type": "object"}')
    with pytest.raises(RecipeError, match=r"generate\.json_schema: transformers writes freely"):
        make(folder, generate__json_schema="call.json")
    with pytest.raises(RecipeError, match=r"json_schema: a think is no JSON"):
        make(folder, generate__json_schema="call.json", generate__style="think")
