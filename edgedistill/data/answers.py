"""Answers by the prompt that they answer, read from the disk when their turn comes: what stays in memory is where each one lies.

An answer takes 20 bytes, of its row and its place in a file and in their order, and 8 more while they are put in order; a prompt
takes 21. Neither grows with the text.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgedistill.data.prompts import Row

if TYPE_CHECKING:
    import numpy as np

Answer = dict[str, Any]
BLOCK, BLOCK_CHARS = 512, 1 << 21
"""Answers, and characters of their texts, that are in memory at once, but for the last prompt of a block."""
_FILE = 56  # bits of a place in a file; those above are the file's number


class Answers:
    """Map prompts to lines of JSONL files, in the files' order. Where a teacher answered a prompt anew (``anew`` of `add`), the
    lines of the files before are none of it any more.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._ids = Places(row.id for row in rows)
        self._rows, self._places = array("I"), array("Q")
        self._order: np.ndarray | None = None  # the places, by row
        self._starts: np.ndarray | None = None
        self._files: list[tuple[BinaryIO, str, int]] = []  # with whose answers they hold, and their turn
        self._turn = bytearray(len(self._ids))  # of each row: which of the times it was answered counts
        self._turns = 0

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        for file, _, _ in self._files:
            file.close()

    def add(
        self, path: Path, by: str = "", *, anew: bool = False, wanted: Callable[[Answer], bool] = lambda line: True
    ) -> None:
        """Read the lines of a file, those of another teacher with its name as ``by``. Raises KeyError for an unknown row."""
        self._turns += anew
        turn, number = self._turns if anew else 0, len(self._files)
        self._files.append((path.open("rb"), by, turn))
        at = 0
        for raw in self._files[-1][0]:
            if raw != b"\n" and wanted(line := json.loads(raw)):
                row = self._row(line["id"])
                self._rows.append(row)
                self._places.append(number << _FILE | at)
                if anew:
                    self._turn[row] = turn
            at += len(raw)
        self._order = None

    def __len__(self) -> int:
        """Return how many lines were read, those that no longer count among them."""
        return len(self._rows)

    def anew(self, row_id: str) -> bool:
        """Tell whether a prompt was answered anew."""
        return self._turn[self._row(row_id)] > 0

    def __iter__(self) -> Iterator[Answer]:
        """Yield all lines that were read, in the files' order."""
        for place in self._places:
            yield self._line(place)

    def of(self, row_id: str) -> list[Answer]:
        """Return the lines of a prompt that count."""
        if self._order is None or self._starts is None:
            self._order, self._starts = self._in_order()
        row = self._row(row_id)
        found = []
        for place in self._order[self._starts[row] : self._starts[row + 1]].tolist():
            if self._files[place >> _FILE][2] == self._turn[row]:
                found.append(self._line(place))
        return found

    def _row(self, row_id: str) -> int:
        if (row := self._ids.get(row_id)) is None:
            raise KeyError(row_id)
        return row

    def _line(self, place: int) -> Answer:
        file, by, _ = self._files[place >> _FILE]
        file.seek(place & (1 << _FILE) - 1)
        line = json.loads(file.readline())
        return {**line, "by": by} if by else line

    def _in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of all lines by row, and where those of each row begin."""
        import numpy as np

        rows, places = np.asarray(self._rows, dtype=np.uint32), np.asarray(self._places, dtype=np.uint64)
        starts = np.zeros(len(self._ids) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(self._ids)), out=starts[1:])
        return places[np.argsort(rows, kind="stable")], starts


def blocks(rows: Iterable[Row], answers: Answers) -> Iterator[list[tuple[Row, list[Answer]]]]:
    """Yield all prompts with their answers, several at a time."""
    block: list[tuple[Row, list[Answer]]] = []
    count = size = 0
    for row in rows:
        found = answers.of(row.id)
        block.append((row, found))
        count, size = count + len(found), size + sum(len(one["text"]) for one in found)
        if count >= BLOCK or size >= BLOCK_CHARS or len(block) >= BLOCK:
            yield block
            block, count, size = [], 0, 0
    if block:
        yield block


# ── what is known of an answer by its key ───────────────────────────────────────────────────────────────────────────


def short(key: str) -> int:
    """Return 64 bits of the digest of a key: of a hundred million keys, one pair meets in 3,600 cases."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Places:
    """Number keys, in 12 bytes each: the order in which they were given."""

    def __init__(self, keys: Iterable[str]) -> None:
        import numpy as np

        hashes = np.asarray(array("Q", map(short, keys)), dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._numbers = array("I", order.astype(np.uint32).tobytes())
        self._hashes = array("Q", hashes[order].tobytes())  # to look one up in an array of numpy's takes far longer

    def __len__(self) -> int:
        """Return how many keys were given."""
        return len(self._numbers)

    def get(self, key: str) -> int | None:
        """Return the number of a key, the last where it was given twice; None of one that was not given."""
        wanted = short(key)
        at = bisect_right(self._hashes, wanted) - 1
        return self._numbers[at] if at >= 0 and self._hashes[at] == wanted else None

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None


def evenly(lines: Iterable[str], share: float, count: int) -> Iterator[str]:
    """Yield a share of ``count`` lines, evenly spaced."""
    wanted = round(share * count)
    at = 0
    for number, line in enumerate(lines):
        if at < wanted and number == at * count // wanted:
            yield line
            at += 1


def as_line(value: Answer) -> str:
    """Return a line of a JSONL file."""
    return json.dumps(value, ensure_ascii=False) + "\n"
