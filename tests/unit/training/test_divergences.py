"""Each divergence against its textbook formula in float64: value and gradient, on dense, cut-off and sampled targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.training.divergences import Divergence
from edgedistill.training.draws import sparse_from_logits
from edgedistill.training.losses import (
    HeadLoss,
    LossTerms,
    batch_targets,
    dense_divergence,
    dense_kl,
    sparse_divergence,
)
from edgedistill.training.objectives import SHARES, UNSEEN, WHOLE, DivergenceName, problem
from edgedistill.training.settings import TrainSettings, check_settings
from tests.unit.training.tiny import VOCAB, make_examples, zipf_logits

NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
EVERY = [Divergence(name) for name in NAMES] + [
    Divergence("jsd", 0.9), Divergence("skew-kl", 0.4), Divergence("skew-reverse-kl", 0.4),
]  # fmt: skip
CUT = [one for one in EVERY if one.name not in WHOLE]
SEEN = [one for one in CUT if one.name not in UNSEEN]


def textbook(q: torch.Tensor, p: torch.Tensor, one: Divergence) -> torch.Tensor:
    """Compute the divergence of each row from plain probabilities."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    share = SHARES.get(one.name, 0.0) if one.share is None else one.share
    formulas: dict[str, Callable[[], torch.Tensor]] = {
        "forward-kl": lambda: kl(q, p),
        "reverse-kl": lambda: kl(p, q),
        "jsd": lambda: share * kl(q, share * q + (1 - share) * p) + (1 - share) * kl(p, share * q + (1 - share) * p),
        "skew-kl": lambda: kl(q, share * q + (1 - share) * p),
        "skew-reverse-kl": lambda: kl(p, share * p + (1 - share) * q),
        "tv": lambda: (q - p).abs().sum(-1) / 2,
        "uld": lambda: (q.sort(-1).values - p.sort(-1).values).abs().sum(-1),
        "gold": lambda: kl(q, p),  # of the same tokens; others are in test_other_tokens.py
    }
    return formulas[one.name]()


def logits(positions: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return zipf_logits(positions).double() + torch.randn(positions, VOCAB, generator=rng, dtype=torch.float64)


def assert_same(kd: torch.Tensor, want: torch.Tensor, states: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare the fused value with the plain one, and the gradients that both left behind."""
    assert float(kd.detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-5)
    assert states.grad is not None and exact.grad is not None
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(states.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * scale)


def label(one: Divergence) -> str:
    return one.name + ("" if one.share is None else f"-{one.share:g}")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("one", EVERY, ids=label)
def test_dense_is_the_textbooks(one: Divergence, temperature: float) -> None:
    teacher, student = logits(12, 1), logits(12, 2).requires_grad_()
    q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    want = textbook(q, p, one)
    torch.testing.assert_close(dense_divergence(teacher, student, one, temperature), want, rtol=1e-9, atol=1e-12)
    if one.name == "forward-kl":
        torch.testing.assert_close(dense_kl(teacher, student, temperature), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("one", EVERY, ids=label)
def test_the_pull_gives_the_gradient(one: Divergence) -> None:
    teacher, student = logits(12, 3), logits(12, 4).requires_grad_()
    logp = torch.log_softmax(student, -1)
    _, pull = one.parts(torch.log_softmax(teacher, -1), logp)
    (want,) = torch.autograd.grad(textbook(torch.softmax(teacher, -1), logp.exp(), one).sum(), student)
    got = pull - logp.exp() * pull.sum(-1, keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("one", "kind"),
    [(one, "top-k") for one in CUT] + [(one, "sampled") for one in SEEN],
    ids=lambda value: label(value) if isinstance(value, Divergence) else value,
)
def test_the_fused_loss_is_the_plain_one(one: Divergence, kind: Any, temperature: float, separate: bool) -> None:
    """Value and gradient of the states; padded vocabulary, weighted rows, several chunks."""
    uniform = torch.rand(30, 12, generator=torch.Generator().manual_seed(1))
    soft = sparse_from_logits(
        zipf_logits(30), kind=kind, n=12, temperature=temperature, uniform=uniform if kind == "sampled" else None
    )
    targets = batch_targets([soft], temperature)
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 32, dtype=torch.float64), torch.randn(VOCAB + 16, 32, dtype=torch.float64) * 0.3
    labels, weights = torch.randint(0, VOCAB, (30,)), torch.rand(30)
    exact = hidden.clone().requires_grad_()
    plain = (exact @ head.T)[:, :VOCAB]
    want_kd = 0.7 * temperature**2 * (sparse_divergence(targets, plain, one, temperature) * weights).sum()
    want_ce = 0.3 * (torch.nn.functional.cross_entropy(plain, labels, reduction="none") * weights).sum()
    (want_kd + want_ce).backward()
    states = hidden.float().requires_grad_()
    terms = LossTerms(kd=0.7, ce=0.3, temperature=temperature, divergence=one)
    kd, ce = HeadLoss.apply(states, head.float(), None, labels, weights, targets, terms, VOCAB, separate, 7)
    (kd + ce).backward()
    assert_same(kd, want_kd, states, exact)


@pytest.mark.parametrize("one", CUT, ids=label)
def test_a_bucket_is_one_outcome(one: Divergence) -> None:
    """The divergence of cut-off targets is the textbook's between the two bucketed distributions."""
    teacher, student = logits(9, 5), logits(9, 6)
    soft = sparse_from_logits(teacher.float(), kind="top-k", n=16, temperature=1.0)
    ids = torch.from_numpy(soft.ids.reshape(9, 16)).long()
    both = []
    for one_logits in (teacher, student):
        p = torch.softmax(one_logits, -1)
        kept = p.gather(1, ids)
        both.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))
    got = sparse_divergence(batch_targets([soft], 1.0), student, one)
    torch.testing.assert_close(got, textbook(both[0], both[1], one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("one", SEEN, ids=label)
def test_draws_estimate_value_and_gradient(one: Divergence, temperature: float) -> None:
    """The mean over 200 positions of 400 draws each is inside 4 standard errors of the dense one, value and gradient."""
    teacher = zipf_logits(200)
    student = (teacher + torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(3))).requires_grad_()
    uniform = torch.rand(200, 400, generator=torch.Generator().manual_seed(2))
    soft = sparse_from_logits(teacher, kind="sampled", n=400, temperature=temperature, uniform=uniform)
    sparse = sparse_divergence(batch_targets([soft], temperature), student, one, temperature)
    dense = dense_divergence(teacher, student, one, temperature)
    of_sparse = torch.autograd.grad(sparse.sum(), student, retain_graph=True)[0]
    of_dense = torch.autograd.grad(dense.sum(), student)[0]
    # Of the gradient, the component along the dense one: what a step in its direction would gain.
    along = ((of_sparse - of_dense) * of_dense).sum(-1) / of_dense.norm(dim=-1)
    for difference in ((sparse - dense).detach().double(), along.double()):
        standard = float(difference.std()) / len(difference) ** 0.5
        assert 0 < standard < 0.02
        assert abs(float(difference.mean())) < 4 * standard


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), at=st.integers(0, len(EVERY) - 1), k=st.sampled_from([1, 4, 16]))
def test_never_negative_zero_at_home_and_never_more_for_a_bucket(seed: int, at: int, k: int) -> None:
    one, teacher, student = EVERY[at], logits(4, seed), logits(4, seed + 1)
    dense = dense_divergence(teacher, student, one)
    assert (dense > -1e-12).all()
    assert float(dense_divergence(teacher, teacher, one).abs().max()) < 1e-12
    if one.name in WHOLE:
        return
    soft = batch_targets([sparse_from_logits(teacher.float(), kind="top-k", n=k, temperature=1.0)], 1.0)
    bucket = sparse_divergence(soft, student, one)
    assert (bucket > -1e-4).all()
    assert (bucket <= dense + 1e-3).all()


