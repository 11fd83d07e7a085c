"""Files of one JSON value a line, as steps write them for each other."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgedistill.sequences import Made

_HALF = re.compile(r"[\ud800-\udfff]")


def whole(text: str) -> str:
    """Return a text with U+FFFD in place of halves of surrogate pairs: JSON may hold one (``\\ud83d``), a file in UTF-8 cannot."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def json_lines(path: Path) -> list[str]:
    """Return the lines of a JSONL file. They end with a line feed alone: U+2028, U+2029 and U+0085 may stand in a text as they are,
    and ``str.splitlines`` would cut the line there.
    """
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def each_line(path: Path) -> Iterator[str]:
    """Yield the lines of a JSONL file, one in memory at a time."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if text := line.rstrip("\n"):
                yield text


class Lines(Made[Any]):
    """The values of a JSONL file by their numbers, read when they are looked at: 8 bytes of each, where its line begins, stay in
    memory. The file is open as long as this is.
    """

    def __init__(self, path: Path) -> None:
        file, starts, at = path.open("rb"), array("Q"), 0
        for raw in file:
            if raw != b"\n":
                starts.append(at)
            at += len(raw)

        def read(start: int) -> Any:
            file.seek(start)
            return json.loads(file.readline())

        super().__init__(starts, read)
