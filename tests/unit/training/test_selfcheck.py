"""The self-check passes on what is right, and names what is wrong when a known bug is put in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.errors import StepFailed
from edgedistill.training import packing, selfcheck
from edgedistill.training.data import Example
from edgedistill.training.lora import LoraSettings, attach
from edgedistill.training.losses import LossTerms
from edgedistill.training.targets import SparseTargets
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

TERMS = LossTerms(kd=0.7, ce=0.3, temperature=1.5)


def _check(model: Any, examples: list[Example], targets: list[SparseTargets] | None = None) -> Any:
    return selfcheck.selfcheck(model, examples, targets, terms=TERMS, vocab_size=VOCAB)


@pytest.mark.parametrize("kind", ["sampled", "top-k"])
def test_all_is_well(kind: str) -> None:
    model, examples = make_llama(), make_examples(40)
    soft = score(model, examples, kind=kind, temperature=1.5)  # pyright: ignore[reportArgumentType]
    report = _check(attach(model, LoraSettings(rank=2)), examples, soft)
    assert set(report.differences) >= {
        "loss",
        "mask",
        "layout",
        "accumulation",
        "identity",
        "sparse",
        "gradient",
        "mass",
    }
    assert all(report.differences[name] <= limit for name, limit in report.limits.items())
    assert model.training is False


def test_all_is_well_in_bf16() -> None:
    _check(make_llama().bfloat16(), make_examples(12))


def test_rows_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing._causal

    def leaky(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        mask = right(*args, **kwargs)
        return None if mask is None else torch.ones_like(mask)

    monkeypatch.setattr(packing, "_causal", leaky)
    with pytest.raises(StepFailed, match=r"other distributions than each row alone"):
        _check(make_llama(), make_examples(12))


def test_labels_that_are_not_shifted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing.pack

    def unshifted(examples: Any, **kwargs: Any) -> Any:
        batch = right(examples, **kwargs)
        batch.index += 1
        return batch

    monkeypatch.setattr(packing, "pack", unshifted)
    with pytest.raises(StepFailed, match="shifted by one"):
        _check(make_llama(), make_examples(12))


def test_means_of_means_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selfcheck.completion_loss

    def mean(model: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kd, ce = right(model, states, *args, **kwargs)
        return kd / len(states), ce / len(states)

    monkeypatch.setattr(selfcheck, "completion_loss", mean)
    with pytest.raises(StepFailed, match="depends on how the batch is cut"):
        _check(make_llama(), make_examples(12))


def test_targets_of_the_next_token_are_found() -> None:
    model = make_llama()
    with torch.no_grad():  # a model that is sure of itself, and rows that it would write
        model.lm_head.weight.mul_(3)
    examples = []
    for row in make_examples(16):
        with torch.no_grad():
            ids = model.generate(torch.tensor([row.prompt_ids]), max_new_tokens=9, do_sample=False)[0]
        examples.append(replace(row, completion_ids=tuple(ids[len(row.prompt_ids) :].tolist())))
    soft = score(model, examples)
    assert _check(model, examples, soft).differences["alignment"] < 1
    shifted = [
        replace(
            one,
            offsets=np.append(one.offsets[1:], one.offsets[-1] + 1) - one.offsets[1],
            ids=np.append(one.ids[one.offsets[1] :], 0).astype(np.int32),
            counts=np.append(one.counts[one.offsets[1] :], 12).astype(np.float32),
            logp=np.append(one.logp[one.offsets[1] :], 0).astype(np.float32),
        )
        for one in soft
    ]
    with pytest.raises(StepFailed, match="shifted by one"):
        _check(model, examples, shifted)


def test_targets_of_other_lengths_and_vocabularies_are_found() -> None:
    model, examples = make_llama(), make_examples(12)
    soft = score(model, examples)
    with pytest.raises(StepFailed, match="beyond the student's vocabulary"):
        _check(model, examples, [replace(one, ids=one.ids + VOCAB) for one in soft])
    with pytest.raises(StepFailed, match="another length"):
        _check(model, examples, [*soft[1:], soft[0]])


def test_a_model_that_changes_logits_after_its_head_is_found() -> None:
    model = make_llama()
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = 3.0 * torch.tanh(out.logits / 3.0)
        return out

    model.forward = capped
    with pytest.raises(StepFailed, match="changes logits after its head"):
        _check(model, make_examples(12))
