"""What errors of weights are predicted to cost is what they cost: KLD of a real forward pass, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.convert import places
from edgedistill.formats.gguf.moments import Moments, collect
from tests.unit.formats.gguf.error_costs import ROWS, STARTS, cost_ratios

Tiny = Callable[..., Path]


@pytest.mark.parametrize("tied", [True, False])
def test_predictions_are_what_errors_cost(tiny: Tiny, tied: bool) -> None:
    folder = tiny(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    where, found = places(folder), dict(collect(folder, ROWS, STARTS, threads=1))
    matrices = sorted(name for name, value in model.named_parameters() if value.ndim == 2)
    assert set(found) == {where[name][0] for name in matrices}
    ratios = cost_ratios(model, where, found, matrices, seed=0)
    assert all(0.7 < ratio < 1.4 for ratio in ratios.values()), ratios
    assert 0.9 < np.mean(list(ratios.values())) < 1.1, ratios


def test_costs_of_a_model_that_is_sure_do_not_hang_on_the_draws(tiny: Tiny) -> None:
    """A student of one task gives most tokens nearly all: tokens drawn as it would write them seldom find what could be lost."""
    folder = tiny()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= 16
        sure = torch.cat([model(torch.tensor([row])).logits[0].softmax(-1).amax(-1) for row in ROWS])
    assert sure.median() > 0.98
    model.save_pretrained(folder)
    where = places(folder)
    matrices = [name for name, value in model.named_parameters() if value.ndim == 2 and "layers.1" in name]
    totals = []
    for seed in range(3):
        found = dict(collect(folder, ROWS, STARTS, threads=1, seed=seed))
        totals.append(sum(float(found[where[name][0]].importance().sum()) for name in matrices))
        ratios = list(cost_ratios(model, where, found, matrices, seed=0).values())
        assert 0.9 < np.mean(ratios) < 1.1, ratios
    assert max(totals) / min(totals) < 1.06, totals  # 1.13 with tokens drawn from the model's own distribution


def test_passes_by_layers_find_the_same(tiny: Tiny) -> None:
    folder = tiny()
    once, often = (
        dict(collect(folder, ROWS, STARTS, threads=1)),
        dict(collect(folder, ROWS, STARTS, threads=1, memory=1)),
    )
    assert set(once) == set(often) and list(once) != list(often)  # the last layers first
    for name, one in once.items():
        other = often[name]
        assert (
            one.inputs is not None
            and one.outputs is not None
            and other.inputs is not None
            and other.outputs is not None
        )
        np.testing.assert_allclose(other.outputs, one.outputs, rtol=1e-4)
        np.testing.assert_allclose(other.inputs, one.inputs, rtol=1e-3, atol=1e-5)
    embedding, other = once["token_embd.weight"], often["token_embd.weight"]
    assert embedding.looked_up is not None and embedding.columns is not None and other.looked_up is not None
    assert set(np.flatnonzero(embedding.looked_up)) <= {token for row in ROWS for token in row}
    assert embedding.columns.sum() == pytest.approx(1)
    np.testing.assert_allclose(other.looked_up, embedding.looked_up, rtol=1e-4)


def test_costs_by_hand() -> None:
    inputs, outputs = np.array([[2.0, 1.0], [1.0, 3.0]], dtype=np.float32), np.array([1.0, 0.5], dtype=np.float32)
    error = np.array([[1.0, 0.0], [1.0, -1.0]], dtype=np.float32)
    assert Moments(inputs, outputs).cost(error) == pytest.approx((1.0 * 2 + 0.5 * (2 - 2 + 3)) / 2)
    looked_up = Moments(None, None, np.array([4.0, 0.0], dtype=np.float32), np.array([0.25, 0.75], dtype=np.float32))
    assert looked_up.cost(error) == pytest.approx(4 * 0.25 / 2)
    assert looked_up.importance().tolist() == [1.0, 3.0]


def test_text_without_answers_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="has an answer"):
        next(collect(tiny(), [[5, 6, 7]], [3]))
