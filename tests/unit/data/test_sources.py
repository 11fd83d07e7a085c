"""The same rows in every container, and what is said of a file that is wrong."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.data.prompts import load_rows, rows_digest
from edgedistill.data.sources import write_records
from edgedistill.errors import UsageError

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
Rows = list[dict[str, Any]]


def as_jsonl(path: Path, rows: Rows) -> Path:
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_gzip(path: Path, rows: Rows) -> Path:
    path = path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def as_json(path: Path, rows: Rows) -> Path:
    path = path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_table(ending: str, delimiter: str) -> Callable[[Path, Rows], Path]:
    def write(path: Path, rows: Rows) -> Path:
        path = path / f"rows{ending}"
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(names)
            for row in rows:
                cells = [row.get(name, "") for name in names]
                table.writerow([one if isinstance(one, str) else json.dumps(one) for one in cells])
        return path

    return write


def as_parquet(path: Path, rows: Rows) -> Path:
    path = path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(columnar(rows)), path)
    return path


def as_saved(path: Path, rows: Rows) -> Path:
    """Write what datasets 5.2 writes by save_to_disk, read off a folder of its own: two Arrow streams and state.json."""
    path = path / "saved"
    path.mkdir()
    whole = pa.Table.from_pylist(columnar(rows))
    names = []
    for at, part in enumerate((whole.slice(0, 1), whole.slice(1))):
        names.append(f"data-{at:05}-of-00002.arrow")
        with ipc.new_stream(path / names[-1], part.schema) as file:
            file.write_table(part)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


def columnar(rows: Rows) -> Rows:
    """Return rows with the same columns: Table.from_pylist takes those of the first."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [
        {name: json.dumps(row[name]) if name == "tools" and name in row else row.get(name) for name in names}
        for row in rows
    ]


CONTAINERS = {
    "gzip": as_gzip,
    "json": as_json,
    "csv": as_table(".csv", ","),
    "tsv": as_table(".tsv", "\t"),
    "parquet": as_parquet,
    "saved": as_saved,
}

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
said = texts.filter(str.strip)
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
rows_of = st.lists(
    st.fixed_dictionaries(
        {"messages": st.lists(message, max_size=2).map(lambda some: [*some, {"role": "user", "content": "go on"}])},
        optional={
            "reference": texts,
            "rationale": texts,
            "tags": st.lists(said, min_size=1, max_size=3),
            "tools": st.just([TOOL]),
            "split": st.sampled_from(["train", "test"]),
            "evolution": st.integers(0, 9),
        },
    )
    | st.fixed_dictionaries({"prompt": said}, optional={"reference": texts}),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=25)
