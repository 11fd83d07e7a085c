"""Rounding with feedback writes valid blocks, costs less than rounding to nearest, and is what the textbook computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.formats.gguf import rounding
from edgedistill.formats.gguf.imatrix import collect, load
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.rounding import FORMATS, feed_back, inverse_factor, round_file
from edgedistill.formats.gguf.types import FINELY_ROUNDED, GGML_TYPES

Tiny = Callable[..., Path]
TEXT = [[(7 * row + 3 * at * at) % 90 + 3 for at in range(24)] for row in range(40)]


def blocks(name: str, seed: int, shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """Make random blocks with finite scales."""
    form, rng = FORMATS[name], np.random.default_rng(seed)
    out = rng.integers(0, 256, (*shape, form.bytes), dtype=np.uint8)
    head = rng.normal(0, 0.1, (*shape, form.head)).astype(np.float16)
    out[..., : 2 * form.head] = head.view(np.uint8)
    return out


def test_the_plan_and_the_code_know_the_same_types() -> None:
    assert tuple(FORMATS) == FINELY_ROUNDED
    assert {name: form.bytes for name, form in FORMATS.items()} == {n: GGML_TYPES[n].bytes for n in FORMATS}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(FINELY_ROUNDED))
def test_blocks_are_ggmls(seed: int, name: str) -> None:
    form, raw = FORMATS[name], blocks(name, seed)
    scale, offset = form.scales(raw)
    values = form.levels[form.codes(raw)] * scale[..., None] + offset[..., None]
    np.testing.assert_array_equal(
        values.reshape(3, -1), dequantize(raw.reshape(3, -1), GGMLQuantizationType[name]).reshape(3, -1)
    )
    assert (form.with_codes(raw, form.codes(raw)) == raw).all()
    other = np.random.default_rng(seed).integers(0, len(form.levels), (3, 4, 32)).astype(np.uint8)
    changed = form.with_codes(raw, other)
    assert (form.codes(changed) == other).all()
    assert all((a == b).all() for a, b in zip(form.scales(changed), (scale, offset), strict=True))


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_nearest_is_the_nearest_level(name: str) -> None:
    form = FORMATS[name]
    values = np.random.default_rng(1).normal(0, 1, 2000).astype(np.float32) * abs(form.levels).max()
    best = np.abs(values[:, None] - form.levels).min(1)
    np.testing.assert_allclose(np.abs(values - form.levels[form.nearest(values)]), best, rtol=1e-5)
    assert (form.nearest(form.levels) == np.arange(len(form.levels))).all()


def textbook(weights: np.ndarray, raw: np.ndarray, name: str, moments: np.ndarray) -> np.ndarray:
    """Round as Optimal Brain Quantization does in the given order: a new inverse for the columns left after each."""
    form, columns = FORMATS[name], weights.shape[1]
    scale, offset = (np.repeat(one, 32, axis=1) for one in form.scales(raw))
    full = moments + rounding.DAMPING * moments.diagonal().mean() * np.eye(columns)
    left = [int(at) for at in np.argsort(-full.diagonal(), kind="stable")]
    rest, codes = weights.astype(np.float64), np.zeros(weights.shape, dtype=np.uint8)
    while left:
        at, inverse = left[0], np.linalg.inv(full[np.ix_(left, left)])
        codes[:, at] = form.nearest(((rest[:, at] - offset[:, at]) / scale[:, at]).astype(np.float32))
        error = rest[:, at] - (form.levels[codes[:, at]] * scale[:, at] + offset[:, at])
        rest[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_it_is_optimal_brain_quantization(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PANEL", 40)  # panels that end inside a block
    rng = np.random.default_rng(3)
    inputs = rng.normal(0, 1, (500, 6)) @ rng.normal(0, 1, (6, 128)) + rng.normal(0, 0.3, (500, 128))
    moments = (inputs.T @ inputs).astype(np.float32)
    raw = blocks(name, 5, (20, 4))
    scale, offset = FORMATS[name].scales(raw)
    weights = (rng.normal(0, 0.3, (20, 4, 32)) * np.abs(FORMATS[name].levels).max() * scale[..., None]).astype(
        np.float32
    )
    weights = (weights + offset[..., None]).reshape(20, 128)
    codes = feed_back(weights, raw, FORMATS[name], *inverse_factor(moments)).reshape(20, 128)
    want = textbook(weights, raw, name, moments.astype(np.float64))
    assert (codes == want).mean() > 0.99  # a tie decided by the last bit moves the codes after it

    def cost(some: np.ndarray) -> float:
        values = FORMATS[name].levels[some].reshape(20, 4, 32) * scale[..., None] + offset[..., None]
        off = weights - values.reshape(20, 128)
        return float(np.vdot(off @ moments, off))

    nearest = FORMATS[name].nearest((weights.reshape(20, 4, 32) - offset[..., None]) / scale[..., None])
    assert cost(codes) < 0.5 * cost(nearest.reshape(20, 128))


def test_inputs_that_are_not_correlated_leave_nothing_to_gain() -> None:
    raw = blocks("IQ4_NL", 2, (4, 2))
    weights = np.random.default_rng(0).normal(0, 2, (4, 64)).astype(np.float32)
    scale, _ = FORMATS["IQ4_NL"].scales(raw)
    for moments in (np.eye(64, dtype=np.float32), np.zeros((64, 64), dtype=np.float32)):
        codes = feed_back(weights, raw, FORMATS["IQ4_NL"], *inverse_factor(moments))
        assert (codes == FORMATS["IQ4_NL"].nearest(weights.reshape(4, 2, 32) / scale[..., None])).all()


def test_a_block_of_zeros_stays_one() -> None:
    raw = blocks("Q4_1", 2, (2, 2))
    raw[0, 0, :4] = 0
    codes = feed_back(np.ones((2, 64), dtype=np.float32), raw, FORMATS["Q4_1"], *inverse_factor(np.eye(64)))
    assert np.isfinite(FORMATS["Q4_1"].levels[codes]).all()


@pytest.fixture(scope="module")
def imatrix(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    collect(tiny_gguf(), TEXT, out, threads=2)
    return out


@pytest.mark.parametrize("type", FINELY_ROUNDED)
def test_the_file_is_the_same_but_closer(type: str, tiny_gguf: Tiny, imatrix: Path, tmp_path: Path) -> None:
    source = tiny_gguf()
    plain = quantize(source, tmp_path / "plain.gguf", type, imatrix=imatrix, threads=2)
    fine = quantize(source, tmp_path / "fine.gguf", type, imatrix=imatrix, feedback=TEXT, threads=2)
    assert plain.rounding is None and plain.size == fine.size and plain.sha256 != fine.sha256
    said = fine.rounding or {}
    assert (said["tensors"], said["kept"], said["rows"], said["passes"]) == (14, 0, 40, 1)
    assert 0 < said["after"] < 0.9 * said["before"]
    one, two = read_info(tmp_path / "plain.gguf"), read_info(tmp_path / "fine.gguf")
    assert one.tensors == two.tensors and one.metadata == two.metadata

    models = [open_model(path, n_ctx=64) for path in (source, tmp_path / "plain.gguf", tmp_path / "fine.gguf")]
    off = [0.0, 0.0]
    for row in TEXT:
        whole, *others = (all_logits(model, row) for model in models)
        off = [sum_ + float(np.square(whole - other).sum()) for sum_, other in zip(off, others, strict=True)]
    assert off[1] < off[0]


def test_the_bytes_depend_on_neither_threads_nor_memory(
    tiny_gguf: Tiny, imatrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads, memory in ((1, 2**30), (2, 2**30), (2, 4 * 64**2)):
        monkeypatch.setattr(rounding, "MEMORY", memory)
        path = tmp_path / "one.gguf"
        quantize(tiny_gguf(), path, "Q4_0", imatrix=imatrix, threads=2)
        report = round_file(path, tiny_gguf(), TEXT, threads=threads, memory=memory)
        found.append((path.read_bytes(), report.passes))
    assert found[0] == found[1] and found[2][0] == found[0][0] and found[2][1] > 10


def test_moments_are_the_imatrix_on_their_diagonal(tiny_gguf: Tiny, imatrix: Path) -> None:
    moments = rounding._Moments()
    seen = rounding.watch_inputs(tiny_gguf(), TEXT, moments.take, after=moments.add)
    means = load(imatrix)
    assert len(moments.sums) < len(means) == 14  # query, key and value share their input, so do gate and up
    for name, mean in means.items():
        of = moments.input_of(name)
        assert of is not None
        np.testing.assert_allclose(moments.sums[of].diagonal() / seen.tokens, mean, rtol=1e-4)
