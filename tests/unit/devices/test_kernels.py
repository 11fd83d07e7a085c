"""What kernels cost: files of one type that llama.cpp loads, a fit that finds what made the timings, a file that is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgedistill.devices.host import fingerprint
from edgedistill.devices.kernels import Shape, Timing, fit, kernels_rows, measure_kernels, write_model
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.speeds import Costs, Kernels, read_kernels

SMALL = Shape(hidden=256, ffn=512, depths=(1, 3))


def some_kernels(threads: int = 2) -> Kernels:
    costs = Costs(
        weight={"Q4_0": 1e-12, "Q8_0": 2e-12}, spread={"Q4_0": 0.01, "Q8_0": 0.02}, fixed=1e-6, layer=0, column=0
    )
    return Kernels(
        threads=threads,
        host=fingerprint(),
        runner={"engine": "llama.cpp", "version": "llama-cpp-python 0.3.36", "commit": "ggml", "build": "AVX2"},
        settings={"rounds": 3, "reps": 2},
        costs={"pp": costs, "tg": replace(costs, fixed=3e-6)},
        noise=("other processes kept 1.8 cores busy",),
    )


@pytest.mark.parametrize("name", ["Q4_0", "IQ3_XXS", "Q6_K", "F16"])
def test_made_files_load_and_have_the_type_asked_for(name: str, tmp_path: Path) -> None:
    import numpy as np

    path = write_model(tmp_path / "made.gguf", name, SMALL, 3)
    info = read_info(path)
    matrices = [tensor for tensor in info.tensors if tensor.name.startswith("blk.") and "norm" not in tensor.name]
    assert {tensor.type for tensor in matrices} == {name}
    assert sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices) == 3 * SMALL.weights
    model = open_model(path, n_ctx=32, threads=1)
    try:
        logits = all_logits(model, [1, 2, 3])
    finally:
        model.close()
    assert logits.shape == (3, 256) and np.isfinite(logits).all()


def test_the_fit_finds_what_made_the_timings() -> None:
    weight = {"Q4_0": 5e-12, "Q5_K": 17e-12, "Q8_0": 7e-12}
    fixed, layer, column = 2e-6, 3e-7, 4e-9
    shapes = [
        *((name, Shape(hidden=768, ffn=2048, depths=(2, 6))) for name in weight),
        ("Q8_0", Shape(hidden=768, ffn=256, depths=(4, 12))),
        ("Q8_0", Shape(hidden=256, ffn=768, depths=(8, 24))),
    ]
    timings = [
        Timing(
            type=name,
            hidden=shape.hidden,
            layers=depth,
            weights=depth * shape.weights,
            seconds=fixed + depth * (layer + column * shape.hidden + weight[name] * shape.weights),
        )
        for name, shape in shapes
        for depth in shape.depths
    ]
    found = fit(timings)
    assert found.weight == pytest.approx(weight, rel=1e-6)
    assert (found.fixed, found.layer, found.column) == pytest.approx((fixed, layer, column), rel=1e-6)

    # A tenth more time in one file moves its own type's cost by about as much, and the others' little.
    slower = [replace(one, seconds=1.1 * one.seconds) if one.type == "Q5_K" else one for one in timings]
    moved = fit(slower)
    assert moved.weight["Q5_K"] == pytest.approx(1.1 * weight["Q5_K"], rel=0.02)
    assert moved.weight["Q4_0"] == pytest.approx(weight["Q4_0"], rel=0.02)


def test_a_pinned_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(some_kernels().to_json()))
    assert read_kernels(path) == some_kernels()
    rows, notes = kernels_rows(read_kernels(path))
    assert rows[0] == ["Q4_0", "4.50", "1", "1%", "1", "1%"]
    assert any("2 threads; n = 3 rounds of 2 samples" in note for note in notes)
    assert notes[-1] == "NOISY: other processes kept 1.8 cores busy"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "not a file of kernels' costs"),
        ({"schema": 9}, "schema 9, where this version reads 1"),
        ({"threads": "many"}, "damaged"),
        ({"runner": 3}, "damaged"),
        ({"host": {"arch": "x86_64"}}, "damaged"),
        ({"costs": {"pp": {}}}, "damaged .lacks 'weight'"),
        ("zero", "a type costs nothing"),
        ("unknown", "'Q9' is no type"),
    ],
)
def test_a_file_that_is_none_is_refused(change: object, said: str, tmp_path: Path) -> None:
    path, data = tmp_path / "kernels.json", some_kernels().to_json()
    if change == "zero":
        data["costs"]["tg"]["weight"] = {**data["costs"]["tg"]["weight"], "Q4_0": 0.0}
    elif change == "unknown":
        data["costs"]["tg"]["weight"] = {"Q9": 1e-12}
        data["costs"]["tg"]["spread"] = {"Q9": 0}
    elif isinstance(change, dict):
        data.update(change)
    if change is not None:
        path.write_text(change if isinstance(change, str) and change in "{[]" else json.dumps(data))
    with pytest.raises(UsageError, match=said) as caught:
        read_kernels(path)
    assert "targets kernels" in caught.value.hint


def test_types_that_nobody_chooses_among_are_not_measured() -> None:
    with pytest.raises(UsageError, match="TQ1_0 is none of the types"):
        measure_kernels(["TQ1_0"])


@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    shapes = (
        Shape(hidden=256, ffn=1024, depths=(2, 10)),
        Shape(hidden=256, ffn=256, depths=(2, 10)),
        Shape(hidden=128, ffn=256, depths=(2, 10)),
    )
    seen: list[tuple[int, int, str]] = []
    found = measure_kernels(
        ["Q4_0", "IQ3_XXS"], threads=1, rounds=2, reps=1, shapes=shapes, progress=lambda *step: seen.append(step)
    )
    assert found.types() == ["Q4_0", "IQ3_XXS", "Q8_0"]
    assert len(seen) == seen[-1][1] == 2 * 5
    # Codebook look-ups against repacked blocks. For prompts they may cost less than the blocks do: 0.8 of it on one Xeon.
    assert found.costs["tg"].weight["IQ3_XXS"] > 1.5 * found.costs["tg"].weight["Q4_0"]
    for costs in found.costs.values():
        assert all(1e-13 < value < 1e-8 for value in costs.weight.values())
    assert found.host == fingerprint() and found.threads == 1 and "ggml" in found.runner["commit"]
