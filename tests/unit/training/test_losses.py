from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.training.divergences import FORWARD_KL
from edgedistill.training.draws import sparse_from_logits
from edgedistill.training.losses import (
    HeadLoss,
    LossTerms,
    batch_targets,
    completion_loss,
    dense_kl,
    sparse_divergence,
)
from tests.unit.training.tiny import VOCAB, zipf_logits


def _head(positions: int = 30, width: int = 32, padded: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, dtype=torch.float64)
    return hidden, torch.randn(VOCAB + padded, width, dtype=torch.float64) * 0.3


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["sampled", "top-k"])
@pytest.mark.parametrize(("kd", "ce"), [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_the_fused_loss_equals_the_plain_one_in_float64(
    kd: float, ce: float, kind: Any, temperature: float, separate: bool, chunk: int, train_head: bool
) -> None:
    """Value and gradients of states and head, with a padded vocabulary and weighted rows."""
    uniform = torch.rand(30, 12, generator=torch.Generator().manual_seed(1))
    soft = sparse_from_logits(
        zipf_logits(30) * 1.5,
        kind=kind,
        n=12,
        temperature=temperature,
        uniform=uniform,  # pyright: ignore
    )
    targets = batch_targets([soft], temperature)
    hidden, head = _head()
    labels = torch.randint(0, VOCAB, (30,))
    weights = torch.rand(30)
    exact_hidden, exact_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = (exact_hidden @ exact_head.T)[:, :VOCAB]
    plain_kd = kd * temperature**2 * (sparse_divergence(targets, logits, FORWARD_KL, temperature) * weights).sum()
    plain_ce = ce * (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    (plain_kd + plain_ce).backward()

    states, weight = hidden.float().requires_grad_(), head.float().requires_grad_(train_head)
    terms = LossTerms(kd=kd, ce=ce, temperature=temperature)
    got_kd, got_ce = HeadLoss.apply(states, weight, None, labels, weights, targets, terms, VOCAB, separate, chunk)
    assert float(got_kd.detach()) == pytest.approx(float(plain_kd.detach()), rel=1e-5, abs=1e-4)
    assert float(got_ce.detach()) == pytest.approx(float(plain_ce.detach()), rel=1e-5, abs=1e-4)
    (got_kd + got_ce).backward()
    _close(states.grad, exact_hidden.grad)
    if train_head:
        _close(weight.grad, exact_head.grad)
        assert weight.grad is not None
        assert (weight.grad[VOCAB:] == 0).all()


def _close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-6 * scale + 1e-7)


def test_terms_kept_apart_have_their_own_gradients() -> None:
    hidden, head = _head()
    targets = batch_targets([sparse_from_logits(zipf_logits(30), kind="top-k", n=8, temperature=1.0)], 1.0)
    labels, weights = torch.randint(0, VOCAB, (30,)), torch.ones(30)
    grads = []
    for kd, ce, separate in ((0.6, 0.4, True), (0.6, 0.0, False), (0.0, 0.4, False)):
        states = hidden.float().requires_grad_()
        pair = HeadLoss.apply(
            states, head.float(), None, labels, weights, targets, LossTerms(kd=kd, ce=ce), VOCAB, separate, 16
        )
        if separate:
            grads.append(torch.autograd.grad(pair[0], states, retain_graph=True)[0])
            grads.append(torch.autograd.grad(pair[1], states)[0])
        else:
            grads.append(torch.autograd.grad(pair[0] + pair[1], states)[0])
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[3])


def test_bf16_keeps_small_gradients() -> None:
    """Near p = 1 the gradient is p - 1: subtracted in float32 before it is rounded, or nothing is left of it."""
    width = 32
    head = torch.zeros(VOCAB, width)
    head[5] = 1.0
    states = torch.full((1, width), 0.4)  # logit 12.8 against 0: p(5) = 0.9992
    exact = states.clone().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ head.T, torch.tensor([5])).backward()
    low = states.bfloat16().requires_grad_()
    pair = HeadLoss.apply(
        low, head.bfloat16(), None, torch.tensor([5]), torch.ones(1), None, LossTerms(), VOCAB, False, 8
    )
    (pair[0] + pair[1]).backward()
    assert low.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(low.grad.float(), exact.grad, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_loss_agrees_with_the_dense_one(temperature: float) -> None:
    """400 draws at 200 positions: the mean difference is inside 4 standard errors, and the spread is a real one."""
    teacher = zipf_logits(200)
    student = teacher + torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(200, 400, generator=torch.Generator().manual_seed(2))
    soft = sparse_from_logits(teacher, kind="sampled", n=400, temperature=temperature, uniform=uniform)
    sparse = sparse_divergence(batch_targets([soft], temperature), student, FORWARD_KL, temperature)
    dense = dense_kl(teacher, student, temperature)
    difference = (sparse - dense).double()
    standard = float(difference.std()) / len(difference) ** 0.5
    assert 0 < standard < 0.02
    assert abs(float(difference.mean())) < 4 * standard


def test_a_model_has_no_divergence_from_itself() -> None:
    logits = zipf_logits(20)
    assert float(dense_kl(logits, logits, 2.0).abs().max()) < 1e-6
    top = batch_targets([sparse_from_logits(logits, kind="top-k", n=16, temperature=2.0)], 2.0)
    assert float(sparse_divergence(top, logits, FORWARD_KL, 2.0).abs().max()) < 1e-5


@given(st.integers(0, 10_000), st.sampled_from([1, 4, 16]))
def test_the_tail_bucket_never_makes_the_divergence_negative_or_larger(seed: int, k: int) -> None:
    """Merging outcomes can only lose divergence (data processing inequality)."""
    rng = np.random.default_rng(seed)
    teacher, student = (torch.from_numpy(rng.normal(0, 2, (4, VOCAB))) for _ in range(2))
    soft = batch_targets([sparse_from_logits(teacher, kind="top-k", n=k, temperature=1.0)], 1.0)
    bucket = sparse_divergence(soft, student, FORWARD_KL)
    assert (bucket > -1e-4).all()
    assert (bucket <= dense_kl(teacher, student) + 1e-3).all()


def test_the_teachers_entropy_is_left_out_where_it_is_not_known() -> None:
    soft = sparse_from_logits(zipf_logits(4), kind="sampled", n=12, temperature=1.0, uniform=torch.rand(4, 12))
    assert batch_targets([soft], 1.31).logq is None
    known = batch_targets([soft], 1.0)
    assert known.logq is not None
    student = zipf_logits(4) + 0.1
    part = sparse_divergence(batch_targets([soft], 1.31), student, FORWARD_KL, 1.31)
    assert (part > sparse_divergence(known, student, FORWARD_KL)).all()


def test_vocabulary_padding_stays_out_of_the_softmax() -> None:
    """A padded row with a huge logit would take all of the probability."""
    hidden, head = _head(4)
    head[VOCAB:] = hidden[:1] * 100
    model = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=head.float(), bias=None))
    labels, weights = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    _, ce = completion_loss(model, hidden.float(), labels, weights, None, LossTerms(), vocab_size=VOCAB)
    plain = torch.nn.functional.cross_entropy((hidden @ head[:VOCAB].T), labels, reduction="sum")
    assert float(ce) == pytest.approx(float(plain), rel=1e-5)
