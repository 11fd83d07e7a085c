"""Blocks are taken out of a file as transformers orders their rows, and go back to where they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.repack import Matrix, read_matrices, replace_codes

Tiny = Callable[..., Path]


def parts(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix's codes [R, C] and bases."""
    form = matrix.form
    codes = form.codes(matrix.blocks)
    return codes.reshape(len(codes), -1), form.bases(matrix.blocks).astype(np.float16)


@pytest.mark.parametrize("type_", ["Q4_0", "Q8_0", "IQ4_NL", "Q4_K_M"])
def test_what_was_read_is_what_transformers_has_and_goes_back_byte_by_byte(
    type_: str, tiny_gguf: Tiny, tmp_path: Path
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256} if "K" in type_ else {}
    path = tmp_path / "q.gguf"
    quantize(tiny_gguf(**wide), path, type_)
    gguf_to_hf(path, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    matrices = {one.name: one for one in read_matrices(path)}
    assert set(matrices) == {name for name, value in weights.items() if value.ndim == 2}
    for name, one in matrices.items():
        values = one.form.values(one.blocks, one.form.codes(one.blocks))
        np.testing.assert_array_equal(values.reshape(weights[name].shape), weights[name])
    coarse = [one.type for one in read_matrices(path, coarse=True)]
    assert ("Q8_0" in coarse) is (type_ == "Q8_0") and len(coarse) >= 14
    same = tmp_path / "same.gguf"
    shutil.copyfile(path, same)
    assert replace_codes(same, {name: parts(one) for name, one in matrices.items()}) == len(matrices) == 15
    assert same.read_bytes() == path.read_bytes()


def test_other_codes_and_scales_go_where_their_rows_are(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path, name = tmp_path / "q.gguf", "model.layers.1.self_attn.k_proj.weight"
    quantize(tiny_gguf(), path, "Q4_0")
    info = read_info(path)
    gguf_to_hf(path, tmp_path / "before")
    codes, bases = parts(next(one for one in read_matrices(path) if one.name == name))
    codes[3], bases[5] = 15 - codes[3], 2 * bases[5]
    replace_codes(path, {name: (codes, bases)})
    assert read_info(path).tensors == info.tensors
    gguf_to_hf(path, tmp_path / "after")
    old, new = (load_file(tmp_path / at / "model.safetensors") for at in ("before", "after"))
    want = old[name].copy()
    scale = bases[3].astype(np.float32).repeat(32)
    want[3] = -old[name][3] - scale  # 15 - code is the level 7 - (level + 8)
    want[5] *= 2
    np.testing.assert_array_equal(new[name], want)
    for other in old:
        if other != name:
            np.testing.assert_array_equal(old[other], new[other])


@pytest.mark.parametrize("wrong", ["model.layers.9.mlp.up_proj.weight", "model.norm.weight"])
def test_what_does_not_fit_is_refused_and_nothing_written(wrong: str, tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    quantize(tiny_gguf(), path, "Q4_0")
    before = path.read_bytes()
    first = next(read_matrices(path))
    codes, bases = parts(first)
    with pytest.raises(StepFailed, match="no place for the codes"):
        replace_codes(path, {first.name: (15 - codes, bases), wrong: (codes, bases)})
    with pytest.raises(StepFailed, match="no place for the codes"):
        replace_codes(path, {first.name: (codes[1:], bases)})
    assert path.read_bytes() == before
