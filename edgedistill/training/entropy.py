"""How sure the teacher is of its tokens, by the sparse distributions that are stored of it."""

from __future__ import annotations

import numpy as np

from edgedistill.training.objectives import REACH
from edgedistill.training.targets import SparseTargets, reweight


def entropies(targets: SparseTargets, vocab_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return bounds of the entropy of the distribution at T = 1 at each position, in nats: (low, high), float64 [positions].

    Of draws both are the mean of -log p over them, an unbiased estimate (drawn at another temperature: re-weighted, so with a small
    bias); so are they of best ids and draws of the rest. Of the best ids alone: what is left is at least one token's and at most
    spread evenly over all others. None where draws are of a temperature out of reach.
    """
    if targets.kind == "top-k":
        return _bounds(targets, vocab_size)
    if abs(targets.temperature - 1.0) > REACH + 1e-9:
        return None
    draws = targets.as_draws()
    if draws.temperature != 1.0:
        draws, _ = reweight(draws, draws.temperature, 1.0)
    counts = draws.counts.astype(np.float64)
    given = np.bincount(draws.rows, counts, draws.positions)
    found = np.bincount(draws.rows, -counts * draws.logp, draws.positions) / np.maximum(given, 1e-9)
    return found, found


def _bounds(targets: SparseTargets, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    logp = targets.logp.astype(np.float64)
    p = np.exp(logp)
    rest = np.clip(1.0 - np.bincount(targets.rows, p, targets.positions), 0.0, 1.0)
    others = np.maximum(vocab_size - np.diff(targets.offsets), 1)
    low = np.bincount(targets.rows, -p * logp, targets.positions) - rest * np.log(np.maximum(rest, 1e-300))
    return low, low + rest * np.log(others)
