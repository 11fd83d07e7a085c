"""A GGUF file that others are compared with: what it says of a text is computed once, and kept beside the store's entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.fingerprint import file_digest
from edgedistill.formats.gguf.model_io import library_build
from edgedistill.kept import Kept

_VERSION = 1
"""Raised when the same rows are to give other log-probabilities."""
MOST_BYTES = 1 << 29
"""What is larger is not kept: 2,700 tokens of a vocabulary of 49,152."""
TEXTS = 4
"""Of a file, what it says of so many texts is kept: a recipe has two, one that types are chosen by and one of its suites."""


class KeptRunner(GgufRunner):
    """Run a GGUF file whose log-probabilities are kept in the store at ``root``, for the next artifact that is compared with it.

    They belong to the file's bytes, to the rows as they were given together (another grouping changes the last bits), and to
    llama.cpp's build. What is kept is what was computed, bit for bit: a comparison is the same with it and without.
    """

    def __init__(self, path: Path, *, root: Path, threads: int | None = None) -> None:
        super().__init__(path, threads=threads)
        self.root = root

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per row float32 [len(positions[i]), vocabulary], as ``GgufRunner.logprobs`` does."""
        if not token_rows:
            return
        asked = [[list(row), list(at)] for row, at in zip(token_rows, positions, strict=True)]
        kept = Kept(
            self.root,
            ["logprobs", _VERSION, asked, library_build()["library_sha256"]],
            of=file_digest(self.path),
            kind="log-probabilities",
        )
        width, done = self.vocabulary, 0
        for done, at in enumerate(positions):
            data = kept.get(str(done))
            if data is None or len(data) != 4 * width * len(at):
                break  # this row and the rest are computed; with those before them, as rows that are read together belong together
            yield np.frombuffer(data, dtype=np.float32).reshape(len(at), width)
        else:
            return
        for number, found in enumerate(self._computed(token_rows, positions, kept)):
            if number >= done:
                yield found

    def _computed(
        self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], kept: Kept
    ) -> Iterator[np.ndarray]:
        """Compute all rows; keep each as it comes, where all are not too much."""
        size = 4 * self.vocabulary * sum(map(len, positions))
        keep = size <= MOST_BYTES and kept.has_room(size)
        if keep:
            kept.make_way(TEXTS)
        for number, found in enumerate(super().logprobs(token_rows, positions)):
            if keep:
                kept.put([(str(number), found.tobytes())])
            yield found
