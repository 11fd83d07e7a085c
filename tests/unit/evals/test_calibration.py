"""Calibration from log-probabilities: the textbook's error, one position at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.evals.calibration import BINS, calibration, confidence


def logs(rng: np.random.Generator, positions: int, scale: float = 2.0) -> np.ndarray:
    logits = rng.normal(0, scale, (positions, 7))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 99))
def test_it_is_the_textbooks(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(logs(rng, length), rng.integers(0, 7, length).tolist()) for length in lengths]
    found = calibration([confidence(*row) for row in rows])
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    nll = 0.0
    for table, targets in rows:
        for one, target in zip(table.astype(np.float64), targets, strict=True):
            p = np.exp(one)
            bins[min(int(p.max() * BINS), BINS - 1)].append((p.max(), int(p.argmax()) == target))
            nll -= one[target]
    total = sum(map(len, bins))
    expected = sum(abs(sum(p - right for p, right in one)) for one in bins) / total
    gap = sum(p - right for one in bins for p, right in one) / total
    assert found.tokens == total == sum(lengths)
    assert found.error.value == pytest.approx(expected, abs=1e-9)
    assert found.gap.value == pytest.approx(gap, abs=1e-9)
    assert found.nll.value == pytest.approx(nll / total, rel=1e-6)
    assert found.error.value >= abs(found.gap.value) - 1e-12  # parts of one sign at best
    assert found.gap.low <= found.gap.value <= found.gap.high


def test_a_calibrated_model_is_told_from_one_that_is_too_sure() -> None:
    rng = np.random.default_rng(3)
    tables = [logs(rng, 20) for _ in range(200)]
    drawn = [[int(rng.choice(7, p=np.exp(one) / np.exp(one).sum())) for one in table] for table in tables]
    fair = calibration([confidence(*row) for row in zip(tables, drawn, strict=True)])
    assert fair.gap.low < 0 < fair.gap.high
    assert fair.error.low < 0.03
    sharp = [3 * table for table in tables]
    sharp = [(table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32) for table in sharp]
    sure = calibration([confidence(*row) for row in zip(sharp, drawn, strict=True)])
    assert sure.gap.low > 0.1
    assert sure.error.low > 0.1
    assert json.dumps(sure.to_json(), allow_nan=False)
