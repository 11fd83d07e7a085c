"""Rounding with feedback writes valid blocks, costs less than rounding to nearest, and is what the textbook computes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.formats.gguf import ggml, rounding
from edgedistill.formats.gguf.blocks import FORMATS, LONG
from edgedistill.formats.gguf.imatrix import collect, load
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import TensorInfo, read_info
from edgedistill.formats.gguf.rounding import feed_back, inverse_factor, refit, round_file
from edgedistill.formats.gguf.types import FILE_TYPES, FINELY_ROUNDED, GGML_TYPES, rounded_in
from edgedistill.kept import Kept
from tests.unit.formats.gguf.ggml_blocks import dequantized, quantized

Tiny = Callable[..., Path]
TEXT, UNSEEN = ([[int(i) for i in row] for row in np.random.default_rng(7).integers(3, 93, (n, 24))] for n in (40, 12))
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def made(name: str, seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make random weights [R, C] of rows of several sizes, their blocks by ggml, and second moments of related inputs."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(0, 1, (500, 6)) @ rng.normal(0, 1, (6, columns)) + rng.normal(0, 0.3, (500, columns))
    moments = (inputs.T @ inputs).astype(np.float32)
    weights = (rng.normal(0.1, 0.3, (rows, columns)) * rng.uniform(0.1, 2, (rows, 1))).astype(np.float32)
    return weights, quantized(name, weights, moments.diagonal().copy()), moments


def columns_of(name: str) -> int:
    """Return the columns of a small matrix of a type."""
    return max(128, FORMATS[name].size)


def textbook(weights: np.ndarray, raw: np.ndarray, name: str, moments: np.ndarray) -> np.ndarray:
    """Round as Optimal Brain Quantization does in the given order, taking each column out of the inverse."""
    form, columns = FORMATS[name], weights.shape[1]
    scale, offset = (np.repeat(one.reshape(len(weights), -1), form.group, axis=1) for one in form.scales(raw))
    full = moments + rounding.DAMPING * moments.diagonal().mean() * np.eye(columns)
    inverse = np.linalg.inv(full)
    rest, codes = weights.astype(np.float64), np.zeros(weights.shape, dtype=np.uint8)
    for at in np.argsort(-full.diagonal(), kind="stable"):
        codes[:, at] = form.nearest(((rest[:, at] - offset[:, at]) / scale[:, at]).astype(np.float32))
        error = rest[:, at] - (form.levels[codes[:, at]] * scale[:, at] + offset[:, at])
        row = inverse[at] / inverse[at, at]
        rest -= error[:, None] * row
        inverse -= inverse[:, at, None] * row  # that of the columns left: row and column of this one become 0
    return codes


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_it_is_optimal_brain_quantization(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "PANEL", 40)  # panels that end inside a block
    form, columns = FORMATS[name], columns_of(name)
    weights, raw, moments = made(name, 3, 20, columns)
    codes = feed_back(weights, raw, form, *inverse_factor(moments))
    want = textbook(weights, raw, name, moments.astype(np.float64))
    assert (codes.reshape(20, columns) == want).mean() > 0.99  # a tie decided by the last bit moves the codes after it

    def cost(blocks: np.ndarray) -> float:
        off = weights - dequantized(name, blocks)
        return float(np.vdot(off @ moments, off))

    assert cost(form.with_codes(raw, codes)) < 0.5 * cost(raw)


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_scales_are_fitted_to_the_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_SYSTEMS", 4096)  # a few rows at a time
    form = FORMATS[name]
    weights, raw, moments = made(name, 4, 12, 512)
    raw = form.with_codes(raw, feed_back(weights, raw, form, *inverse_factor(moments)))
    fitted = refit(weights, raw, form, moments)
    assert (form.codes(fitted) == form.codes(raw)).all()
    other = np.ones(form.bytes, dtype=bool)
    for at in form.halves:
        other[at : at + 2] = False
    assert (fitted[..., other] == raw[..., other]).all() and (fitted != raw).any()

    def cost(blocks: np.ndarray) -> float:
        off = weights - dequantized(name, blocks)
        return float(np.vdot(off @ moments, off))

    assert cost(fitted) < cost(raw)
    # No single float16 can be moved, up or down, so that all gets better: what is found is least.
    for at in form.halves:
        for step in (-3, 3):
            moved = fitted.copy()
            half = moved[:, 1, at : at + 2].copy().view(np.int16) + np.int16(step)
            moved[:, 1, at : at + 2] = half.view(np.uint8)
            assert cost(moved) > cost(fitted)


@pytest.mark.parametrize("name", ["IQ4_NL", "Q8_0", "Q2_K", "Q4_K", "Q6_K"])
def test_inputs_that_are_not_correlated_leave_nothing_to_gain(name: str) -> None:
    form = FORMATS[name]
    weights, raw, _ = made(name, 2, 4, 256)
    values = form.values(raw, np.zeros_like(form.codes(raw)))  # where the ladder of levels of every weight starts
    scale = np.repeat(form.scales(raw)[0], form.group, axis=-1).reshape(values.shape)
    ladder = values[..., None] + (form.levels - form.levels[0])[form.lowest :] * scale[..., None]
    best = np.abs(ladder - weights.reshape(values.shape)[..., None]).min(-1)
    for moments in (np.eye(256, dtype=np.float32), np.zeros((256, 256), dtype=np.float32)):
        codes = feed_back(weights, raw, form, *inverse_factor(moments))
        got = np.abs(form.values(raw, codes) - weights.reshape(values.shape))
        np.testing.assert_allclose(got, best, atol=1e-5)


@pytest.mark.parametrize("name", FINELY_ROUNDED)
def test_a_block_of_zeros_stays_one(name: str) -> None:
    form, columns = FORMATS[name], columns_of(name)
    nothing = np.zeros((2, columns), dtype=np.float32)
    raw = quantized(name, nothing, np.ones(columns, dtype=np.float32))
    codes = feed_back(nothing + 1, raw, form, *inverse_factor(np.eye(columns)))
    assert not dequantized(name, form.with_codes(raw, codes)).any()


@pytest.fixture(scope="module")
def imatrix(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the importance matrix of ``tiny_gguf(**options)``, collected once."""
    made: dict[str, Path] = {}

    def get(**options: int) -> Path:
        key = str(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("imatrix") / "i.gguf"
            collect(tiny_gguf(**options), TEXT, made[key], threads=2)
        return made[key]

    return get


def divergence(model: Any, whole: list[np.ndarray], rows: list[list[int]]) -> float:
    """Return the mean KLD, nats a token, of a model from the log-probabilities of the whole one."""
    off = [
        (np.exp(one) * (one - log_softmax(all_logits(model, row)))).sum(-1)
        for one, row in zip(whole, rows, strict=True)
    ]
    return float(np.concatenate(off).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("type", "got"),
    [
        *((name, {name}) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")),
        ("Q2_K", {"Q2_K", "Q3_K"}),
        ("Q4_K_M", {"Q4_K", "Q6_K"}),
        ("IQ4_XS", {"IQ4_XS"}),
        pytest.param("Q3_K_S", {"Q3_K"}, marks=pytest.mark.slow),
        pytest.param("Q5_K_S", {"Q5_K"}, marks=pytest.mark.slow),
        pytest.param("Q6_K", {"Q6_K"}, marks=pytest.mark.slow),
    ],
)
def test_the_file_is_the_same_but_closer(
    type: str, got: set[str], tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path
) -> None:
    options = WIDE if GGML_TYPES[FILE_TYPES[type].base].block == LONG else {}
    source, matrix = tiny_gguf(**options), imatrix(**options)
    plain = quantize(source, tmp_path / "plain.gguf", type, imatrix=matrix, threads=2)
    fine = quantize(source, tmp_path / "fine.gguf", type, imatrix=matrix, feedback=TEXT, threads=2)
    assert plain.rounding is None and plain.size == fine.size and plain.sha256 != fine.sha256
    said = fine.rounding or {}
    assert (said["tensors"], said["kept"], said["rows"], said["passes"]) == (14, 0, len(TEXT), 1)
    assert 0 < said["after"] < 0.9 * said["before"]
    one, two = read_info(tmp_path / "plain.gguf"), read_info(tmp_path / "fine.gguf")
    assert one.tensors == two.tensors and one.metadata == two.metadata
    assert {tensor.type for tensor in two.tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2} == got

    model = open_model(source, n_ctx=64)
    whole = [log_softmax(all_logits(model, row)) for row in UNSEEN]
    files = (tmp_path / "plain.gguf", tmp_path / "fine.gguf")
    before, after = (divergence(open_model(path, n_ctx=64), whole, UNSEEN) for path in files)
    assert 0 < after < before


def test_what_falls_back_is_rounded_too(tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize(tiny_gguf(), tmp_path / "x.gguf", "Q4_K_M", imatrix=imatrix(), feedback=TEXT, threads=2)
    assert {tensor.got for tensor in report.fallbacks} == {"Q5_0", "Q8_0"}
    assert report.rounding and report.rounding["tensors"] == 14


def test_a_file_of_the_first_types_is_what_it_was(tiny_gguf: Tiny, tmp_path: Path) -> None:
    """Where four heads share a kv head, attn_v of IQ4_NL is Q5_K: built files left it to llama.cpp."""
    source = tiny_gguf(**WIDE, num_key_value_heads=1, num_hidden_layers=1)
    collect(source, TEXT, tmp_path / "i.gguf", threads=2)
    name, data = "blk.0.attn_v.weight", {}
    for kind, feedback in (("IQ4_NL", None), ("IQ4_NL", TEXT), ("IQ4_XS", None), ("IQ4_XS", TEXT)):
        path = tmp_path / "x.gguf"
        quantize(source, path, kind, imatrix=tmp_path / "i.gguf", feedback=feedback, threads=2)
        tensor = next(one for one in read_info(path).tensors if one.name == name)
        assert tensor.type == "Q5_K"
        data[kind, feedback is None] = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert data["IQ4_NL", True] == data["IQ4_NL", False] == data["IQ4_XS", True] != data["IQ4_XS", False]


def test_types_without_a_code_for_each_weight_are_left_out() -> None:
    assert rounded_in("IQ4_NL") == ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
    assert rounded_in("Q4_K_M") == rounded_in("Q8_0") == FINELY_ROUNDED
    left_out = {name for name in FILE_TYPES if not rounded_in(name)}
    assert left_out == {
        "F32", "F16", "BF16", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
        "TQ2_0", "TQ1_0", "Q2_0", "Q1_0",
    }  # fmt: skip


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K_M"])
def test_the_bytes_depend_on_neither_threads_nor_memory_nor_the_run(
    type: str, tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path
) -> None:
    options = WIDE if type == "Q4_K_M" else {}
    source, columns = tiny_gguf(**options), options.get("hidden_size", 64)
    plain, path = tmp_path / "plain.gguf", tmp_path / "one.gguf"
    quantize(source, plain, type, imatrix=imatrix(**options), threads=2)
    found = []
    for threads, memory in ((1, 2**30), (1, 2**30), (2, 2**30), (3, 4 * columns**2)):
        path.write_bytes(plain.read_bytes())
        report = round_file(path, source, TEXT, scales=type == "Q4_K_M", threads=threads, memory=memory)
        found.append((path.read_bytes(), report.passes))
    assert len({data for data, _ in found}) == 1 and found[0][0] != plain.read_bytes()
    assert [passes for _, passes in found[:3]] == [1, 1, 1] and found[3][1] > 10


@pytest.mark.parametrize("type_name", ["IQ4_NL", "Q4_K"])
def test_a_row_is_rounded_alike_whatever_rows_are_beside_it(type_name: str) -> None:
    rng, form, columns = np.random.default_rng(3), FORMATS[type_name], 512
    inputs = rng.standard_normal((700, columns)).astype(np.float32)
    of = inverse_factor(inputs.T @ inputs)
    weights = (0.05 * rng.standard_normal((330, columns))).astype(np.float32)
    blocks = ggml.quantize_matrix(weights, type_name, threads=1).reshape(len(weights), -1, form.bytes)
    together = feed_back(weights, blocks, form, *of)
    for rows in (slice(0, 192), slice(192, 329), slice(329, 330)):
        np.testing.assert_array_equal(feed_back(weights[rows], blocks[rows], form, *of), together[rows])


def test_moments_are_the_imatrix_on_their_diagonal(tiny_gguf: Tiny, imatrix: Callable[..., Path]) -> None:
    moments = rounding._Moments()
    seen = rounding.watch_inputs(tiny_gguf(), TEXT, moments.take, after=moments.add)
    means = load(imatrix())
    assert len(moments.sums) < len(means) == 14  # query, key and value share their input, so do gate and up
    for name, mean in means.items():
        of = moments.input_of(name)
        assert of is not None
        np.testing.assert_allclose(moments.sums[of].diagonal() / seen.tokens, mean, rtol=1e-4)


def test_moments_are_kept_one_by_one(tmp_path: Path) -> None:
    moments, size = rounding._Moments(), 512
    for number in range(8):
        moments.take(f"matrix-{number}", f"input-{number}", np.full((2, size), number, dtype=np.float32))
    moments.add()
    kept = Kept(tmp_path, "x", of="ab")
    tracemalloc.start()
    moments.save(kept, [f"matrix-{number}" for number in range(8)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * 4 * size**2  # of eight
    again = rounding._Moments()
    asked = [
        TensorInfo(name=f"matrix-{number}", shape=(3, size), type="F16", offset=0, nbytes=0) for number in range(8)
    ]
    assert again.load(kept, asked) and set(again.sums) == set(moments.sums)
    assert all((again.sums[of] == second).all() for of, second in moments.sums.items())
