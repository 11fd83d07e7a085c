"""Folders whose matrices were rounded anew load, run, are the model, and hold what was asked for; other models are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.allocate import solve
from edgedistill.formats.onnx.check import compare, precision_of
from edgedistill.formats.onnx.folder import Folder
from edgedistill.formats.onnx.rounding import round_folder, task_rows
from edgedistill.formats.onnx.sensitivity import measure
from edgedistill.formats.onnx.types import KINDS, refuse_blocks, smallest
from tests.unit.formats.gguf.conftest import make_model

pytestmark = pytest.mark.onnx

Onnx = Callable[[str], Path]

PROMPTS = [[{"role": "user", "content": "turn the volume down to thirty percent"}]]
ROWS = [(np.random.default_rng(seed).integers(3, 300, 40).tolist(), 5) for seed in range(24)]


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_builders_matrices_are_found_and_read_back(tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path) -> None:
    folder = Folder(copied(tiny_onnx("int4"), tmp_path), tiny_hf)
    assert len(folder.matrices) == 2 * 5 + 1
    attention, head = folder.matrices["blk.1.qkv_proj"], folder.matrices["lm_head"]
    assert [part.split(".")[-2] for part in attention.parts] == ["q_proj", "k_proj", "v_proj"]
    assert attention.kind == KINDS["int4/32"] and head.looked_up and not attention.looked_up
    for one in folder.matrices.values():
        folder.check(one)
    before = {name: folder.read(one).values() for name, one in folder.matrices.items()}
    for one in folder.matrices.values():  # what was read, put back: the same model
        folder.replace(one, folder.read(one))
    folder.save()
    again = Folder(folder.path, tiny_hf)
    assert all((again.read(one).values() == before[name]).all() for name, one in again.matrices.items())
    assert (folder.path / "model.onnx.data").stat().st_mode == (folder.path / "model.onnx").stat().st_mode
    hops = [compare(tiny_hf, path, PROMPTS) for path in (folder.path, tiny_onnx("int4"))]
    assert hops[0] == hops[1]


def test_int4_is_rounded_in_place(tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path) -> None:
    path, seen = copied(tiny_onnx("int4"), tmp_path), []
    report = round_folder(path, tiny_hf, ROWS, KINDS["int4/32"], progress=lambda *step: seen.append(step))
    assert report.matrices == 11 and report.kinds == {"int4/32": 11} and report.after < 0.8 * report.before
    assert report.tokens == 24 * 40 and seen and all(done <= total for done, total, _ in seen)
    assert json.dumps(report.to_json())
    assert size_of(path) < size_of(tiny_onnx("int4")) + 40_000  # what aligns some tensors of a tiny model
    rounded, plain = Folder(path, tiny_hf), Folder(tiny_onnx("int4"), tiny_hf)
    for name, one in rounded.matrices.items():
        rounded.check(one)
        assert not (rounded.read(one).codes == plain.read(plain.matrices[name]).codes).all()
    assert compare(tiny_hf, path, PROMPTS).kld < compare(tiny_hf, tiny_onnx("int4"), PROMPTS).kld
    other = make_model(tmp_path / "other", pre="gpt-2", hidden_size=96, num_attention_heads=6, head_dim=16, seed=1)
    with pytest.raises(StepFailed, match="the builder's weights are not those of"):
        round_folder(path, other, ROWS, KINDS["int4/32"])
    smaller = make_model(tmp_path / "smaller", pre="gpt-2", hidden_size=64)
    with pytest.raises(StepFailed, match="no tensors of the checkpoint make up"):
        Folder(path, smaller)


def test_every_matrix_has_the_kind_that_was_chosen(tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    report = measure(tiny_onnx("int4"), tiny_hf, ROWS, tmp_path / "table")
    found = json.loads((tmp_path / "table" / "table.json").read_text())
    assert report.matrices == 11 and set(found["costs"]["lm_head"]) == {"int4/32", "uint4/32", "int8/32"}
    assert json.loads((tmp_path / "table" / "text.json").read_text()) == [list(row) for row in ROWS]
    for costs in found["costs"].values():
        assert costs["int8/32"][1] < 0.1 * costs["int4/32"][1] and costs["int8/32"][0] > costs["int4/32"][0]
    of_bytes = {kind: sum(costs[kind][0] for costs in found["costs"].values()) for kind in ("int4/32", "int8/32")}
    chosen = solve(found["costs"], round(0.6 * of_bytes["int4/32"] + 0.4 * of_bytes["int8/32"]))
    assert {"int4", "int8"} <= {kind.split("/")[0].removeprefix("u") for kind in chosen.types.values()}
    path = copied(tiny_onnx("int4"), tmp_path)
    kinds = {name: KINDS[kind] for name, kind in chosen.types.items()}
    done = round_folder(path, tiny_hf, ROWS, kinds)
    assert sum(done.kinds.values()) == 11 and done.predicted <= 1.01 * chosen.kld
    held = Folder(path, tiny_hf)
    assert {name: one.kind for name, one in held.matrices.items()} == kinds
    plain, fine = (compare(tiny_hf, folder, PROMPTS) for folder in (tiny_onnx("int4"), path))
    assert fine.kld < plain.kld


@pytest.mark.parametrize("kind", ["uint4/32", "int8/32"])
def test_an_embedding_shares_zero_points_and_more_bits(
    tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path, kind: str
) -> None:
    path = copied(tiny_onnx("int4"), tmp_path)
    round_folder(path, tiny_hf, ROWS, KINDS[kind])
    assert precision_of(path) == kind.split("/")[0].removeprefix("u")
    hop = compare(tiny_hf, path, PROMPTS)
    assert hop.kld < (0.02 if kind == "int8/32" else 3.0)
    round_folder(path, tiny_hf, ROWS, KINDS["int4/32"])  # and loses its zero points again
    assert not any("zero_points" in name for name in Folder(path, tiny_hf).weights)
    assert compare(tiny_hf, path, PROMPTS).kld < 3.0


def test_text_is_spread_and_what_is_too_long_left_out(tiny_hf: Path) -> None:
    rows = [[1] * 20 for _ in range(10)]
    assert task_rows(tiny_hf, [*rows, [1] * 300], [3] * 11) == [([1] * 20, 3)] * 10
    assert len(task_rows(tiny_hf, rows, [3] * 10, tokens=100)) == 5
    assert task_rows(tiny_hf, [*rows, [1]], [0] * 11)[-1] == ([1] * 20, 1)
    with pytest.raises(UsageError, match="longer than the model's context of 256 tokens"):
        task_rows(tiny_hf, [[1] * 300], [3])


def test_what_mixed_cannot_be_made_of_is_known_beforehand(tiny_hf: Path, tiny_onnx: Onnx) -> None:
    config = json.loads((tiny_hf / "config.json").read_text())
    with pytest.raises(UsageError, match="hidden size of 96 has 3 blocks of 32"):
        refuse_blocks(config, 32)
    refuse_blocks({**config, "hidden_size": 128, "head_dim": 16, "num_attention_heads": 8}, 32)
    assert smallest(config) < size_of(tiny_onnx("int4"))
