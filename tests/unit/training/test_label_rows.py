"""Rows that are the answers to one prompt, weighed by their shares: the loss is a cross-entropy over whole answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, groups_of
from edgedistill.training.settings import plan_steps, steps_per_epoch
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import make_examples, make_llama

ANSWERS = ((7, 1), (9, 11, 1), (9, 12, 13, 1))  # two begin alike, and each ends with the same token
SHARES = ((0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.0, 0.125, 0.875), (0.3, 0.3, 0.4))
ONE = TrainSettings(
    method="full", optimizer="sgd", lr=1.0, steps=1, batch_size=4, clip=0.0, dtype="float32", schedule="constant",
    warmup=0.0, freeze_embeddings=False,
)  # fmt: skip


def rows(shares: tuple[tuple[float, ...], ...] = SHARES) -> list[Example]:
    prompts = [one.prompt_ids for one in make_examples(len(shares))]
    return [
        Example(f"p{at}#{number}", prompts[at], answer, weight=share, group=f"p{at}")
        for at, of_prompt in enumerate(shares)
        for number, (answer, share) in enumerate(zip(ANSWERS, of_prompt, strict=True))
        if share
    ]


def answer_logprobs(model: torch.nn.Module, prompt: tuple[int, ...]) -> torch.Tensor:
    """Return log p(answer | prompt) of every answer, from plain forwards: [answers]."""
    found = []
    for answer in ANSWERS:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits, -1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
    return torch.stack(found)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_gradient_is_that_of_the_dense_cross_entropy_over_answers(tmp_path: Path, micro: int | None) -> None:
    """By plain PyTorch in float64, over all answers at once; the step divides it by the mean number of tokens that q expects."""
    from safetensors.torch import load_file

    train(make_llama(), rows(), None, settings=replace(ONE, micro_batch=micro), out=tmp_path)
    model = make_llama().double()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    q = torch.tensor(SHARES, dtype=torch.float64)
    mass = (q @ torch.tensor([len(one) for one in ANSWERS], dtype=torch.float64)).sum()
    prompts = [one.prompt_ids for one in make_examples(len(SHARES))]
    logp = torch.stack([answer_logprobs(model, prompt) for prompt in prompts])
    loss = -(q * logp).sum() / mass
    loss.backward()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    trained = load_file(next(tmp_path.glob("model/*.safetensors")))
    for name, one in model.named_parameters():
        step = before[name] - trained[name].double()  # sgd at a rate of 1: the gradient
        assert one.grad is not None
        assert float((step - one.grad).norm()) < 1e-5 * float(one.grad.norm()) + 1e-6


def test_what_is_learnt_is_the_distribution(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = replace(ONE, optimizer="adamw_torch", lr=1e-2, steps=60, clip=1.0, gradient_norms=0)
    result = train(make_llama(1), rows(), None, settings=settings, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(result.path)
    with torch.no_grad():
        for shares, one in zip(SHARES, make_examples(len(SHARES)), strict=True):
            found = answer_logprobs(model, one.prompt_ids).exp()
            assert found.tolist() == pytest.approx(shares, abs=0.05)


def test_a_step_takes_all_answers_to_a_prompt_or_none() -> None:
    examples = rows(SHARES * 5)
    examples = [*examples[::2], *examples[1::2], Example("alone", (1, 2), (3, 1))]  # in the order of no prompt
    settings = replace(ONE, batch_size=4, steps=None, epochs=3.0)
    assert len(groups_of(examples)) == 21
    assert steps_per_epoch(examples, settings) == 6
    plan = plan_steps(examples, settings)
    assert len(plan) == 18
    for epoch in range(3):
        steps = plan[epoch * 6 : epoch * 6 + 6]
        assert sorted(row for step in steps for row in step) == list(range(len(examples)))
        for step in steps:
            shares = Counter[str]()
            for row in step:
                shares[examples[row].group or examples[row].id] += examples[row].weight  # type: ignore[assignment]
            assert len(shares) <= 4
            assert list(shares.values()) == pytest.approx([1.0] * len(shares))
    plain = [replace(one, group="") for one in examples]
    assert plan_steps(plain, settings) != plan


def test_a_curriculum_of_such_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the answers to one prompt"):
        train(make_llama(), rows(), None, settings=replace(ONE, curriculum="length", epochs=1.0), out=tmp_path)
