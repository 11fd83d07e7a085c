"""data import and data export: rows of others' files, and rows for others."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.data.forms import exported
from edgedistill.data.kept import kept_rows
from edgedistill.data.prompts import load_rows
from edgedistill.data.sources import write_records
from tests.cli.test_cli_basics import edgedistill, refused

KEPT = [
    {"id": "a", "messages": [{"role": "user", "content": "x"}], "text": "y", "reference": "gold", "source": "teacher", "row": "k"},
    {"id": "a#1", "messages": [{"role": "user", "content": "x"}], "text": "z", "reference": None, "source": "teacher", "row": "k"},
]  # fmt: skip


def test_import_writes_rows_that_a_recipe_reads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("topic,gold,split\ncats,meow,train\ndogs,woof,test\n")
    options = ("--template", "A {topic} says?", "--reference", "gold", "--split", "train")
    done = edgedistill("data", "import", tmp_path / "a.csv", *options, "-o", tmp_path / "to" / "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert "1 rows, 1 with a reference" in done.stderr
    (row,) = load_rows(tmp_path / "to" / "out.jsonl")
    assert (row.messages[0]["content"], row.reference, row.split) == ("A cats says?", "meow", "train")
    printed = edgedistill("data", "import", tmp_path / "a.csv", *options)
    assert printed.stdout == (tmp_path / "to" / "out.jsonl").read_text()


def test_import_refuses_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("topic\ncats\n")
    refused(edgedistill("data", "import", tmp_path / "a.csv"), "a.csv:2: no messages", "template")
    refused(edgedistill("data", "import", tmp_path / "a.csv", "--template", "{x"), "--template: ")
    refused(edgedistill("data", "import", tmp_path / "b.csv"), "no such file", "Did you mean")
    refused(edgedistill("data", "import", tmp_path / "a.csv", "-o", tmp_path / "a.parquet"), "as JSONL", "a.jsonl")


@pytest.mark.reasoning
def test_what_cannot_be_written_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\ncats\n")
    for verb in (("import", tmp_path / "a.csv"), ("make", "chain_sum", "--rows", "2")):
        refused(edgedistill("data", *verb, "-o", tmp_path / "a.csv" / "out.jsonl"), "cannot be written", "-o FILE")


def test_export_refuses_what_has_no_place(tmp_path: Path) -> None:
    refused(edgedistill("data", "export", tmp_path, "--as", "parquet"), "a Parquet file is no text", "-o kept.parquet")
    done = CliRunner().invoke(app, ["data", "export", str(tmp_path), "--as", "word"])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("form", "ending"), [("jsonl", "jsonl"), ("alpaca", "json"), ("sharegpt", "jsonl"), ("parquet", "parquet")]
)
def test_what_was_kept_is_read_back_in_every_form(tmp_path: Path, form: str, ending: str) -> None:
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in KEPT))
    write_records(tmp_path / f"out.{ending}", exported(kept_rows(tmp_path), form))
    found = load_rows(tmp_path / f"out.{ending}")
    assert [(row.id, row.messages[0]["content"], row.reference) for row in found] == [
        ("a", "x", "y"),
        ("a#1", "x", "z"),
    ]
    if form == "parquet":
        column = pq.read_table(tmp_path / "out.parquet").column("messages").to_pylist()
        assert column[0] == [{"role": "user", "content": "x"}]  # no JSON in a string where texts are all there is
