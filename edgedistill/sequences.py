"""Sequences of which little is in memory: values that are made when they are looked at, and bytes that are put aside."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar, overload

T = TypeVar("T", covariant=True)


class Made(Sequence[T], Generic[T]):
    """The values that ``make`` makes of some numbers, anew whenever they are looked at."""

    def __init__(self, numbers: Sequence[int], make: Callable[[int], T]) -> None:
        self._numbers, self._make = numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Made[T]: ...
    def __getitem__(self, at: int | slice) -> T | Made[T]:
        return Made(self._numbers[at], self._make) if isinstance(at, slice) else self._make(self._numbers[at])


class Aside:
    """Byte strings in a nameless file in ``folder``, by their numbers: 8 bytes of each stay in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        # open as long as this is, and gone when the process dies
        self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, raw: bytes) -> None:
        """Put a byte string behind the others."""
        os.pwrite(self._file.fileno(), raw, self._ends[-1])
        self._ends.append(self._ends[-1] + len(raw))

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)
