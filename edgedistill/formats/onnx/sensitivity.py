"""Predict what each kind would cost in each matrix of an ONNX folder: the table that ``formats.gguf.allocate`` chooses from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgedistill.formats.gguf.sensitivity import SensitivityReport
from edgedistill.formats.onnx.folder import Folder
from edgedistill.formats.onnx.nbits import nearest
from edgedistill.formats.onnx.rounding import second_of, watched
from edgedistill.formats.onnx.types import kinds_for

Progress = Callable[[int, int, str], None]


def measure(
    built: Path,
    checkpoint: Path,
    rows: Sequence[tuple[list[int], int]],
    out: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Write ``table.json`` (bytes and predicted KLD by matrix and kind, shapes, the bytes of the folder beside the matrices) and
    ``text.json`` (the rows) into ``out``.

    ``built`` is a folder of 4 bits in blocks of 32 that the builder made of ``checkpoint``; ``rows`` are ``rounding.task_rows``.
    Raises as ``moments.collect``, and StepFailed where the folder's matrices are not the checkpoint's.
    """
    started = time.monotonic()
    folder = Folder(built, checkpoint)
    for one in folder.matrices.values():
        folder.check(one)
    table: dict[str, dict[str, list[float]]] = {
        one.name: {
            name: [kind.nbytes(*one.shape), 0.0]
            for name, kind in kinds_for(one.shape[1], looked_up=one.looked_up).items()
        }
        for one in folder.matrices.values()
    }
    total = sum(len(one.parts) for one in folder.matrices.values())

    def run(seen: int, of: int, told: str) -> None:
        if progress:
            progress(seen, 2 * of, f"gradients: {told}")

    found = watched(folder, rows, threads=threads, progress=run)
    for done, (matrix, _, weights, moments) in enumerate(found):
        if progress:
            progress(total + done, 2 * total, f"errors of {matrix.name}")
        importance = np.ascontiguousarray(second_of(moments).diagonal())
        for name, kind in kinds_for(matrix.shape[1], looked_up=matrix.looked_up).items():
            table[matrix.name][name][1] += moments.cost(nearest(weights, kind, importance, every=2).values() - weights)
    shapes = {name: list(one.shape) for name, one in folder.matrices.items()}
    written = {"costs": table, "shapes": shapes, "beside": folder.beside()}
    (out / "table.json").write_text(json.dumps(written))
    (out / "text.json").write_text(json.dumps(rows))
    return SensitivityReport(
        rows=len(rows),
        tokens=sum(len(row) for row, _ in rows),
        predicted=sum(len(row) - start for row, start in rows),
        matrices=len(table),
        costs=sum(map(len, table.values())),
        seconds=time.monotonic() - started,
    )
