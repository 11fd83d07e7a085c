"""Blocks are taken apart and put together as ggml does it, for every type whose codes are chosen anew."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.formats.gguf.blocks import FORMATS
from edgedistill.formats.gguf.types import FINELY_ROUNDED, GGML_TYPES
from tests.unit.formats.gguf.ggml_blocks import dequantized, quantized

NAMES = st.sampled_from(FINELY_ROUNDED)
SEEDS = st.integers(0, 2**32 - 1)
ROWS, COLUMNS = 3, 512


def by_ggml(name: str, seed: int) -> np.ndarray:
    """Make blocks by ggml, of random weights of several sizes, with outliers and a block of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(3, (ROWS, COLUMNS)) * 10.0 ** rng.uniform(-4, 1, (ROWS, 1))
    weights += rng.choice([0.0, 0.05])  # all to one side: offsets that count
    weights[0, :256] = 0
    return quantized(name, weights.astype(np.float32), rng.gamma(1, 1, COLUMNS).astype(np.float32))


def test_the_plan_and_the_code_know_the_same_types() -> None:
    assert tuple(FORMATS) == FINELY_ROUNDED
    for name, form in FORMATS.items():
        assert (form.size, form.bytes) == (GGML_TYPES[name].block, GGML_TYPES[name].bytes)
        assert sum(field.bytes for field in form.fields) == form.size * sum(field.bits for field in form.fields) // 8


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=NAMES)
def test_what_ggml_wrote_is_read_and_written_back(seed: int, name: str) -> None:
    form, raw = FORMATS[name], by_ggml(name, seed)
    codes = form.codes(raw)
    assert codes.shape == (*raw.shape[:2], form.size) and form.lowest <= codes.min() and codes.max() < len(form.levels)
    assert (form.with_codes(raw, codes) == raw).all()
    ours = form.values(raw, codes).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(ours, dequantized(name, raw))
    np.testing.assert_array_equal(ours, dequantize(raw.reshape(ROWS, -1), GGMLQuantizationType[name]))


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=NAMES)
def test_other_codes_change_the_weights_and_nothing_else(seed: int, name: str) -> None:
    form, raw = FORMATS[name], by_ggml(name, seed)
    other = np.random.default_rng(seed).integers(form.lowest, len(form.levels), form.codes(raw).shape).astype(np.uint8)
    changed = form.with_codes(raw, other)
    assert (form.codes(changed) == other).all()
    for was, now in zip(form.scales(raw), form.scales(changed), strict=True):
        np.testing.assert_array_equal(was, now)
    np.testing.assert_array_equal(form.values(raw, other).reshape(ROWS, COLUMNS), dequantized(name, changed))
    # Every byte that holds no code is as it was.
    codes = np.zeros(form.bytes, dtype=bool)
    for field in form.fields:
        codes[field.at : field.at + field.bytes] = True
    assert (changed[..., ~codes] == raw[..., ~codes]).all()


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, name=NAMES)
def test_any_bytes_are_read_as_ggml_reads_them(seed: int, name: str) -> None:
    form, rng = FORMATS[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (ROWS, 2, form.bytes), dtype=np.uint8)
    for at in form.halves:  # finite, of either sign
        raw[..., at : at + 2] = rng.normal(0, 0.1, (ROWS, 2, 1)).astype(np.float16).view(np.uint8)
    codes = form.codes(raw)
    np.testing.assert_array_equal(form.values(raw, codes).reshape(ROWS, -1), dequantized(name, raw))
    assert (form.with_codes(raw, codes) == raw).all()


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_nearest_is_the_nearest_level(name: str) -> None:
    form = FORMATS[name]
    levels = form.levels[form.lowest :]
    values = np.random.default_rng(1).normal(0, 1, 2000).astype(np.float32) * abs(levels).max()
    best = np.abs(values[:, None] - levels).min(1)
    np.testing.assert_allclose(np.abs(values - form.levels[form.nearest(values)]), best, rtol=1e-5)
    assert (form.nearest(levels) == np.arange(form.lowest, len(form.levels))).all()
