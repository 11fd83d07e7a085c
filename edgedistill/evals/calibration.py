"""Whether a model's confidence is earned: how sure it is of its first choices, and how often they are right.

Taken at the positions of the references, token by token, from log-probabilities that others have asked for already. Bins and
the expected calibration error as in Guo et al. 2017 (arXiv:1706.04599). The error is biased upwards on few tokens: chance
alone parts a bin's confidence from its accuracy. The signed gap is not, so findings go by the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.evals.statistics import LEVEL, RESAMPLES, Estimate, clustered_mean

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Hold the expected calibration error, ``gap`` (mean confidence less the share that is right: above 0 is too sure) and the
    references' negative log-likelihood, in nats a token. Intervals treat rows as the sample.
    """

    error: Estimate
    gap: Estimate
    nll: Estimate
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        parts = {"error": self.error, "gap": self.gap, "nll": self.nll}
        return {**{name: one.to_json() for name, one in parts.items()}, "tokens": self.tokens}


@dataclass(frozen=True)
class RowConfidence:
    """What one row adds: per bin the sum of confidence less right, its tokens, and its negative log-likelihood."""

    gaps: np.ndarray  # [BINS]
    tokens: int
    nll: float


def confidence(logprobs: np.ndarray, targets: Sequence[int]) -> RowConfidence:
    """Read one row: log-probabilities [positions, vocabulary] and the tokens that came [positions]."""
    wanted = np.asarray(targets)
    first = logprobs.argmax(axis=1)
    places = np.arange(len(wanted))
    sure = np.exp(logprobs[places, first].astype(np.float64))
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, sure - (first == wanted), BINS)
    return RowConfidence(gaps, len(wanted), float(-logprobs[places, wanted].sum(dtype=np.float64)))


def calibration(rows: Sequence[RowConfidence]) -> Calibration:
    """Put rows together."""
    gaps, counts = np.stack([row.gaps for row in rows]), np.asarray([row.tokens for row in rows], dtype=np.float64)
    drawn = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    low, high = np.quantile(
        np.abs(drawn @ gaps).sum(axis=1) / (drawn @ counts), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]
    ).tolist()
    error = Estimate(
        value=float(np.abs(gaps.sum(axis=0)).sum() / counts.sum()),
        low=low,
        high=high,
        n=len(rows),
        method="bootstrap over rows",
    )
    return Calibration(
        error=error,
        gap=clustered_mean(gaps.sum(axis=1), counts)[0],
        nll=clustered_mean([row.nll for row in rows], counts)[0],
        tokens=int(counts.sum()),
    )
