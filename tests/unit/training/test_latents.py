"""The blocks that are trained are the file's own: forward to the bit, backward as the rounding were not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.formats.gguf.blocks import FORMATS
from edgedistill.formats.gguf.types import FINELY_ROUNDED
from edgedistill.training.latents import MARGIN, Latents
from tests.unit.formats.gguf.ggml_blocks import dequantized, quantized

NAMES = st.sampled_from(FINELY_ROUNDED)
SEEDS = st.integers(0, 2**32 - 1)
ROWS, COLUMNS = 3, 512


def made(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random weights, a block of them 0, and ggml's blocks of them."""
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(3, (ROWS, COLUMNS)) * 10.0 ** rng.uniform(-3, 1, (ROWS, 1))).astype(np.float32)
    weights[0, :256] = 0
    return weights, quantized(name, weights, np.ones(COLUMNS, dtype=np.float32))


def packed(one: Latents, blocks: np.ndarray, places: torch.Tensor, factors: torch.Tensor) -> np.ndarray:
    """Return the blocks with the codes and bases that places and factors stand for."""
    codes = one.rounded(places).numpy().reshape(*blocks.shape[:2], one.form.size)
    return one.form.with_bases(one.form.with_codes(blocks, codes), one.halves(factors).numpy())


@settings(max_examples=60, deadline=None)
@given(name=NAMES, seed=SEEDS)
def test_the_start_is_the_file_to_the_bit(name: str, seed: int) -> None:
    weights, blocks = made(name, seed)
    one = Latents(blocks, FORMATS[name])
    for known in (None, torch.from_numpy(weights)):
        places, factors = one.start(known)
        found = one.weights(places, one.halves(factors)).numpy()
        np.testing.assert_array_equal(found, dequantized(name, blocks))
        assert (packed(one, blocks, places, factors) == blocks).all()
        assert torch.isfinite(places).all() and float((places - one.codes).abs().max()) <= MARGIN + 1e-5


@settings(max_examples=60, deadline=None)
@given(name=NAMES, seed=SEEDS)
def test_whatever_was_trained_the_packed_file_computes_with_it(name: str, seed: int) -> None:
    _, blocks = made(name, seed)
    one, rng = Latents(blocks, FORMATS[name]), torch.Generator().manual_seed(seed)
    places, factors = one.start()
    places = places + 3 * torch.randn(places.shape, generator=rng)  # over both ends of the codes, too
    factors = factors + 0.3 * torch.randn(factors.shape, generator=rng)
    found, raw = one.weights(places, one.halves(factors)).numpy(), packed(one, blocks, places, factors)
    np.testing.assert_array_equal(found, dequantize(raw.reshape(ROWS, -1), GGMLQuantizationType[name]))
    np.testing.assert_array_equal(found, dequantized(name, raw))


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_gradients_are_those_of_a_dense_model_of_the_blocks(name: str) -> None:
    """In float64 by autograd: weights = base * factor * multiple * level, the level as a line through the place's code."""
    _, blocks = made(name, 5)
    form = FORMATS[name]
    one, rng = Latents(blocks, form), torch.Generator().manual_seed(1)
    places, factors = one.start()
    factors = factors + 0.1 * torch.rand(factors.shape, generator=rng)
    places = places + 0.4 * (torch.rand(places.shape, generator=rng) - 0.5)  # no code turns
    above = torch.rand(ROWS, COLUMNS, generator=rng) - 0.5
    of_places, of_factors = one.gradients(above, places, factors)
    x, f = (value.double().requires_grad_() for value in (places, factors))
    levels = torch.from_numpy(form.levels).double()
    codes = places.round().long()
    up, down = (codes + 1).clamp(max=len(levels) - 1), (codes - 1).clamp(min=0)
    slope = (levels[up] - levels[down]) / (up - down)
    level = levels[codes] + slope * (x - x.detach())
    rounded = torch.from_numpy((one.bases * factors).numpy().astype(np.float16).astype(np.float64))
    bases = rounded + one.bases.double() * (f - f.detach())
    groups = bases[..., None] * one.multiples.double()
    scale = groups[:, :, 0].reshape(ROWS, -1, 1)
    weights = scale * level.view(ROWS, -1, form.group)
    if groups.shape[2] > 1:
        weights = weights + groups[:, :, 1].reshape(ROWS, -1, 1)
    (weights.view(ROWS, COLUMNS) * above.double()).sum().backward()
    assert x.grad is not None and f.grad is not None
    torch.testing.assert_close(of_places.double(), x.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(of_factors.double(), f.grad, rtol=1e-4, atol=1e-5 * float(f.grad.abs().max()))
    assert float(of_places.abs().sum()) > 0 and float(of_factors.abs().sum()) > 0


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q8_0"])
def test_nothing_draws_a_place_further_out_of_the_codes(name: str) -> None:
    blocks = made(name, 7)[1]
    one = Latents(blocks, FORMATS[name])
    _, factors = one.start()
    last, first = len(one.levels) - 1, one.form.lowest
    for place, outward in ((last + 0.6, -1.0), (first - 0.6, 1.0)):
        places = torch.full(one.shape, place)
        scale = one.weights(torch.full(one.shape, 1.0 + first), one.halves(factors)) - one.weights(
            torch.full(one.shape, 0.0 + first), one.halves(factors)
        )
        above = outward * scale.sign()
        assert (one.gradients(above, places, factors)[0] == 0).all()
        back = one.gradients(-above, places, factors)[0]
        assert (back[1:] * outward < 0).all()  # the first row has a block of zeros
