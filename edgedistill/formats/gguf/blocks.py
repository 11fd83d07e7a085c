"""Take the blocks of a quantized GGUF apart: codes, and the scale and offset that each group of them has; and put other
codes in.

A block of 32 weights has one scale, perhaps an offset. A block of 256 (k-quants, IQ4_XS) has groups of 16 or 32 weights,
whose scales are small whole numbers times the block's own. In all of them a weight is ``scale * levels[code] + offset``, and
its code lies in one or two fields of equal bits. Layouts: ggml-common.h of llama.cpp, ``block_q4_0`` and so on.

Left out are the types whose code is no number of one weight: IQ1, IQ2 and IQ3 take 4 or 8 weights at once from a table; and
those for ternary models, which leave an ordinary one no sense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LONG = 256  # weights of a block of groups
Scales = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Field:
    """Where ``bits`` bits of every code lie: ``bytes`` bytes from ``at`` on. ``run`` bytes hold the lowest bits of so many
    weights, in the next bits those of the ``run`` weights after them, and so on; then come the next ``run`` bytes.
    """

    at: int
    bytes: int
    bits: int
    run: int

    def read(self, blocks: np.ndarray) -> np.ndarray:
        """Return the bits of blocks uint8 [..., bytes]: uint8 [..., weights]."""
        raw = blocks[..., self.at : self.at + self.bytes]
        runs = raw.reshape(*raw.shape[:-1], -1, 1, self.run) >> self._shifts
        return (runs & np.uint8(2**self.bits - 1)).reshape(*raw.shape[:-1], -1)

    def write(self, blocks: np.ndarray, values: np.ndarray) -> None:
        """Put bits of ``values``, uint8 [..., weights], into ``blocks``; those above ``bits`` are left out."""
        low = values & np.uint8(2**self.bits - 1)
        runs = low.reshape(*low.shape[:-1], -1, len(self._shifts), self.run) << self._shifts
        raw = np.bitwise_or.reduce(runs, axis=-2)
        blocks[..., self.at : self.at + self.bytes] = raw.reshape(*raw.shape[:-2], -1)

    @property
    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """A type: ``size`` weights in ``bytes`` bytes, each ``group`` of them with a scale and an offset of its own, which
    ``scales`` reads: float32 [..., size / group] each, of blocks uint8 [..., bytes].

    ``levels``, ascending, are the values of the codes; ``fields`` are the codes' bits, low ones first.
    """

    size: int
    group: int
    bytes: int
    levels: np.ndarray
    fields: tuple[Field, ...]
    scales: Scales
    lowest: int = 0  # the first code that ggml writes
    halves: tuple[int, ...] = (0,)  # where the float16 lie that the scales, and then the offsets, are multiples of

    def codes(self, blocks: np.ndarray) -> np.ndarray:
        """Return the codes, uint8 [..., size], of blocks uint8 [..., bytes]."""
        first, *rest = self.fields
        codes, shift = first.read(blocks), first.bits
        for field in rest:
            codes |= field.read(blocks) << np.uint8(shift)
            shift += field.bits
        codes ^= self._flip
        return codes

    def with_codes(self, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the blocks with other codes, uint8 [..., size]; scales as they were."""
        out, rest = blocks.copy(), codes ^ self._flip
        for field in self.fields:
            field.write(out, rest)
            rest = rest >> np.uint8(field.bits) if field.bits < 8 else rest
        return out

    def values(self, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return the weights, float32 [..., size], that ``codes`` [..., size] stand for under the scales of ``blocks``."""
        scale, offset = self.scales(blocks)
        levels = self.levels[codes].reshape(*scale.shape, self.group)
        return (levels * scale[..., None] + offset[..., None]).reshape(codes.shape)

    def bases(self, blocks: np.ndarray) -> np.ndarray:
        """Return the float16 of ``halves``, as float32 [..., halves]."""
        return np.concatenate([_half(blocks, at) for at in self.halves], axis=-1)

    def multiples(self, blocks: np.ndarray) -> np.ndarray:
        """Return what the groups' scales, and then their offsets, are the bases times: float32 [..., halves, size / group].

        They are whole numbers, so that a base times its multiple is the scale that ggml computes, to the last bit.
        """
        units = self.with_bases(blocks, np.ones((*blocks.shape[:-1], len(self.halves)), dtype=np.float16))
        return np.stack(self.scales(units)[: len(self.halves)], axis=-2)

    def with_bases(self, blocks: np.ndarray, bases: np.ndarray) -> np.ndarray:
        """Return the blocks with other bases, float16 [..., halves]; codes and multiples as they were."""
        out = blocks.copy()
        for index, at in enumerate(self.halves):
            out[..., at : at + 2] = np.ascontiguousarray(bases[..., index, None], dtype=np.float16).view(np.uint8)
        return out

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """Return the codes whose levels are nearest to ``values`` (weights less offset, over scale)."""
        if self.levels is _IQ4:
            return np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, values).astype(np.uint8)
        codes = np.rint(values - self.levels[0])
        return np.clip(codes, self.lowest, len(self.levels) - 1, out=codes).astype(np.uint8)

    @property
    def _flip(self) -> np.uint8:
        # A field of 8 bits is a signed byte; codes ascend with their levels.
        return np.uint8(128 if self.fields[0].bits == 8 else 0)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at a byte of every block, as float32 [..., 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _alone(at: int) -> Scales:
    """Read one scale and no offset."""

    def read(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = _half(blocks, at)
        return scale, np.zeros_like(scale)

    return read


def _pair(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = blocks[..., :16]
    scale = _half(blocks, 80) * (both & 15).astype(np.float32)
    return scale, -(_half(blocks, 82) * (both >> 4).astype(np.float32))


def _q3_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = Field(96, 8, 4, 8).read(blocks)
    high = Field(104, 4, 2, 4).read(blocks)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    return scale, np.zeros_like(scale)


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read Q4_K's and Q5_K's: 6 bits each; those of the last four groups lie in the last four bytes and in the two bits
    that the first eight leave free.
    """
    first, second, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=-1)
    least = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=-1)
    return _half(blocks, 0) * scale.astype(np.float32), -(_half(blocks, 2) * least.astype(np.float32))


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = _half(blocks, 208) * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return scale, np.zeros_like(scale)


