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

Tiny = Callable[..., Path]
RNG = np.random.default_rng(5)
ROWS = [RNG.integers(3, 300, length).tolist() for length in RNG.integers(12, 40, 60)]
STARTS = [len(row) // 2 for row in ROWS]


def distributions(model: torch.nn.Module) -> torch.Tensor:
    """Return the log-probabilities at the places that count: [places, vocabulary]."""
    with torch.no_grad():
        return torch.cat([
            model(torch.tensor([row])).logits[0, start - 1 : -1].log_softmax(-1)
            for row, start in zip(ROWS, STARTS, strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_predictions_are_what_errors_cost(tiny: Tiny, tied: bool) -> None:
    folder = tiny(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole, weights, where = distributions(model), dict(model.named_parameters()), places(folder)
    found = dict(collect(folder, ROWS, STARTS, threads=1))
    matrices = {name for name, value in weights.items() if value.ndim == 2}
    assert set(found) == {where[name][0] for name in matrices}
    rng, ratios = np.random.default_rng(0), {}
    for hf in sorted(matrices):
        name, order = where[hf]
        value, seen = weights[hf], []
        for _ in range(3):
            error = (rng.standard_normal(value.shape) * 0.01 * float(value.detach().std())).astype(np.float32)
            kept = value.data.clone()
            value.data += torch.from_numpy(error)
            other = distributions(model)
            value.data = kept
            kld = float((whole.exp() * (whole - other)).sum(-1).mean())
            seen.append(found[name].cost(np.ascontiguousarray(order(error))) / kld)
        ratios[name] = float(np.mean(seen))
    assert all(0.7 < ratio < 1.4 for ratio in ratios.values()), ratios
    assert 0.9 < np.mean(list(ratios.values())) < 1.1, ratios


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
