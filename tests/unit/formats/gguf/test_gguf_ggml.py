"""One matrix through ggml's own quantizers is what a whole file through llama.cpp has, and what others read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.ggml import dequantize_matrix, quantize_matrix, round_trip
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.formats.gguf.types import PALETTE, row_bytes


@pytest.mark.parametrize("name", PALETTE)
def test_what_is_left_is_what_gguf_py_reads(name: str) -> None:
    rng = np.random.default_rng(0)
    weights, importance = rng.normal(0, 1, (70, 256)).astype(np.float32), rng.random(256).astype(np.float32) + 0.1
    blocks = quantize_matrix(weights, name, importance, threads=1)
    assert blocks.shape == (70, row_bytes(name, 256))
    assert (blocks == quantize_matrix(weights, name, importance, threads=3)).all()
    theirs = dequantize(blocks, GGMLQuantizationType[name]).reshape(70, 256)
    np.testing.assert_array_equal(dequantize_matrix(blocks, name, 256), theirs)
    assert 0 < np.abs(theirs - weights).max() < 1.5


def test_a_matrix_is_quantized_as_in_llama_cpps_file(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_gguf()
    info = read_info(quantize(source, tmp_path / "q.gguf", "Q4_1", pure=True).path or "")
    name = "blk.1.ffn_up.weight"
    tensor = next(one for one in info.tensors if one.name == name)
    raw = np.fromfile(info.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    assert (raw == quantize_matrix(read_tensor(read_info(source), name), "Q4_1").reshape(-1)).all()


def test_what_would_end_the_process_is_refused_before() -> None:
    weights = np.ones((4, 64), dtype=np.float32)
    with pytest.raises(UsageError, match="64 weights do not fit Q4_K, whose blocks hold 256"):
        quantize_matrix(weights, "Q4_K")
    with pytest.raises(UsageError, match="IQ2_XXS needs an importance matrix"):
        quantize_matrix(np.ones((4, 256), dtype=np.float32), "IQ2_XXS")
    with pytest.raises(UsageError, match=r"importance of shape \(32,\)"):
        quantize_matrix(weights, "Q4_0", np.ones(32, dtype=np.float32))
    with pytest.raises(UsageError, match="not finite"):
        round_trip(np.full((4, 64), np.nan, dtype=np.float32), "Q4_0")
