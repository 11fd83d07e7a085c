"""A teacher in memory teaches its whole distribution: the dense reference's values and gradients, in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgedistill.training.dense import DenseTargets, DenseTeacher
from edgedistill.training.divergences import Divergence
from edgedistill.training.losses import HeadLoss, LossTerms, dense_divergence
from edgedistill.training.packing import make_batch
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.test_divergences import EVERY, assert_same, label
from tests.unit.training.tiny import VOCAB, make_examples, make_llama

KD = LossTerms(kd=1.0, ce=0.0)
SETTINGS = TrainSettings(
    method="full", lr=2e-3, steps=8, batch_size=4, dtype="float32", schedule="constant", warmup=0.0, loss=KD
)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("one", EVERY, ids=label)
def test_the_fused_loss_is_the_dense_one_in_float64(one: Divergence, temperature: float, separate: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 32, dtype=torch.float64), torch.randn(VOCAB + 16, 32, dtype=torch.float64) * 0.3
    taught, their_head = torch.randn(30, 48, dtype=torch.float64), torch.randn(VOCAB, 48, dtype=torch.float64) * 0.3
    labels, weights = torch.randint(0, VOCAB, (30,)), torch.rand(30)
    exact = hidden.clone().requires_grad_()
    plain = (exact @ head.T)[:, :VOCAB]
    want_kd = 0.7 * temperature**2 * (dense_divergence(taught @ their_head.T, plain, one, temperature) * weights).sum()
    want_ce = 0.3 * (torch.nn.functional.cross_entropy(plain, labels, reduction="none") * weights).sum()
    (want_kd + want_ce).backward()
    states = hidden.float().requires_grad_()
    targets = DenseTargets(taught.float(), their_head.float(), None)
    terms = LossTerms(kd=0.7, ce=0.3, temperature=temperature, divergence=one)
    kd, ce = HeadLoss.apply(states, head.float(), None, labels, weights, targets, terms, VOCAB, separate, 7)
    (kd + ce).backward()
    assert_same(kd, want_kd, states, exact)


@pytest.mark.parametrize("packed", [True, False])
def test_it_reads_what_the_student_reads(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are those of each row run alone, at the positions that predict its completion."""
    if not packed:
        monkeypatch.setattr("edgedistill.training.packing.packable", lambda _model: False)
    model, examples = make_llama(2), make_examples(5)
    teacher = DenseTeacher(model, VOCAB)
    teacher.to("cpu", torch.float32)
    found = teacher.targets(make_batch(examples, packed=packed))
    with torch.no_grad():
        want = [
            model(input_ids=torch.tensor([[*one.prompt_ids, *one.completion_ids]])).logits[
                0, len(one.prompt_ids) - 1 : -1, :VOCAB
            ]
            for one in examples
        ]
    torch.testing.assert_close(found.logits(0, len(found.states)), torch.cat(want), rtol=1e-4, atol=1e-4)


def test_a_trimmed_student_sees_the_kept_tokens_alone() -> None:
    model, examples = make_llama(2), make_examples(4)
    kept = sorted({token for one in examples for token in (*one.prompt_ids, *one.completion_ids)} | set(range(40)))
    number = {token: at for at, token in enumerate(kept)}
    small = [
        type(one)(one.id, tuple(number[t] for t in one.prompt_ids), tuple(number[t] for t in one.completion_ids))
        for one in examples
    ]
    whole, trimmed = DenseTeacher(model, VOCAB), DenseTeacher(model, len(kept), tokens=kept)
    for one in (whole, trimmed):
        one.to("cpu", torch.float32)
    want = whole.targets(make_batch(examples, packed=True))
    got = trimmed.targets(make_batch(small, packed=True))
    count = len(want.states)
    torch.testing.assert_close(got.logits(0, count), want.logits(0, count)[:, kept])


def test_a_student_that_is_its_teacher_learns_nothing_and_another_comes_closer(tmp_path: Path) -> None:
    examples = make_examples(16)
    # One step: AdamW makes steps of full size of what is left by rounding.
    same = train(
        make_llama(2),
        examples,
        None,
        settings=replace(SETTINGS, steps=1),
        out=tmp_path / "same",
        teacher=DenseTeacher(make_llama(2), VOCAB),
    )
    assert abs(same.kd) < 1e-5
    torch.manual_seed(7)
    other = make_llama(2)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    found = train(
        other, examples, None, settings=SETTINGS, out=tmp_path / "other", teacher=DenseTeacher(make_llama(2), VOCAB)
    )
    lines = (tmp_path / "other" / "log.jsonl").read_text().splitlines()
    first = float(lines[0].split('"kd": ')[1].split(",")[0])
    assert 0 < found.kd < first
