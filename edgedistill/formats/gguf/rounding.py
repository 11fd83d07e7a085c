"""Choose the codes of a quantized GGUF anew, each column making good what rounding the ones before it spoilt.

llama.cpp rounds every weight to the nearest value that its block offers. What counts is the product with the inputs: with
second moments H = E[x x'], rounding w to q costs (w - q) H (w - q)', and since inputs are correlated, the error of one
column can be taken out of those not yet rounded (GPTQ, Frantar et al. 2022, arXiv:2210.17323; OBQ, arXiv:2208.11580):

    w_rest <- w_rest - (w_j - q_j) / U_jj U_j,rest    with U the upper Cholesky factor of H^-1,

columns with large inputs first, under llama.cpp's scales, chosen with the importance matrix. In the types that came later
(``rounded_in``) the float16 of every block are then fitted to the codes (``refit``). The file has the same type, size and
speed. A matrix where that does not lower the cost stays as it was.

Measured on ffn_down of a fine-tuned SmolLM2-135M (calibrated on 48 rows; 3 matrices, cost on 12 other rows, ratio to the codes
alone): fitted 0.94 in Q4_K, 0.88 in Q2_K and Q6_K, 0.80 in Q3_K; columns in natural order with scales chosen anew by llama.cpp
at each block 0.94, 1.04, 12 and 5.5.

What is gained on text like the calibration's may be lost on other text: calibrated on 16 rows of one task, the base model's
KLD in IQ4_NL was 0.26 and 0.27 of llama.cpp's on two kinds of that task's rows, 1.5 on ordinary chat
(``scripts/bench/rounding.py --quick``, n = 8 each). Mix in what the model must still do.

Formats: those of ``blocks``, where every weight has a code of its own under a scale of its group.
Measured on the quickstart's student in IQ4_NL, calls right of 600 further dev rows: 0.877 not rounded, 0.815 rounded to
nearest, 0.840 so (one student, standard error 0.014).
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from edgedistill.cpus import usable_cpus
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import digest
from edgedistill.formats.gguf.activations import Progress, watch_inputs
from edgedistill.formats.gguf.blocks import FORMATS, BlockFormat
from edgedistill.formats.gguf.model_io import library_build
from edgedistill.formats.gguf.read import GgufInfo, TensorInfo, read_info, read_tensor
from edgedistill.formats.gguf.types import FINELY_ROUNDED
from edgedistill.kept import Kept

_VERSION = 1  # of this code: what another one made is not found again
DAMPING = 0.01  # of the mean second moment, on the diagonal: GPTQ's own value
PANEL = 32  # columns whose errors are carried over to the later columns at once
_SYSTEMS = 2**26  # bytes of the equations that are solved at once
MEMORY = 2**30  # bytes of second moments held at once; more matrices take another pass over the text


@dataclass(frozen=True, kw_only=True)
class RoundingReport:
    """What was gained: ``tensors`` rounded so, ``kept`` left as they were; ``before`` and ``after`` are the squared error
    of the matrices' products over the products' own squares, averaged over the matrices.
    """

    tensors: int
    kept: int
    before: float
    after: float
    rows: int
    tokens: int
    passes: int
    seconds: float
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each matrix, before and after

    def to_json(self) -> dict[str, Any]:
        """Return plain values, none of single matrices."""
        return {name: value for name, value in asdict(self).items() if name != "errors"}


def feedback_digest(source: str, token_rows: Sequence[Sequence[int]], types: Sequence[str]) -> str:
    """Return a digest of what decides how a matrix is rounded, beside itself: the model (its file's sha256), the text, versions."""
    versions = [importlib.metadata.version(name) for name in ("numpy", "torch")]
    settings = [_VERSION, DAMPING, PANEL, tuple(types) == FINELY_ROUNDED]
    return digest([*settings, source, [list(row) for row in token_rows], library_build()["library_sha256"], *versions])


def moments_of(root: Path, source: str, token_rows: Sequence[Sequence[int]]) -> Kept:
    """Return where the store at ``root`` keeps second moments of a model's inputs on this text."""
    inputs = ["moments", _VERSION, [list(row) for row in token_rows], library_build()["library_sha256"]]
    return Kept(root, [*inputs, importlib.metadata.version("numpy")], of=source)


def inverse_factor(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the columns, largest inputs first, and U of that order: float32 [C, C]. ``moments``: [C, C].

    With H reversed = L L', H^-1 = U' U for U = L^-1 reversed: one factor and one triangular inverse. By torch, whose
    LAPACK took a fifth of the time of numpy's (7 s and 33 s for 120 matrices, beside other work).
    """
    import torch

    full = moments.astype(np.float64)
    mean = float(full.diagonal().mean())
    full.flat[:: len(full) + 1] += DAMPING * mean if mean > 0 else 1.0  # inputs of 0: any rounding will do
    order = np.argsort(-full.diagonal(), kind="stable")
    back = order[::-1]
    lower = torch.linalg.cholesky(torch.from_numpy(full[np.ix_(back, back)]))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(full), dtype=torch.float64), upper=False).numpy()
    return order, np.ascontiguousarray(inverse[::-1, ::-1], dtype=np.float32)


def feed_back(
    weights: np.ndarray, blocks: np.ndarray, form: BlockFormat, order: np.ndarray, factor: np.ndarray
) -> np.ndarray:
    """Return codes, uint8 [R, C / size, size], for ``weights`` [R, C] under the scales of ``blocks`` [R, C / size, bytes].

    ``order`` and ``factor`` are ``inverse_factor``'s of the second moments of the inputs.
    """
    rows, columns = weights.shape
    scale, offset = form.scales(blocks)
    # Columns first: what the loop touches lies together.
    rest = np.ascontiguousarray(weights.T[order])
    group = order // form.group
    scale, offset = (np.ascontiguousarray(one.reshape(rows, -1).T) for one in (scale, offset))
    safe = np.where(scale == 0, np.float32(1), scale)
    codes = np.empty((columns, rows), dtype=np.uint8)
    for start in range(0, columns, PANEL):
        end = min(start + PANEL, columns)
        errors = np.empty((end - start, rows), dtype=np.float32)
        for at in range(start, end):
            d, m = scale[group[at]], offset[group[at]]
            code = form.nearest((rest[at] - m) / safe[group[at]])
            codes[at] = code
            error = errors[at - start]
            np.subtract(rest[at], form.levels[code] * d + m, out=error)
            error /= factor[at, at]
            if at + 1 < end:
                rest[at + 1 : end] -= factor[at, at + 1 : end, None] * error
        rest[end:] -= factor[start:end, end:].T @ errors
    out = np.empty_like(codes)
    out[order] = codes
    return np.ascontiguousarray(out.T).reshape(rows, columns // form.size, form.size)


def refit(weights: np.ndarray, blocks: np.ndarray, form: BlockFormat, second: np.ndarray) -> np.ndarray:
    """Return ``blocks`` [R, C / size, bytes] with the float16 of their scales and offsets chosen for the codes that they hold.

    Those of a row together, by least squares: with B the weights that each of them makes when it is 1 and the others 0, the
    s that (w - s B) H (w - s B)' is least for. The small whole numbers of the groups stay.
    """
    rows, columns = weights.shape
    codes, full = form.codes(blocks), second.astype(np.float32)
    full.flat[:: columns + 1] += DAMPING * full.diagonal().mean()
    basis = np.empty((rows, columns // form.size, len(form.halves), form.size), dtype=np.float32)
    for index, at in enumerate(form.halves):
        alone = blocks.copy()
        for other in form.halves:
            alone[..., other : other + 2] = np.array([other == at], dtype=np.float16).view(np.uint8)
        basis[:, :, index] = form.values(alone, codes)
    count = basis.shape[1] * basis.shape[2]
    out, some = blocks.copy(), max(1, _SYSTEMS // (8 * count**2))
    for start in range(0, rows, some):
        part = basis[start : start + some]
        inner = np.empty((len(part), count, count), dtype=np.float32)
        for index in range(count):
            at, half = divmod(index, len(form.halves))
            moved = part[:, at, half] @ full[at * form.size : (at + 1) * form.size]
            moved = moved.reshape(len(part), -1, 1, form.size)
            inner[:, index] = np.einsum("rbhs,rbhs->rbh", np.broadcast_to(moved, part.shape), part).reshape(
                len(part), -1
            )
        asked = (weights[start : start + some] @ full).reshape(len(part), -1, 1, form.size)
        asked = np.einsum("rbhs,rbhs->rbh", np.broadcast_to(asked, part.shape), part).reshape(len(part), count, 1)
        system = inner.astype(np.float64)
        own = system[:, range(count), range(count)]
        system[:, range(count), range(count)] += np.where(own > 0, 1e-6 * own, 1.0)  # blocks that are 0 whatever it is
        found = np.linalg.solve(system, asked.astype(np.float64)).reshape(*part.shape[:3])
        for index, at in enumerate(form.halves):
            half = np.ascontiguousarray(found[:, :, index, None]).astype(np.float16)
            out[start : start + some, :, at : at + 2] = half.view(np.uint8)
    return out


def round_file(
    path: Path,
    source: Path,
    token_rows: Sequence[Sequence[int]],
    *,
    types: Collection[str] = tuple(FORMATS),
    scales: bool = False,
    done: Mapping[str, tuple[float, float] | None] | None = None,
    kept: Kept | None = None,
    threads: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> RoundingReport:
    """Choose the codes of ``path`` anew, in place, of matrices of ``types``; ``source`` is the full-precision file that it
    was quantized from. With ``scales``, the blocks' scales are fitted to the new codes (``refit``).

    ``token_rows`` are run through ``source`` once for every ``memory`` bytes of second moments that are not in ``kept``, where they
    go. Matrices in ``done`` are left as they are: they were rounded before, with these errors (None: no input of theirs was seen).
    Raises as ``watch_inputs``, and StepFailed where inputs are not finite.
    """
    started = time.monotonic()
    info, whole = read_info(path), read_info(source)
    chosen = [tensor for tensor in info.tensors if tensor.type in types and tensor.name.startswith("blk.")]
    chosen = [tensor for tensor in chosen if len(tensor.shape) == 2]
    errors = {tensor.name: found for tensor in chosen if (found := (done or {}).get(tensor.name))}
    left = [tensor for tensor in chosen if tensor.name not in (done or {})]
    passes, at = 0, len(chosen) - len(left)
    for group in _groups(left, memory):
        moments = _Moments()
        if not (kept is not None and moments.load(kept, group)):
            passes += 1
            inputs = {tensor.name for tensor in (group if kept is None else _with_others(group, whole, memory))}
            watch_inputs(
                source, token_rows, moments.take, wanted=inputs.__contains__, after=moments.add, threads=threads
            )
            if kept is not None:
                moments.save(kept, inputs)
        together: dict[tuple[str, str], list[TensorInfo]] = {}
        for tensor in group:
            of = moments.input_of(tensor.name)
            if of is None:  # never multiplied: an expert that no token reached
                at += 1
            else:
                together.setdefault((of, tensor.type), []).append(tensor)
        for (of, _), tensors in together.items():
            if not np.isfinite(moments.sums[of]).all():
                raise StepFailed(f"the input of {tensors[0].name} is not finite: the model is broken")
        # Most of it is Python's own loop over the columns, which has one core busy; threads of the library inside each product
        # wait more than they work there (3.7 s of processors without them, 8.2 with two, for 10 matrices, to the same bytes).
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or usable_cpus()) as pool:
            found = [
                (tensors, pool.submit(_round_tensors, info, whole, tensors, moments.sums[of], scales))
                for (of, _), tensors in together.items()
            ]
            for tensors, both in found:
                if progress:
                    progress(at, len(chosen), f"rounding {tensors[0].name}")
                errors |= zip((one.name for one in tensors), both.result(), strict=True)
                at += len(tensors)
    ordered = [errors[tensor.name] for tensor in chosen if tensor.name in errors]
    gained = sum(new < old for old, new in ordered)
    return RoundingReport(
        tensors=gained,
        kept=len(chosen) - gained,
        before=float(np.mean([old for old, _ in ordered])) if ordered else 0.0,
        after=float(np.mean([new for _, new in ordered])) if ordered else 0.0,
        rows=sum(bool(row) for row in token_rows),
        tokens=sum(map(len, token_rows)),
        passes=passes,
        seconds=time.monotonic() - started,
        errors=errors,
    )


def _with_others(group: list[TensorInfo], whole: GgufInfo, memory: int) -> list[TensorInfo]:
    """Return a group with all other matrices of the file, where they fit: another file of this model may round those."""
    names = {tensor.name for tensor in group}
    every = [
        *group,
        *(
            one
            for one in whole.tensors
            if one.name.startswith("blk.") and len(one.shape) == 2 and one.name not in names
        ),
    ]
    return every if len(_groups(every, memory)) == 1 else group


def _round_tensors(
    info: GgufInfo, whole: GgufInfo, tensors: Sequence[TensorInfo], second: np.ndarray, scales: bool
) -> list[tuple[float, float]]:
    """Round matrices of one type and one input in the file; return the error of each before and after."""
    form = FORMATS[tensors[0].type]
    weights = [read_tensor(whole, tensor.name) for tensor in tensors]
    blocks = [_read_blocks(info, tensor) for tensor in tensors]
    # All their rows at once: the loop over the columns is the same for all.
    codes = feed_back(np.concatenate(weights), np.concatenate(blocks), form, *inverse_factor(second))
    errors = []
    start = 0
    for tensor, weight, block in zip(tensors, weights, blocks, strict=True):
        mine, start = codes[start : start + len(weight)], start + len(weight)
        size = float(np.vdot(weight @ second, weight)) or 1.0

        def cost(some: np.ndarray, weight: np.ndarray = weight, size: float = size) -> float:
            off = weight - form.values(some, form.codes(some)).reshape(weight.shape)
            return float(np.vdot(off @ second, off)) / size

        old, best = cost(block), form.with_codes(block, mine)
        new = cost(best)
        if scales and (fitted := cost(other := refit(weight, best, form, second))) < new:
            new, best = fitted, other
        errors.append((old, min(old, new)))
        if new < old:
            with open(info.path, "r+b") as file:
                file.seek(tensor.offset)
                file.write(best.tobytes())
    return errors


def _read_blocks(info: GgufInfo, tensor: TensorInfo) -> np.ndarray:
    """Read the blocks of a matrix [R, C]: uint8 [R, C / size, bytes]."""
    raw = np.fromfile(info.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    return raw.reshape(tensor.shape[0], -1, FORMATS[tensor.type].bytes)


class _Moments:
    """Sums of x x' of every input, each once, whatever number of matrices it is given to."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self._input: dict[str, str] = {}
        self._owner: dict[str, str] = {}
        self._waiting: list[tuple[str, np.ndarray]] = []

    def take(self, name: str, of: str, inputs: np.ndarray) -> None:
        """Keep an input, where ``name`` is the first of the matrices that get it, until ``add``.

        Multiplied here, between two of llama.cpp's products, the pass took more than twice as long (54 s, and 22 s so, for
        6,828 tokens): the threads of each library wait busily for more work while those of the other compute.
        """
        self._input[name] = of
        if self._owner.setdefault(of, name) != name:
            return
        self._waiting.append((of, np.array(inputs)))

    def add(self) -> None:
        """Add the x x' of what was kept."""
        for of, x in self._waiting:
            if of in self.sums:
                self.sums[of] += x.T @ x
            else:
                self.sums[of] = x.T @ x
        self._waiting.clear()

    def input_of(self, name: str) -> str | None:
        """Return the name of a matrix's input; None where it was never multiplied."""
        return self._input.get(name)

    def load(self, kept: Kept, tensors: Sequence[TensorInfo]) -> bool:
        """Take the moments of these matrices' inputs from where they are kept; False where any is not there."""
        try:
            self._input = json.loads(kept.get("inputs.json") or b"{}")
            for tensor in tensors:
                of = self._input[tensor.name]
                if of is not None and of not in self.sums:
                    data = kept.get(_piece(of)) or b""
                    self.sums[of] = np.frombuffer(data, dtype=np.float32).reshape(2 * tensor.shape[1:])
        except (KeyError, ValueError):
            self.sums.clear()
            self._input.clear()
            return False
        return True

    def save(self, kept: Kept, names: Collection[str]) -> None:
        """Keep the moments, and which of ``names`` has which input, where the disk has room."""
        if not kept.has_room(sum(second.nbytes for second in self.sums.values())):
            return
        try:
            known = json.loads(kept.get("inputs.json") or b"{}")
        except ValueError:
            known = {}
        known |= {name: self.input_of(name) for name in names}
        pieces = ((_piece(of), second.tobytes()) for of, second in self.sums.items())
        kept.put(itertools.chain(pieces, [("inputs.json", json.dumps(known, sort_keys=True).encode())]))


def _piece(of: str) -> str:
    """Return the name that an input's moments are kept under: llama.cpp's may hold any characters."""
    return f"{digest(of)[:16]}.f32"


def _groups(tensors: Sequence[TensorInfo], memory: int) -> list[list[TensorInfo]]:
    """Cut the matrices into groups whose second moments fit ``memory`` bytes, in file order; one at least in each."""
    groups: list[list[TensorInfo]] = []
    left = 0
    for tensor in tensors:
        need = 4 * tensor.shape[1] ** 2
        if not groups or need > left:
            groups.append([])
            left = memory
        groups[-1].append(tensor)
        left -= need
    return groups
