"""Near duplicates by meaning: vectors of answers, on the disk, and which of them are nearly one before.

An entry of vectors: ``vectors.json`` (size, count), ``vectors.f32`` (float32 [count, size], each of length 1), ``keys.txt``: whose
they are, one key of the row store a line.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.data.answers import Places
from edgedistill.data.sifting import Block, Judge

if TYPE_CHECKING:
    import numpy as np

MEANING = 0.9
"""The cosine from which on two rows mean the same, unless a recipe says otherwise."""
SHEET = 1 << 22  # numbers of the vectors before that are in memory at once: 16 MiB
DOUBT = 1e-4
"""How far a product in single precision may be from the cosine: nearer ones are taken again in double precision."""
EXACT = 1e-6  # what rounding may take from the cosine of a vector with itself


class Vectors:
    """Look up the vectors of answers in several entries; 12 bytes an answer are in memory."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._files = [(folder / "vectors.f32").open("rb") for folder in folders]
        told = [json.loads((folder / "vectors.json").read_text()) for folder in folders]
        self.size = int(told[0]["size"])
        self._starts = [sum(one["count"] for one in told[:at]) for at in range(len(told))]
        self._places = Places(key for folder in folders for key in _keys(folder / "keys.txt"))

    def of(self, keys: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Return the vectors of those answers that have one, float32 [n, size], and the answers' numbers among ``keys``."""
        import numpy as np

        found = [(at, place) for at, key in enumerate(keys) if (place := self._places.get(key)) is not None]
        raw = bytearray()
        for _, place in found:
            number = max(at for at, start in enumerate(self._starts) if start <= place)
            where = (place - self._starts[number]) * 4 * self.size
            raw += os.pread(self._files[number].fileno(), 4 * self.size, where)
        return np.frombuffer(raw, dtype=np.float32).reshape(-1, self.size), [at for at, _ in found]


def _keys(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield line.rstrip("\n")


class Near:
    """Find vectors that are near one before, by their cosine: exactly, block by block, with those before in a nameless file."""

    def __init__(self, similarity: float, size: int, folder: Path | None = None) -> None:
        self.similarity, self.size, self.count = similarity, size, 0
        self._file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 (open as long as this is)

    def before(self, vectors: np.ndarray) -> list[bool]:
        """Tell of each vector, in their order, whether it is near one that was seen; if not, it is seen from now on.

        ``vectors``: float32 [n, size], of length 1.
        """
        import numpy as np

        near = np.zeros(len(vectors), dtype=bool)
        rows = max(1, SHEET // self.size)
        for start in range(0, self.count, rows):
            raw = os.pread(self._file.fileno(), 4 * self.size * min(rows, self.count - start), 4 * self.size * start)
            sheet = np.frombuffer(raw, dtype=np.float32).reshape(-1, self.size)
            left = np.flatnonzero(~near)
            products = vectors[left] @ sheet.T
            for at in np.flatnonzero((products >= self.similarity - DOUBT).any(axis=1)):
                others = sheet[products[at] >= self.similarity - DOUBT]
                near[left[at]] = self._meets(vectors[left[at]], others)
        new: list[int] = []
        for at in range(len(vectors)):
            if not near[at] and not (new and self._meets(vectors[at], vectors[new])):
                new.append(at)
            else:
                near[at] = True
        os.pwrite(self._file.fileno(), np.ascontiguousarray(vectors[new]).tobytes(), 4 * self.size * self.count)
        self.count += len(new)
        return near.tolist()

    def _meets(self, vector: np.ndarray, others: np.ndarray) -> bool:
        """Tell whether a vector is near one of others, in double precision."""
        import numpy as np

        one, many = vector.astype(np.float64), others.astype(np.float64)
        cosines = (many @ one) / np.sqrt((many * many).sum(axis=1) * (one @ one))
        return bool((cosines >= self.similarity - EXACT).any())


def near_duplicates(folders: Sequence[Path], similarity: float, folder: Path | None) -> Callable[[Block, int], Judge]:
    """Return what judges several prompts' answers by their vectors (`Sieve.at_once`). What was edited has none, and passes."""
    vectors = Vectors(folders)
    seen = Near(similarity, vectors.size, folder)

    def at_once(block: Block, left: int) -> Judge:
        keys = [answer["row"] for _, found in block for answer in found]
        rows, numbers = vectors.of(keys)
        near = {at for at, one in zip(numbers, seen.before(rows), strict=True) if one}
        told = iter(range(len(keys)))
        return lambda row, found: [(a, "duplicates" if next(told) in near else "") for a in found]

    return at_once
