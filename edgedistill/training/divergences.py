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

``uld`` is no f-divergence: it compares the probabilities of one rank, whatever tokens they are of (``other_tokens.py``), so it
needs both distributions whole, and takes two of different lengths. ``gold`` does so with the tokens that only one of them has.

Sources: Hinton et al. 2015 (forward KL, T^2); MiniLLM, Gu et al. 2023 (reverse KL); GKD, Agarwal et al. 2023
(generalized JSD); DistiLLM, Ko et al. 2024 (skewed KL); Wen et al. 2023 (total variation and f-divergences);
Boizard et al. 2024, arXiv:2402.12030 (ULD).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgedistill.training.objectives import SHARES, DivergenceName

FLOOR = 1e-12
"""Of the bucket's probability in ``gold``, under which no logarithm is taken."""
Parts = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Divergence:
    """One divergence. ``share`` is that of the distribution named first in the mixture: the teacher's in jsd and skew-kl,
    the student's in skew-reverse-kl; None takes the usual one.
    """

    name: DivergenceName = "forward-kl"
    share: float | None = None

    def parts(self, logq: torch.Tensor, logp: torch.Tensor) -> Parts:
        """Return (value, pull) of every outcome of the second distribution, from natural logs of the two probabilities: of one
        shape, but for ``uld`` and ``gold``.
        """
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


def _uld(logq: torch.Tensor, logp: torch.Tensor, _share: float) -> Parts:
    """sum over ranks r of |q_(r) - p_(r)|, the shorter one filled up with zeros: by rank, the p are where q wants them or not.

    Ranks that only q has pull at nothing; they count to the value of the last p.
    """
    ranked, order = logp.exp().sort(-1, descending=True)
    wanted = logq.exp().sort(-1, descending=True).values
    count = ranked.shape[-1]
    beyond = wanted[..., count:].sum(-1, keepdim=True)
    wanted = torch.nn.functional.pad(wanted[..., :count], (0, max(0, count - wanted.shape[-1])))
    gap = ranked - wanted
    value = gap.abs()
    value = torch.cat([value[..., :-1], value[..., -1:] + beyond], -1)
    return tuple(torch.zeros_like(one).scatter(-1, order, one) for one in (value, ranked * gap.sign()))  # pyright: ignore


def _gold(logq: torch.Tensor, logp: torch.Tensor, _share: float) -> Parts:
    """Forward KL over the outcomes that both have, the others as one bucket, + ``uld`` of the others.

    The outcomes of p are the first of q's, -inf where q has none like it; behind them are those that only q has.
    """
    count = logp.shape[-1]
    both = logq[..., :count] > -torch.inf
    q, logq_both = logq[..., :count].exp(), logq[..., :count].masked_fill(~both, 0.0)
    rest = logp.exp().masked_fill(both, 0.0)
    rest_p, rest_q = rest.sum(-1, keepdim=True).clamp_min(FLOOR), logq[..., count:].exp().sum(-1, keepdim=True)
    value, pull = _uld(logq[..., count:], logp.masked_fill(both, -torch.inf), 0.0)
    value = value + (q * (logq_both - logp)).masked_fill(~both, 0.0) + rest * (_log_ratio(rest_q, rest_p) / rest_p)
    return value, pull - q - rest * (rest_q / rest_p)


def _log_ratio(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return q log(q / p), 0 where q is."""
    return q * (q.clamp_min(FLOOR).log() - p.log())


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
    "uld": _uld,
    "gold": _gold,
}
FORWARD_KL = Divergence()