def test_far_apart_nothing_overflows() -> None:
    teacher = torch.zeros(2, VOCAB)
    teacher[:, 0] = 200.0
    student = torch.zeros(2, VOCAB)
    student[:, 1] = 200.0
    for one in EVERY:
        value, pull = one.parts(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))
        assert torch.isfinite(value).all() and torch.isfinite(pull).all(), one


def test_the_symmetric_and_the_limits() -> None:
    teacher, student = logits(6, 7), logits(6, 8)

    def value(a: torch.Tensor, b: torch.Tensor, *one: Any) -> torch.Tensor:
        return dense_divergence(a, b, Divergence(*one))

    torch.testing.assert_close(value(teacher, student, "jsd"), value(student, teacher, "jsd"))
    torch.testing.assert_close(value(teacher, student, "reverse-kl"), value(student, teacher, "forward-kl"))
    torch.testing.assert_close(
        value(teacher, student, "skew-kl", 1e-9), value(teacher, student, "forward-kl"), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        value(teacher, student, "skew-reverse-kl", 1e-9), value(teacher, student, "reverse-kl"), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reverse-kl", None, "sampled", 1.0), "never says"),
        (("tv", None, "sampled", 1.0), "never says"),
        (("jsd", None, "sampled", 1.31), "temperature 1.31"),
        (("forward-kl", 0.5, "sampled", 1.0), "no mixture"),
        (("jsd", 1.0, "top-k", 1.0), "between 0 and 1"),
        (("uld", None, "top-k", 1.0), "does not keep it"),
        (("uld", None, "sampled", 1.0), "does not keep it"),
        (("uld", None, "top-sampled", 1.0), "does not keep it"),
    ],
)
def test_what_is_not_defined_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    found = problem(*arguments)
    assert found is not None and words in found[0] and found[1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_defined_is_not(name: DivergenceName) -> None:
    assert problem(name, None, "dense", 2.0) is None
    assert (problem(name, None, "top-k", 2.0) is None) == (name not in WHOLE)
    assert (problem(name, None, "sampled", 2.0) is None) == (name not in (*UNSEEN, *WHOLE))


def test_training_refuses_it_too() -> None:
    examples = make_examples(2)
    count = sum(len(one.completion_ids) for one in examples[:1])
    uniform = torch.rand(count, 4, generator=torch.Generator().manual_seed(1))
    soft = sparse_from_logits(zipf_logits(count), kind="sampled", n=4, temperature=1.0, uniform=uniform)
    wanted = TrainSettings(loss=LossTerms(kd=1.0, ce=0.0, divergence=Divergence("tv")))
    with pytest.raises(UsageError, match="never says"):
        check_settings(wanted, examples[:1], [soft], "cpu")
    check_settings(
        replace(wanted, loss=LossTerms(kd=1.0, ce=0.0, divergence=Divergence("jsd"))), examples[:1], [soft], "cpu"
    )
