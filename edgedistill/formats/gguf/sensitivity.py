"""Predict what each type would cost in each matrix of a model: the table that ``allocate`` chooses from.

In: the full-precision GGUF, the checkpoint that it was converted from, text of the task. For every matrix and type, ggml
quantizes it and ``Moments.cost`` says what the error does to the model's distributions; then each type is tried on the whole model
(``tried``). One table serves every target.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UsageError
from edgedistill.formats.gguf import ggml, imatrix
from edgedistill.formats.gguf.convert import places
from edgedistill.formats.gguf.model_io import library_build
from edgedistill.formats.gguf.moments import Moments, collect
from edgedistill.formats.gguf.read import GgufInfo, read_info, read_tensor
from edgedistill.formats.gguf.reuse import Aside, source_digest, tensor_key
from edgedistill.formats.gguf.tried import TOKENS as TRIED
from edgedistill.formats.gguf.tried import Errors, try_types
from edgedistill.formats.gguf.types import GGML_TYPES, PALETTE, allows_quantization, row_bytes
from edgedistill.sequences import Aside as Bytes

Progress = Callable[[int, int, str], None]

_LEAST = 1e-4  # of the mean importance of a matrix's columns, for each of them
_SLOW = ("IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL")  # a model in one of them takes ten times as long as in Q4_K
_ROOM = 2**30  # bytes of disk that are left to others
TOKENS = 8192  # of text that gradients are taken on: a backward pass costs what training does


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """How much text was used, of which ``predicted`` tokens are answers, how many matrices and costs came of it, and what costs of
    each type were multiplied by, after it was tried on the whole model.
    """

    rows: int
    tokens: int
    predicted: int
    matrices: int
    costs: int
    seconds: float
    tried: dict[str, float] = field(default_factory=dict)

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
    trials = _Trials(info, checkpoint, out)
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
        table[name] = _costs(info, name, matrices[name], moments, importance, palette, threads, shelf, trials)
    if lost := sorted(set(matrices) - set(table)):
        raise UsageError(f"{checkpoint}: has no tensor for {lost[0]} of {source}: not the same model")
    predicted = {
        type_name: sum(types[type_name][1] for types in table.values() if type_name in types) for type_name in palette
    }
    tried = try_types(
        checkpoint,
        spread([(row, start) for row, start in texts], TRIED),
        {name: (predicted[name], trials.errors(name)) for name in palette if predicted[name] and trials.has(name)},
        threads=threads,
        progress=progress,
    )
    for types in table.values():
        for type_name, one in tried.items():
            if type_name in types:
                types[type_name][1] *= one.factor
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
        tried={name: round(one.factor, 3) for name, one in tried.items()},
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
    trials: _Trials,
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
            trials.add(name, type_name, blocks)
            if shelf is not None and type_name in _SLOW:
                build = library_build()["library_sha256"]
                key = tensor_key(source, tensor.type, shape, type_name, importance.tobytes(), build)
                shelf.add(key, blocks.tobytes())
    return found


class _Trials:
    """Keeps what every matrix is in every type, in a file without a name, until all are known and types can be tried."""

    def __init__(self, info: GgufInfo, checkpoint: Path, folder: Path) -> None:
        self.info, self.folder = info, folder
        self.sources = {target: (name, order) for name, (target, order) in places(checkpoint).items()}
        self._blocks, self._numbers, self._lost = Bytes(folder), dict[str, dict[str, int]](), set[str]()

    def add(self, name: str, type_name: str, blocks: np.ndarray) -> None:
        """Keep a matrix in a type that loses something, where the disk has room."""
        if GGML_TYPES[type_name].block == 1:
            return
        if shutil.disk_usage(self.folder).free > 4 * blocks.nbytes + _ROOM:
            self._numbers.setdefault(type_name, {})[name] = len(self._blocks)
            self._blocks.add(blocks.tobytes())
        else:
            self._lost.add(type_name)

    def has(self, type_name: str) -> bool:
        """Tell whether every matrix that can have a type is here in it."""
        return type_name in self._numbers and type_name not in self._lost

    def errors(self, type_name: str) -> Errors:
        """Return what gives the errors of a type, in the checkpoint's names and order of rows."""

        def give() -> Iterator[tuple[str, np.ndarray]]:
            for name, number in self._numbers[type_name].items():
                weights = read_tensor(self.info, name)
                blocks = np.frombuffer(self._blocks[number], dtype=np.uint8).reshape(len(weights), -1)
                error = ggml.dequantize_matrix(blocks, type_name, weights.shape[1]) - weights
                source, order = self.sources[name]
                places_of = order(np.arange(len(error), dtype=np.float32)).astype(np.int64)
                back = np.empty_like(error)
                back[places_of] = error
                yield source, back

        return give
