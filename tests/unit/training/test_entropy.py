"""The teacher's entropy by what is stored of it, against that of whole distributions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from edgedistill.training.draws import sparse_from_logits
from edgedistill.training.entropy import entropies

VOCABULARY = 50


def logits(positions: int) -> torch.Tensor:
    return torch.randn(positions, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


def whole(raw: torch.Tensor) -> np.ndarray:
    logp = raw.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).numpy()


@pytest.mark.parametrize(("kind", "temperature"), [("sampled", 1.0), ("top-sampled", 1.0), ("sampled", 1.3)])
def test_the_mean_over_draws_is_the_entropy(kind: Literal["sampled", "top-sampled"], temperature: float) -> None:
    raw = logits(4).repeat_interleave(500, 0)
    n = 12 if temperature == 1.0 else 60  # re-weighted draws are biased, the less the more there are
    uniform = torch.rand(len(raw), n, generator=torch.Generator().manual_seed(1))
    found = entropies(sparse_from_logits(raw, kind=kind, n=n, temperature=temperature, uniform=uniform), VOCABULARY)
    assert found is not None
    low, high = found
    assert np.array_equal(low, high)
    assert low.reshape(4, -1).mean(1) == pytest.approx(whole(logits(4)), abs=0.06)


@pytest.mark.parametrize("n", [1, 5, VOCABULARY])
def test_the_best_tokens_bound_it(n: int) -> None:
    raw = logits(40)
    found = entropies(sparse_from_logits(raw, kind="top-k", n=n, temperature=1.0), VOCABULARY)
    assert found is not None
    low, high = found
    true = whole(raw)
    assert (low <= true + 1e-3).all() and (true <= high + 1e-3).all()
    if n == VOCABULARY:
        assert low == pytest.approx(true, abs=1e-3) and high == pytest.approx(true, abs=1e-2)


def test_draws_from_afar_say_nothing() -> None:
    uniform = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    assert (
        entropies(sparse_from_logits(logits(3), kind="sampled", n=8, temperature=2.0, uniform=uniform), VOCABULARY)
        is None
    )
