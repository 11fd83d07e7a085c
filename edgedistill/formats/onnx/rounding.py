"""Round the matrices of a folder that the builder wrote anew, each in the kind that it has or is given.

Codes and scales come from the checkpoint's weights and from what each matrix is given on the task's own text: the second moments of
its inputs, each token weighed by its gradient (``formats.gguf.moments``). An embedding that shares the head's codes counts with
what its errors cost where they are looked up. Speed and size are those of the kinds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.moments import Moments, collect
from edgedistill.formats.gguf.sensitivity import TOKENS, spread
from edgedistill.formats.onnx.folder import Folder, Matrix
from edgedistill.formats.onnx.nbits import Coded, Feedback
from edgedistill.formats.onnx.types import Kind

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class RoundingReport:
    """What was gained: of ``matrices``, the error of the products over the products' own squares with codes to nearest
    (``before``) and now, averaged; ``predicted`` is the KLD that the errors are expected to make, nats a token.
    """

    matrices: int
    kinds: dict[str, int]
    before: float
    after: float
    predicted: float
    rows: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def task_rows(
    checkpoint: Path, token_rows: Sequence[Sequence[int]], starts: Sequence[int], tokens: int = TOKENS
) -> list[tuple[list[int], int]]:
    """Return rows of about ``tokens`` tokens in all, spread evenly over those that fit the model's context, with where each one's
    answer starts. Raises UsageError where none does.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    most = int(config.get("max_position_embeddings") or 1 << 30)
    rows = [(row, start) for row, start in zip(token_rows, starts, strict=True) if len(row) <= most]
    if not rows:
        raise UsageError(
            f"every calibration row is longer than the model's context of {most} tokens", "give shorter text"
        )
    return [(list(row), max(1, start)) for row, start in spread(rows, tokens) if len(row) > max(1, start)]


def watched(
    folder: Folder,
    rows: Sequence[tuple[list[int], int]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Matrix, int, np.ndarray, Moments]]:
    """Yield (matrix, number of the part, its weights float32 [R, C], its moments) for every tensor in the matrices of ``folder``.

    Raises as ``moments.collect``, and StepFailed where a matrix gets no moments.
    """
    places = {part: (one, at) for one in folder.matrices.values() for at, part in enumerate(one.parts)}
    head = next((one for one in folder.matrices.values() if one.looked_up), None)
    found = collect(
        folder.checkpoint,
        [row for row, _ in rows],
        [start for _, start in rows],
        threads=threads,
        as_gguf=False,
        progress=progress,
    )
    for name, moments in found:
        # a tied checkpoint may hold its matrix under both names
        one, at = places.pop(name, (None, 0))
        if one is None and head is not None and moments.looked_up is not None and head.parts[0] in places:
            one, at = places.pop(head.parts[0])
        if one is not None and moments.inputs is not None:
            yield one, at, folder.weights_of(one.parts[at]), moments
    if places:
        raise StepFailed(
            f"{next(iter(places))}: the text never reached it", 'leave rounding out and take type = "int4" or "int8"'
        )


def second_of(moments: Moments) -> np.ndarray:
    """Return what rounding weighs errors by, float32 [C, C] with a mean of 1 on the diagonal: the inputs, and the look-ups."""
    assert moments.inputs is not None and moments.outputs is not None
    found = moments.inputs.astype(np.float64) * float(moments.outputs.sum(dtype=np.float64))
    if moments.columns is not None and moments.looked_up is not None:
        found.flat[:: len(found) + 1] += moments.columns * float(moments.looked_up.sum(dtype=np.float64))
    mean = float(found.diagonal().mean())
    if mean <= 0:  # such as the queries of a layer whose output matrix is 0
        return np.eye(len(found), dtype=np.float32)
    return (found / mean).astype(np.float32)


def round_folder(
    path: Path,
    checkpoint: Path,
    rows: Sequence[tuple[list[int], int]],
    kinds: Mapping[str, Kind] | Kind,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RoundingReport:
    """Write new codes into the folder ``path``, built from ``checkpoint``; ``kinds`` says what each matrix becomes, or all.

    ``rows`` are ``task_rows``. Raises StepFailed where the graph's matrices are not the checkpoint's.
    """
    started = time.monotonic()
    folder = Folder(path, checkpoint)
    wanted = dict.fromkeys(folder.matrices, kinds) if isinstance(kinds, Kind) else dict(kinds)
    made: dict[str, dict[int, Coded]] = {}
    before: list[float] = []
    after: list[float] = []
    predicted, total = 0.0, sum(len(one.parts) for one in folder.matrices.values())

    def run(done: int, of: int, told: str) -> None:
        if progress:
            progress(done, 2 * of, f"gradients: {told}")

    for matrix, at, weights, moments in watched(folder, rows, threads=threads, progress=run):
        if progress:
            progress(total + len(before), 2 * total, f"rounding {matrix.name}")
        second = second_of(moments)
        coded, old, new = Feedback(second).round(weights, wanted[matrix.name])
        size = float(np.vdot(weights @ second, weights)) or 1.0
        before.append(old / size)
        after.append(new / size)
        predicted += moments.cost(weights - coded.values())
        parts = made.setdefault(matrix.name, {})
        parts[at] = coded
        if len(parts) == len(matrix.parts):
            folder.check(matrix)
            folder.replace(matrix, joined([parts[at] for at in range(len(parts))]))
            del made[matrix.name]
    folder.save()
    names = [kind.name for kind in wanted.values()]
    return RoundingReport(
        matrices=len(wanted),
        kinds={name: names.count(name) for name in sorted(set(names))},
        before=float(np.mean(before)),
        after=float(np.mean(after)),
        predicted=predicted,
        rows=len(rows),
        tokens=sum(len(row) for row, _ in rows),
        seconds=time.monotonic() - started,
    )


def joined(parts: Sequence[Coded]) -> Coded:
    """Return matrices of one kind and width as one, their rows one after the other."""
    first = parts[0]
    codes, scales, zeros = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
    )
    return Coded(first.kind, first.columns, codes, scales, zeros)
