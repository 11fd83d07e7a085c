"""ggml's own quantize and dequantize, for one matrix at a time."""

from __future__ import annotations

import ctypes

import numpy as np

from edgedistill.formats.gguf.types import GGML_TYPES

FLOATS = ctypes.POINTER(ctypes.c_float)


def quantized(name: str, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Let ggml quantize ``weights`` [R, C]: blocks uint8 [R, C / size, bytes]."""
    from llama_cpp._ggml import libggml

    chunk, kind = libggml.ggml_quantize_chunk, GGML_TYPES[name]
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, FLOATS]
    rows, columns = weights.shape
    out = np.zeros((rows, columns // kind.block, kind.bytes), dtype=np.uint8)
    given = weights.ctypes.data_as(FLOATS), importance.ctypes.data_as(FLOATS)
    assert chunk(kind.number, given[0], out.ctypes.data, 0, rows, columns, given[1]) == out.nbytes
    return out


def dequantized(name: str, blocks: np.ndarray) -> np.ndarray:
    """Let ggml dequantize blocks [R, n, bytes]: float32 [R, n * size]."""
    from llama_cpp._ggml import libggml

    row = getattr(libggml, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    row.restype, row.argtypes = None, [ctypes.c_void_p, FLOATS, ctypes.c_int64]
    out = np.zeros((len(blocks), blocks.shape[1] * GGML_TYPES[name].block), dtype=np.float32)
    blocks = np.ascontiguousarray(blocks)
    row(blocks.ctypes.data, out.ctypes.data_as(FLOATS), out.size)
    return out
