"""Divergences between a teacher's distribution q and a student's p, and their gradients in closed form.

All are f-divergences, sums over outcomes j of q_j f(p_j / q_j), so each says two things of an outcome: its share of the
value, and its *pull* p_j dD/dp_j. Where p is a softmax of z, the gradient is

    dD/dz_j = pull_j - p_j sum_k pull_k,

whichever outcomes are known: all of them (dense), some and the rest as one bucket (top-k: a divergence between the two
bucketed distributions, never larger than the dense one), or draws from q (sampled: the sum is the mean over the draws of
f, so each drawn outcome counts by its share of the draws over q_j).

Draws tell nothing of outcomes that the teacher never gives: an estimate of reverse KL or total variation would have its
weight where no draw ever is, so these two are refused there (``objectives.UNSEEN``). Forward KL needs no q_j but the draws;
the others stay bounded by the mixture in their logarithm.

Sources: Hinton et al. 2015 (forward KL, T^2); MiniLLM, Gu et al. 2023 (reverse KL); GKD, Agarwal et al. 2023
(generalized JSD); DistiLLM, Ko et al. 2024 (skewed KL); Wen et al. 2023 (total variation and f-divergences).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgedistill.training.objectives import SHARES, DivergenceName

Parts = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """One divergence. ``share`` is that of the distribution named first in the mixture: the teacher's in jsd and skew-kl,
    the student's in skew-reverse-kl; None takes the usual one.
    """

    name: DivergenceName = "forward-kl"
    share: float | None = None

    def parts(self, logq: torch.Tensor, logp: torch.Tensor) -> Parts:
        """Return (value, pull) of every outcome, from natural logs of the two probabilities, of one shape."""
        share = SHARES.get(self.name, 0.0) if self.share is None else self.share
        return _PARTS[self.name](logq, logp, share)


def _forward(logq: torch.Tensor, logp: torch.Tensor, _share: float) -> Parts:
    q = logq.exp()
    return q * (logq - logp), -q


def _reverse(logq: torch.Tensor, logp: torch.Tensor, _share: float) -> Parts:
    p, ratio = logp.exp(), logp - logq
    return p * ratio, p * (ratio + 1)


def _jsd(logq: torch.Tensor, logp: torch.Tensor, share: float) -> Parts:
    mixed = _mixture(logq, logp, share)
    of_p = (1 - share) * logp.exp() * (logp - mixed)
    return share * logq.exp() * (logq - mixed) + of_p, of_p


def _skew(logq: torch.Tensor, logp: torch.Tensor, share: float) -> Parts:
    """KL(q || share q + (1 - share) p)."""
    mixed = _mixture(logq, logp, share)
    return logq.exp() * (logq - mixed), -(1 - share) * (logq + logp - mixed).exp()


def _skew_reverse(logq: torch.Tensor, logp: torch.Tensor, share: float) -> Parts:
    """KL(p || share p + (1 - share) q)."""
    mixed = _mixture(logp, logq, share)
    p, ratio = logp.exp(), logp - mixed
    return p * ratio, p * (ratio + 1 - share * ratio.exp())


def _tv(logq: torch.Tensor, logp: torch.Tensor, _share: float) -> Parts:
    q, p = logq.exp(), logp.exp()
    return (q - p).abs() / 2, p * (p - q).sign() / 2


def _mixture(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Return log(share exp(first) + (1 - share) exp(second))."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


_PARTS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], Parts]] = {
    "forward-kl": _forward,
    "reverse-kl": _reverse,
    "jsd": _jsd,
    "skew-kl": _skew,
    "skew-reverse-kl": _skew_reverse,
    "tv": _tv,
}
FORWARD_KL = Divergence()
