"""The table is of the file that will be made: dead columns count for a little, rows are spread, and a model must be its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedistill.errors import UsageError
from edgedistill.formats.gguf import sensitivity
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.ggml import round_trip
from edgedistill.formats.gguf.imatrix import load
from edgedistill.formats.gguf.moments import Moments
from edgedistill.formats.gguf.read import read_info, read_tensor
from tests.unit.formats.gguf.conftest import make_model

Tiny = Callable[..., Path]
RNG = np.random.default_rng(5)
ROWS = [RNG.integers(3, 300, length).tolist() for length in RNG.integers(12, 40, 24)]


def test_what_is_never_seen_is_kept_all_the_same(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    for part in ("gate_proj", "up_proj"):  # 32 neurons that give 0: so many columns of the next matrix see nothing
        weights[f"model.layers.0.mlp.{part}.weight"][32:64] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = convert(folder, tmp_path / "f16.gguf").path
    report = sensitivity.measure(source, folder, ROWS, [1] * len(ROWS), tmp_path, threads=1)
    assert report.matrices == 15 and report.tokens == sum(map(len, ROWS))
    name = "blk.0.ffn_down.weight"
    importance, whole = load(tmp_path / "imatrix.gguf")[name], read_tensor(read_info(source), name)
    assert importance.mean() == pytest.approx(1, rel=1e-3) and importance[32:64] == pytest.approx(1e-4)
    left = round_trip(whole, "Q8_0", importance)
    assert np.abs(left - whole)[:, 32:64].max() < 0.02 * np.abs(whole).max()
    # what the table says is what the file of that importance costs
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["costs"][name]["Q8_0"][0] == 64 * 128 // 32 * 34
    assert table["costs"][name]["Q4_0"][1] > table["costs"][name]["Q5_0"][1] > table["costs"][name]["Q8_0"][1] > 0


def test_a_matrix_without_any_gradient_costs_nothing() -> None:
    moments = Moments(np.zeros((4, 4), dtype=np.float32), np.zeros(3, dtype=np.float32))
    assert sensitivity._importance(moments, 4).tolist() == [1.0] * 4
    assert moments.cost(np.ones((3, 4), dtype=np.float32)) == 0


def test_rows_are_spread_evenly_and_long_ones_left_out(tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path) -> None:
    rows: list[tuple[list[int], int]] = [([at] * 10, 1) for at in range(100)]
    kept = [row[0] for row, _ in sensitivity.spread(rows, 200)]  # pyright: ignore[reportArgumentType]
    assert len(kept) == 20 and {b - a for a, b in itertools.pairwise(kept)} <= {4, 5, 6}
    long: list[tuple[list[int], int]] = [([0] * 9000, 1), *rows]
    assert all(len(row) == 10 for row, _ in sensitivity.spread(long, 200))  # pyright: ignore[reportArgumentType]
    assert sensitivity.spread([([0] * 9000, 1)], 200) == [([0] * 9000, 1)]
    report = sensitivity.measure(
        tiny_gguf(), tiny(), [[5] * 300, *ROWS], [1] * 25, tmp_path, palette=("Q4_0", "Q8_0"), threads=1
    )
    assert report.rows == len(ROWS)  # the model's context has 256 tokens
    with pytest.raises(UsageError, match="every calibration row is longer than the model's context of 256"):
        sensitivity.measure(tiny_gguf(), tiny(), [[5] * 300], [1], tmp_path, threads=1)


def test_another_model_is_refused(tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the same model"):
        sensitivity.measure(tiny_gguf(), tiny(num_hidden_layers=3), ROWS, [1] * len(ROWS), tmp_path, threads=1)