def _iq4_xs(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = Field(4, 4, 4, 1).read(blocks), Field(2, 2, 2, 1).read(blocks)
    scale = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
    return scale, np.zeros_like(scale)


def _from(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.float32)


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)  # kvalues_iq4nl
FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 32, 18, _from(-8, 16), (Field(2, 16, 4, 16),), _alone(0)),
    "Q4_1": BlockFormat(32, 32, 20, _from(0, 16), (Field(4, 16, 4, 16),), _pair, halves=(0, 2)),
    "Q5_0": BlockFormat(32, 32, 22, _from(-16, 32), (Field(6, 16, 4, 16), Field(2, 4, 1, 1)), _alone(0)),
    "Q5_1": BlockFormat(32, 32, 24, _from(0, 32), (Field(8, 16, 4, 16), Field(4, 4, 1, 1)), _pair, halves=(0, 2)),
    "IQ4_NL": BlockFormat(32, 32, 18, _IQ4, (Field(2, 16, 4, 16),), _alone(0)),
    "Q8_0": BlockFormat(32, 32, 34, _from(-128, 256), (Field(2, 32, 8, 32),), _alone(0), lowest=1),
    "Q2_K": BlockFormat(LONG, 16, 84, _from(0, 4), (Field(16, 64, 2, 32),), _q2_k, halves=(80, 82)),
    "Q3_K": BlockFormat(LONG, 16, 110, _from(-4, 8), (Field(32, 64, 2, 32), Field(0, 32, 1, 32)), _q3_k, halves=(108,)),
    "Q4_K": BlockFormat(LONG, 32, 144, _from(0, 16), (Field(16, 128, 4, 32),), _q4_k, halves=(0, 2)),
    "Q5_K": BlockFormat(
        LONG, 32, 176, _from(0, 32), (Field(48, 128, 4, 32), Field(16, 32, 1, 32)), _q4_k, halves=(0, 2)
    ),
    "Q6_K": BlockFormat(
        LONG, 16, 210, _from(-32, 64), (Field(0, 128, 4, 64), Field(128, 64, 2, 32)), _q6_k, halves=(208,)
    ),
    "IQ4_XS": BlockFormat(LONG, 32, 136, _IQ4, (Field(8, 128, 4, 16),), _iq4_xs),
}
