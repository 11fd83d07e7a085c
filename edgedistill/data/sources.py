"""The containers that rows come in: JSONL, a JSON list, CSV, TSV, Parquet, and what ``datasets`` saves to disk.

A reader yields (record, spot): ``spot`` is the line that the record starts on ("17"), or its number where a file has no lines
("row 17"). What a record means is none of its business (``forms.py``, ``prompts.py``): the same rows are the same rows in every
container, so a table's empty cell is None, and nothing is kept of the fields of a struct that Arrow fills with nulls. pyarrow,
which brings numpy, is imported only where a file needs it.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedistill.errors import UsageError

Placed = Iterator[tuple[Any, str]]
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
SAVED, SPLITS = "state.json", "dataset_dict.json"
"""What ``datasets`` writes beside the Arrow files of one set, and beside the folders of several splits."""
NESTED = ("messages", "tools", "history", "reasoning_gym")
"""Fields that are written to a table as JSON: their parts differ from row to row, and a column has one type."""


def records(path: Path) -> Placed:
    """Yield (record, spot) for every record of ``path``, in the file's order. Raises UsageError, with file and spot, for what
    cannot be read; a file of an unknown suffix is read as JSONL.
    """
    if path.is_dir():
        yield from _saved(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in DELIMITERS:
        yield from _table(path, DELIMITERS[path.suffix])
    else:
        data = _read(path).removeprefix(b"\xef\xbb\xbf")
        if path.suffix == ".json" and data.lstrip()[:1] == b"[":
            yield from _document(path, data)
        else:
            yield from _lines(path, data)


def is_source(path: Path) -> bool:
    """Tell whether something is there to read rows from: a file, or a folder that ``datasets`` saved."""
    return path.is_file() or (path / SAVED).is_file() or (path / SPLITS).is_file()


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", _nearby(path)) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", f"Check the file: ls -l {path}") from None
    if path.suffix != ".gz":
        return data
    import gzip
    import zlib

    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be unpacked: {error}", f"Check the file: gzip -t {path}") from None


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either. Paths in a recipe are relative to the recipe."
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {folder / close[0]}?"
    return f"{folder} has: {', '.join(names[:8])}." if names else f"There is no file of rows in {folder}."


# ── JSON ──


def _lines(path: Path, data: bytes) -> Placed:
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if raw.strip():
            spot = str(number)
            yield _decode(raw, path, spot), spot


def _decode(raw: bytes, path: Path, spot: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}:{spot}: not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        text = raw.decode("utf-8").strip()
        hint = "Every line must be one complete JSON object, without a comma at its end."
        if text in ("{", "]") or text.startswith("["):
            hint = (
                "This looks like one JSON document over many lines: a list of rows is read from a file named .json, and "
                "jq -c '.[]' FILE > FILE.jsonl converts it."
            )
        raise UsageError(f"{path}:{spot}: malformed JSON, column {error.colno}: {error.msg}", hint) from None
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"{path}:{spot}: malformed JSON: {error}", "Write it as a string.") from None
    except RecursionError:
        raise UsageError(f"{path}:{spot}: JSON nested too deeply", "Take this row out.") from None


def _document(path: Path, data: bytes) -> Placed:
    try:
        found = json.loads(_text(path, data))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}:{error.lineno}: malformed JSON, column {error.colno}: {error.msg}",
            'A .json file is one list of rows: [{"id": "a1", "prompt": "Hello"}, …]',
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: malformed JSON: {error}", "Write it as a string.") from None
    except RecursionError:
        raise UsageError(f"{path}: JSON nested too deeply", "Write a list of rows.") from None
    for number, record in enumerate(found, start=1):
        yield record, f"row {number}"


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from None


# ── CSV and TSV ──


def _table(path: Path, delimiter: str) -> Placed:
    text = _text(path, _read(path).removeprefix(b"\xef\xbb\xbf"))
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 128 KiB, for the process
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1  # where the record starts: quoted cells may go over many lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(
                f"{path}:{line}: {error}", 'A cell that holds quotes is quoted, its quotes doubled: "say ""hi"""'
            ) from None
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not header:
            header = _header(cells, f"{path}:{line}", delimiter)
        elif len(cells) != len(header):
            raise UsageError(
                f"{path}:{line}: {len(cells)} cells, and the header names {len(header)} columns",
                "Put cells that hold a comma, a quote or a line break into double quotes.",
            )
        else:
            yield _typed({name: cell or None for name, cell in zip(header, cells, strict=True) if name}), str(line)


