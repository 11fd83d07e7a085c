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
    adapted = attach(model, LoraSettings(rank=2)).eval()
    report = _check(adapted, examples, soft)
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
    assert adapted.training is False


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
    model, examples = make_llama(), make_examples(16)

    def sure_of(tokens: list[int], like: SparseTargets) -> SparseTargets:
        """Make targets that give all mass to one token a position."""
        count = len(tokens)
        return replace(
            like,
            offsets=np.arange(count + 1),
            ids=np.array(tokens, dtype=np.int32),
            counts=np.full(count, 12, dtype=np.float32),
            logp=np.zeros(count, dtype=np.float32),
            normalisers=np.zeros_like(like.normalisers),
        )

    soft = score(model, examples)
    own = [sure_of(list(row.completion_ids), one) for row, one in zip(examples, soft, strict=True)]
    assert _check(model, examples, own).differences["alignment"] < 0
    late = [sure_of([*row.completion_ids[1:], 0], one) for row, one in zip(examples, soft, strict=True)]
    with pytest.raises(StepFailed, match="shifted by one"):
        _check(model, examples, late)