@given(rows=rows_of)
def test_the_same_rows_in_every_container(container: str, rows: Rows) -> None:
    named = [{"id": f"r{at}", **row} for at, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        plain = load_rows(as_jsonl(Path(folder), named))
        found = load_rows(CONTAINERS[container](Path(folder), named))
    assert found == plain
    assert rows_digest(found) == rows_digest(plain)


@settings(max_examples=25)
@given(rows=rows_of)
def test_what_is_written_is_read_again(rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = load_rows(as_jsonl(Path(folder), [{"id": f"r{at}", **row} for at, row in enumerate(rows)]))
        for name in ("out.jsonl", "out.json", "out.parquet"):
            write_records(Path(folder) / name, [row.to_json() for row in plain])
            assert load_rows(Path(folder) / name) == plain


def test_calls_survive_parquet(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None, "b": 1}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    rows = [{"id": "a", "messages": messages, "tools": [TOOL]}, {"id": "b", "prompt": "y"}]
    plain = load_rows(as_jsonl(tmp_path, rows))
    write_records(tmp_path / "out.parquet", [row.to_json() for row in plain])
    assert rows_digest(load_rows(tmp_path / "out.parquet")) == rows_digest(plain)


def test_the_splits_of_a_saved_set_are_its_rows_splits(tmp_path: Path) -> None:
    folder = tmp_path / "dict"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        as_saved(tmp_path / name, [{"id": f"{name}{at}", "prompt": "x"} for at in range(2)]).rename(folder / name)
    assert [(row.id, row.split) for row in load_rows(folder)] == [
        ("train0", "train"), ("train1", "train"), ("test0", "test"), ("test1", "test"),
    ]  # fmt: skip


WRONG_FILES = [
    ("a.csv", 'id,prompt\n1,"two\nlines"\n1,x\n', "a.csv:4: id '1' was used before, on line 2", "unique"),
    ("a.csv", "id,prompt\n\n1,x,y\n", "a.csv:3: 3 cells, and the header names 2 columns", "double quotes"),
    ("a.csv", 'id,prompt\n1,"x"y\n', "a.csv:2: ", "doubled"),
    ("a.csv", "id;prompt\n1;x\n", "a.csv:1: the columns are separated by semicolons", "commas"),
    ("a.tsv", "id,prompt\n1,x\n", "a.tsv:1: the columns are separated by commas, not tabs", "commas"),
    ("a.csv", "id,id\n1,x\n", "a.csv:1: two columns are named 'id'", "Rename"),
    ("a.csv", "id,tools,prompt\n1,[x,x\n", "a.csv:2: tools is a text that is no JSON", "JSON"),
    ("a.csv", "id,prompt\n", "a.csv: no rows", "one JSON object"),
    ("a.csv", b"id,prompt\n1,\xe9\n", "a.csv:2: not UTF-8", "UTF-8"),
    ("a.json", '[{"prompt": "x"},\n {"prompt": "y"},]', "a.json:2: malformed JSON, column 18", "one list"),
    ("a.json", '[{"prompt": "x"}, 3]', "a.json:row 2: a row must be a JSON object, not a number", "Write"),
    ("a.json", '[{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}]', "a.json:row 2: id '1' was used before, in row 1", ""),
    ("a.parquet", "no Parquet", "a.parquet: cannot be read as Parquet", "anew"),
    ("a.jsonl.gz", "no gzip", "a.jsonl.gz: cannot be unpacked", "gzip -t"),
    ("state.json", '{"_data_files": [{"filename": "../x"}]}', "state.json: not as datasets writes it", "save_to_disk"),
    ("state.json", "{}", "state.json: not as datasets writes it", "save_to_disk"),
    ("state.json", '{"_data_files": [{"filename": "x"}]}', "x: cannot be read as Arrow", "save_to_disk"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message", "hint"), WRONG_FILES)
def test_a_wrong_file_is_named_with_a_remedy(
    tmp_path: Path, name: str, text: str | bytes, message: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_rows(tmp_path if name == "state.json" else tmp_path / name)
    assert f"{tmp_path}/{message}" in str(caught.value)
    assert hint in caught.value.hint


def test_a_missing_table_is_missing_as_any_file_is(tmp_path: Path) -> None:
    as_parquet(tmp_path, [{"prompt": "x"}])
    with pytest.raises(UsageError, match="no such file") as caught:
        load_rows(tmp_path / "row.parquet")
    assert "rows.parquet" in caught.value.hint


def test_a_table_of_ones_own_as_people_type_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffid,prompt,tags,evolution\r\n7,"say ""hi""\r\ntwice",alarm; timer,2\r\n8,x,,\r\n', newline="")
    first, second = load_rows(path)
    assert (first.id, first.messages[0]["content"]) == ("7", 'say "hi"\r\ntwice')
    assert (first.tags, first.evolution, second.tags) == (("alarm", "timer"), 2, ())


def test_lines_of_json_need_no_pyarrow(tmp_path: Path) -> None:
    path = as_table(".csv", ",")(tmp_path, [{"prompt": "x"}])
    code = (
        "import sys; from pathlib import Path; from edgedistill.data.prompts import load_rows;"
        f"load_rows(Path({str(path)!r}));"
        "print(sorted({'numpy', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("name", "where"), [("rows.jsonl", ":1"), ("rows.json", "")])
def test_a_number_of_too_many_digits_is_named_and_no_traceback(tmp_path: Path, name: str, where: str) -> None:
    path = tmp_path / name
    line = '{"prompt": "x", "id": ' + 5000 * "1" + "}"
    path.write_text(line if where else f"[{line}]")
    with pytest.raises(UsageError, match=rf"{name}{where}: malformed JSON: Exceeds the limit"):
        load_rows(path)