def _header(cells: Sequence[str], where: str, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    doubled = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if doubled is not None:
        raise UsageError(f"{where}: two columns are named {doubled!r}", "Rename one.")
    if len(names) == 1 and (other := next((one for one in (";", "\t", ",") if one in names[0]), None)):
        what = {";": "semicolons", "\t": "tabs", ",": "commas"}
        raise UsageError(
            f"{where}: the columns are separated by {what[other]}, not {what[delimiter]}",
            "Name a table of tabs .tsv; save one of semicolons with commas.",
        )
    return names


def _typed(record: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of ours that are no text their type: a cell is text, and says nothing of what it is."""
    if tags := record.get("tags"):
        if tags.lstrip().startswith("["):
            record["tags"] = _json_or_text(tags)
        else:
            record["tags"] = [one for tag in tags.replace(";", ",").split(",") if (one := tag.strip())]
    if (evolution := record.get("evolution") or "").isdecimal():
        record["evolution"] = int(evolution)
    return record


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # what is wrong with it is said where fields are checked


# ── Arrow ──


def _parquet(path: Path) -> Placed:
    if not path.is_file():
        _read(path)  # says what is there instead
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(batch_size=1024), 0)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {_first_line(error)}", "Write the file anew.") from None


def _saved(folder: Path) -> Placed:
    if (folder / SPLITS).is_file():
        for split in _named(folder / SPLITS, lambda found: found["splits"]):
            for record, spot in _saved_set(folder / split):
                yield {**record, "split": record.get("split") or split}, f"{split}: {spot}"
    elif (folder / SAVED).is_file():
        yield from _saved_set(folder)
    else:
        raise UsageError(
            f"{folder}: is a folder, not a file of rows",
            f"Name a file in it, such as {folder / 'prompts.jsonl'}, or a folder that datasets wrote with save_to_disk.",
        )


def _saved_set(folder: Path) -> Placed:
    import pyarrow as pa
    import pyarrow.ipc as ipc

    number = 0
    for name in _named(folder / SAVED, lambda found: [one["filename"] for one in found["_data_files"]]):
        try:
            with pa.memory_map(str(folder / name)) as file, ipc.open_stream(file) as reader:
                for record, spot in _batches(reader, number):
                    yield record, spot
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{folder / name}: cannot be read as Arrow: {_first_line(error)}", "Save the set anew: save_to_disk"
            ) from None


def _named(path: Path, names: Callable[[Any], list[str]]) -> list[str]:
    """Return the files, or folders, that one of datasets' files names, all of them plain names."""
    try:
        found = [str(name) for name in names(json.loads(_read(path)))]
    except (ValueError, KeyError, TypeError):
        found = [""]
    if any(not name or Path(name).name != name for name in found):
        raise UsageError(f"{path}: not as datasets writes it", "Save the set anew: save_to_disk")
    return found


def _batches(batches: Iterable[Any], before: int) -> Placed:
    number = before
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield {name: _without_nulls(value) for name, value in record.items()}, f"row {number}"


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls that Arrow fills in where one row's struct lacks what another's has."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ── writing ──


def write_records(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Write records as the suffix of ``path`` says: .parquet, .json (one list), else JSONL. Raises UsageError."""
    with _writing(path):
        if path.suffix == ".parquet":
            _write_parquet(path, found)
        elif path.suffix == ".json":
            path.write_text(json.dumps(list(found), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        else:
            path.write_text(as_lines(found), encoding="utf-8")


def write_lines(path: Path, text: str) -> None:
    """Write JSONL, whatever the suffix of ``path`` says. Raises UsageError."""
    with _writing(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, UnicodeEncodeError) as error:
        raise UsageError(f"{path}: cannot be written ({error})", "Give another file: -o FILE") from None


def as_lines(found: Iterable[Mapping[str, Any]]) -> str:
    """Return records as JSONL."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)


def _write_parquet(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for one in found for name in one))
    nested = set(NESTED)
    if all(message.keys() <= {"role", "content"} for one in found for message in one.get("messages", ())):
        nested.remove("messages")  # texts alone: a column that every reader of conversations knows
    rows = [
        {
            name: json.dumps(value, ensure_ascii=False) if name in nested and value is not None else value
            for name, value in ((name, one.get(name)) for name in names)
        }
        for one in found
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
