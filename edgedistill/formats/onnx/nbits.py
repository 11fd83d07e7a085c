"""MatMulNBits: put codes, scales and zero points into the bytes that ONNX Runtime multiplies by, and choose them.

A weight is ``scale * (code - zero)``; where no zero point is stored it is 8 of 4 bits and 128 of 8. Layout (onnxruntime,
docs/ContribOperators.md, com.microsoft.MatMulNBits): codes uint8 [rows, blocks, block * bits / 8], the lower half of a byte
first; scales float32 [rows, blocks]; zero points uint8 [rows, bytes], packed as the codes are. GatherBlockQuantized reads the same
bytes as an embedding.

Codes are rounded so that each makes good the errors of those before it, as ``formats.gguf.rounding`` does it for GGUF, and
the scales, which are float32 here, are then fitted to the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgedistill.formats.gguf.blocks import BlockFormat
from edgedistill.formats.gguf.rounding import DAMPING, feed_back, inverse_factor
from edgedistill.formats.onnx.types import Kind

_ROWS = 2048  # whose scales are looked for at once
_SYMMETRIC = np.linspace(-1.0, 2.0, 9)  # steps by which the greatest weight of a block may lie beyond its last code
_SHRUNK = np.linspace(1.0, 0.72, 8)  # of the range of a block
_SYSTEMS = 2**26  # bytes of the equations that are solved at once
ROUNDS = 2  # of feedback and fitting


@dataclass(frozen=True)
class Coded:
    """A matrix of ``columns``: ``codes`` uint8 [R, blocks * block], ``scales`` float32 [R, blocks], ``zeros`` uint8 [R, blocks]."""

    kind: Kind
    columns: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self) -> np.ndarray:
        """Return the weights that it stands for, float32 [R, columns]."""
        rows, blocks = self.scales.shape
        levels = self.codes.reshape(rows, blocks, -1).astype(np.float32) - self.zeros[..., None]
        return (levels * self.scales[..., None]).reshape(rows, -1)[:, : self.columns]

    def packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return codes, scales and zero points as the operator reads them; no zero points where the kind has none."""
        rows, blocks = self.scales.shape
        codes = pack(self.codes, self.kind.bits).reshape(rows, blocks, -1)
        return codes, self.scales, pack(self.zeros, self.kind.bits) if self.kind.zeros else None

    @classmethod
    def of(cls, kind: Kind, columns: int, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> Coded:
        """Read what ``packed`` returns, or a builder wrote."""
        rows = len(codes)
        scales = np.asarray(scales, dtype=np.float32).reshape(rows, -1)
        width = scales.shape[1]
        codes = unpack(codes.reshape(rows, -1), kind.bits, width * kind.block)
        if zeros is None:
            found = np.full(scales.shape, 2 ** (kind.bits - 1), dtype=np.uint8)
        else:
            found = unpack(zeros.reshape(rows, -1), kind.bits, width)
        return cls(kind, columns, codes, scales, found)

    def rows(self, start: int, end: int) -> Coded:
        """Return some of its rows."""
        return Coded(self.kind, self.columns, self.codes[start:end], self.scales[start:end], self.zeros[start:end])


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Put codes uint8 [R, C] of 4 or 8 bits into bytes [R, ceil(C * bits / 8)]."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def unpack(raw: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Return the codes, uint8 [R, columns], in bytes [R, ...]."""
    if bits == 8:
        return raw[:, :columns]
    return np.stack([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1).reshape(len(raw), -1)[:, :columns]


def nearest(weights: np.ndarray, kind: Kind, importance: np.ndarray | None = None, *, every: int = 1) -> Coded:
    """Round weights [R, C] to the nearest codes, under the scale of each block that the errors, weighed by what each column's count
    (``importance`` [C]), are least for. With ``every`` 2 half as many scales are tried, and errors are 0.01 larger.
    """
    rows, columns = weights.shape
    width = kind.blocks(columns) * kind.block
    counts = np.zeros(width, dtype=np.float32)
    counts[:columns] = 1.0 if importance is None else importance / max(float(importance.mean()), 1e-30) + 1e-4
    counts = counts.reshape(-1, kind.block)
    found = []
    for start in range(0, rows, _ROWS):
        part = np.zeros((min(_ROWS, rows - start), width), dtype=np.float32)
        part[:, :columns] = weights[start : start + _ROWS]
        found.append(_search(part.reshape(len(part), -1, kind.block), kind, counts, every))
    codes, scales, zeros = (np.concatenate(some) for some in zip(*found, strict=True))
    return Coded(kind, columns, codes.reshape(rows, width), scales, zeros)


def _search(part: np.ndarray, kind: Kind, counts: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes [R, B, block], scales and zero points [R, B] of weights [R, B, block]."""
    most, middle = 2**kind.bits - 1, 2 ** (kind.bits - 1)
    tries: list[tuple[np.ndarray, np.ndarray]] = []
    if kind.zeros:
        low, high = np.minimum(part.min(-1), 0), np.maximum(part.max(-1), 0)
        for share in _SHRUNK[::every]:
            scale = (high - low) * np.float32(share / most)
            tries.append((scale, np.clip(np.rint(-low * np.float32(share) / _safe(scale)), 0, most)))
    else:
        at = np.abs(part).argmax(-1, keepdims=True)
        peak = np.take_along_axis(part, at, -1)[..., 0]
        steps = _SYMMETRIC[::every] if kind.bits == 4 else (-1.0, 0.0)
        tries = [(peak / np.float32(-(middle + step)), np.full(peak.shape, middle, np.float32)) for step in steps]
    best = np.full(part.shape[:2], np.inf, dtype=np.float32)
    codes = np.zeros(part.shape, dtype=np.uint8)
    scales, zeros = np.zeros_like(best), np.full(best.shape, middle, dtype=np.uint8)
    for scale, zero in tries:
        level = np.rint(part / _safe(scale)[..., None]) + zero[..., None]
        level = np.clip(level, 0, most, out=level)
        code = level.astype(np.uint8)
        level -= zero[..., None]
        weighed = level * counts
        own, of = np.einsum("rbg,rbg->rb", weighed, level), np.einsum("rbg,rbg->rb", weighed, part)
        scale = np.where(own > 0, of / np.where(own > 0, own, 1), scale).astype(np.float32)  # the best for these codes
        error = np.square(part - level * scale[..., None])
        cost = np.einsum("rbg,bg->rb", error, counts)
        better = cost < best
        best = np.where(better, cost, best)
        codes[better], scales[better] = code[better], scale[better]
        zeros[better] = zero[better].astype(np.uint8)
    return codes, scales, zeros


def _safe(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale)


def cost(weights: np.ndarray, coded: Coded, second: np.ndarray) -> float:
    """Return the squared error of the products with inputs of second moments [C, C]."""
    off = weights - coded.values()
    return float(np.vdot(off @ second, off))


class Feedback:
    """What rounding needs to know of the inputs of one matrix, worked out once for all kinds. ``second``: [C, C]."""

    def __init__(self, second: np.ndarray) -> None:
        self.second = second.astype(np.float32)
        self._factors: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _padded(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the moments of rows padded to ``width`` columns, the order of these and the factor of ``inverse_factor``."""
        if width not in self._factors:
            full = np.pad(self.second, (0, width - len(self.second)))
            self._factors[width] = (full, *inverse_factor(full))
        return self._factors[width]

    def round(self, weights: np.ndarray, kind: Kind) -> tuple[Coded, float, float]:
        """Return weights [R, C] in codes, what rounding to nearest would cost, and what these do: never more."""
        best = nearest(weights, kind, self.second.diagonal())
        before = least = cost(weights, best, self.second)
        full, order, factor = self._padded(best.codes.shape[1])
        padded = np.pad(weights, ((0, 0), (0, best.codes.shape[1] - weights.shape[1])))
        coded = best
        for _ in range(ROUNDS):
            coded = _fitted(padded, _fed_back(padded, coded, order, factor), full)
            if not (after := cost(weights, coded, self.second)) < least:
                break
            best, least = coded, after
        return best, before, least


def _fed_back(weights: np.ndarray, coded: Coded, order: np.ndarray, factor: np.ndarray) -> Coded:
    """Choose the codes anew under the scales and zero points of ``coded``."""
    levels = np.arange(2**coded.kind.bits, dtype=np.float32)
    offset = -coded.scales * coded.zeros.astype(np.float32)
    form = BlockFormat(coded.kind.block, coded.kind.block, 0, levels, (), scales=lambda _: (coded.scales, offset))
    codes = feed_back(weights, coded.scales, form, order, factor)
    return Coded(coded.kind, coded.columns, codes.reshape(weights.shape), coded.scales, coded.zeros)


def _fitted(weights: np.ndarray, coded: Coded, second: np.ndarray) -> Coded:
    """Fit the scales of a row together to its codes, by least squares under second moments [C, C]: the s that
    (w - s B) H (w - s B)' is least for, B the levels of each block and 0 elsewhere.
    """
    rows, count = coded.scales.shape
    block = coded.kind.block
    full = second.copy()
    full.flat[:: len(full) + 1] += np.float32(DAMPING) * full.diagonal().mean()
    scales, some = coded.scales.copy(), max(1, _SYSTEMS // (8 * count**2))
    for start in range(0, rows, some):
        part = coded.codes[start : start + some].reshape(-1, count, block).astype(np.float32)
        part -= coded.zeros[start : start + some, :, None]
        inner = np.empty((len(part), count, count), dtype=np.float64)
        for at in range(count):
            moved = (part[:, at] @ full[at * block : (at + 1) * block]).reshape(len(part), count, block)
            inner[:, at] = np.einsum("rbg,rbg->rb", moved, part)
        asked = (weights[start : start + some] @ full).reshape(len(part), count, block)
        asked = np.einsum("rbg,rbg->rb", asked, part).astype(np.float64)
        own = inner[:, range(count), range(count)]
        empty = own <= 0  # a block of zeros, whatever its scale is
        inner[:, range(count), range(count)] += np.where(empty, 1.0, 1e-6 * own)
        asked += 1e-6 * own * coded.scales[start : start + some]
        found = np.linalg.solve(inner, asked[..., None])[..., 0]
        scales[start : start + some] = np.where(empty, scales[start : start + some], found)
    return Coded(coded.kind, coded.columns, coded.codes, scales, coded.zeros)
