"""Predict what each type would cost in each matrix of a model: the table that ``allocate`` chooses from.

In: the full-precision GGUF, the checkpoint that it was converted from, text of the task. For every matrix and type, ggml
quantizes it and ``Moments.cost`` says what the error does to the model's distributions. One table serves every target.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UsageError
from edgedistill.formats.gguf import ggml, imatrix
from edgedistill.formats.gguf.model_io import library_build
from edgedistill.formats.gguf.moments import Moments, collect
from edgedistill.formats.gguf.read import GgufInfo, read_info, read_tensor
from edgedistill.formats.gguf.reuse import Aside, source_digest, tensor_key
from edgedistill.formats.gguf.types import GGML_TYPES, PALETTE, allows_quantization, row_bytes

Progress = Callable[[int, int, str], None]

_LEAST = 1e-4  # of the mean importance of a matrix's columns, for each of them
_SLOW = ("IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL")  # a model in one of them takes ten times as long as in Q4_K
TOKENS = 8192  # of text that gradients are taken on: a backward pass costs what training does


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """How much text was used, of which ``predicted`` tokens are answers, and how many matrices and costs came of it."""

    rows: int
    tokens: int
    predicted: int
    matrices: int
    costs: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure(
    source: Path,
    checkpoint: Path,
    token_rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    out: Path,
    *,
    palette: Sequence[str] = PALETTE,
    tokens: int = TOKENS,
    aside: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Write ``table.json``, ``imatrix.gguf`` (columns weighed by what their errors cost, the head's too) and ``text.json`` (the
    rows that were used: token ids, and where the answer starts) into ``out``.

    ``checkpoint`` is the Hugging Face folder with the weights of ``source``. Of the rows that fit the model's context, spread
    evenly, as many are used as have ``tokens`` tokens. With ``aside``, matrices in the types that take longest are left beside the
    table, for the files that will have them (``reuse``). Raises as ``moments.collect``, and UsageError where file and checkpoint
    are not the same model.
    """
    started = time.monotonic()
    info = read_info(source)
    matrices = {
        tensor.name: tensor.shape
        for tensor in info.tensors
        if allows_quantization(tensor.name, tensor.shape) and len(tensor.shape) == 2
    }
    most = int(info.of_arch("context_length", 1 << 30))
    rows = [(row, start) for row, start in zip(token_rows, starts, strict=True) if len(row) <= most]
    if not rows:
        raise UsageError(
            f"every calibration row is longer than the model's context of {most} tokens", "give shorter text"
        )
    rows = spread(rows, tokens)
    table: dict[str, dict[str, list[float]]] = {}
    sums: dict[str, tuple[Any, int]] = {}
    count = sum(len(row) for row, _ in rows)
    texts = [[list(row), max(1, start)] for row, start in rows if len(row) > max(1, start)]
    (out / "text.json").write_text(json.dumps(texts))

    def run(done: int, total: int, told: str) -> None:
        if progress:
            progress(done, 2 * total, f"gradients: {told}")

    slow = sum(
        shape[0] * row_bytes(name, shape[1])
        for shape in matrices.values() for name in _SLOW if name in palette and shape[1] % GGML_TYPES[name].block == 0
    )  # fmt: skip
    shelf = Aside(out, slow) if aside else None
    found = collect(checkpoint, [row for row, _ in rows], [start for _, start in rows], threads=threads, progress=run)
    for name, moments in found:
        if name not in matrices:
            raise UsageError(f"{source}: has no matrix {name}, which {checkpoint} has: not the same model")
        if progress:
            progress(len(matrices) + len(table), 2 * len(matrices), f"errors of {name}")
        importance = _importance(moments, matrices[name][1])
        sums[name] = importance.astype(np.float64) * count, count
        # As ``imatrix.load`` will give it: the file is then quantized as it was here, to the last bit.
        importance = (sums[name][0].astype(np.float32) / np.float32(count)).astype(np.float32)
        table[name] = _costs(info, name, matrices[name], moments, importance, palette, threads, shelf)
    if lost := sorted(set(matrices) - set(table)):
        raise UsageError(f"{checkpoint}: has no tensor for {lost[0]} of {source}: not the same model")
    (out / "table.json").write_text(json.dumps({"shapes": matrices, "costs": {name: table[name] for name in matrices}}))
    if shelf is not None:
        shelf.close()
    imatrix.save(out / "imatrix.gguf", sums, count, "calibration, weighed by gradients")
    return SensitivityReport(
        rows=len(rows),
        tokens=count,
        predicted=sum(len(row) - start for row, start in texts),
        matrices=len(table),
        costs=sum(map(len, table.values())),
        seconds=time.monotonic() - started,
    )


def _importance(moments: Moments, columns: int) -> np.ndarray:
    """Return what an error of each column counts, float32 with a mean of 1.

    A column that was always 0 on this text still counts for a little: ggml lets go of a block whose columns count for nothing,
    and other text may need it.
    """
    found = moments.importance().astype(np.float64)
    mean = float(found.mean())
    if mean <= 0:  # such as the queries of a layer whose output matrix is 0
        return np.ones(columns, dtype=np.float32)
    return (found / mean).clip(min=_LEAST).astype(np.float32)


def spread(rows: list[tuple[Sequence[int], int]], tokens: int) -> list[tuple[Sequence[int], int]]:
    """Return rows of about ``tokens`` tokens in all, spread evenly over the list; all where there are no more, one at least."""
    whole = sum(len(row) for row, _ in rows)
    if whole <= tokens:
        return rows
    kept: list[tuple[Sequence[int], int]] = []
    owed = 0.0
    for row, start in rows:
        owed += tokens * len(row) / whole
        if owed >= len(row):
            kept.append((row, start))
            owed -= len(row)
    return kept or [min(rows, key=lambda one: len(one[0]))]


def _costs(
    info: GgufInfo,
    name: str,
    shape: tuple[int, ...],
    moments: Moments,
    importance: np.ndarray,
    palette: Sequence[str],
    threads: int | None,
    shelf: Aside | None,
) -> dict[str, list[float]]:
    """Return {type: [bytes, predicted KLD]} of one matrix, for the types that its rows fit; put slow ones on ``shelf``."""
    weights = read_tensor(info, name)
    found: dict[str, list[float]] = {}
    tensor = next(one for one in info.tensors if one.name == name)
    with info.path.open("rb") as file:
        source = source_digest(file.fileno(), tensor) if shelf is not None else ""
    for type_name in palette:
        if shape[1] % GGML_TYPES[type_name].block == 0:
            blocks = ggml.quantize_matrix(weights, type_name, importance, threads=threads)
            error = ggml.dequantize_matrix(blocks, type_name, shape[1]) - weights
            found[type_name] = [shape[0] * row_bytes(type_name, shape[1]), moments.cost(error)]
            if shelf is not None and type_name in _SLOW:
                build = library_build()["library_sha256"]
                key = tensor_key(source, tensor.type, shape, type_name, importance.tobytes(), build)
                shelf.add(key, blocks.tobytes())
    return found
