"""Call ggml's own quantizers on one matrix: what llama.cpp's ``llama_model_quantize`` does to each, without a file.

A wrong argument ends the process with an assertion inside ggml, so that everything is checked before.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from edgedistill.cpus import usable_cpus
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.types import GGML_TYPES, fits

_ROWS = 64  # rows that a thread takes at once, at least


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
    )  # fmt: skip


@cache
def library() -> Any:
    """Return libggml, with the functions that quantize typed."""
    from llama_cpp._ggml import libggml

    # A handle of our own to the same library, which finds what libggml-base has: others may type these functions otherwise.
    lib = ctypes.CDLL(libggml._name)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return lib


def quantize_matrix(
    weights: np.ndarray, type_name: str, importance: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """Quantize ``weights``, float32 [R, C], to uint8 [R, bytes of a row]; ``importance`` float32 [C] weighs the errors.

    The bytes do not depend on ``threads``: ggml quantizes row by row. Raises UsageError where rows do not fit the
    type, the type needs an importance that is missing, or a weight is not finite.
    """
    kind, (rows, columns) = GGML_TYPES[type_name], weights.shape
    if fits(type_name, columns) != type_name:
        raise UsageError(f"rows of {columns} weights do not fit {type_name}, whose blocks hold {kind.block}")
    if not np.isfinite(weights).all() or (importance is not None and not np.isfinite(importance).all()):
        raise UsageError("a weight or its importance is not finite: the model is broken")
    lib = library()
    if importance is None and lib.ggml_quantize_requires_imatrix(kind.number):
        raise UsageError(f"type {type_name} needs an importance matrix")
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    means = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if means is not None and means.shape != (columns,):
        raise UsageError(f"an importance of shape {means.shape} for rows of {columns} weights")
    out = np.empty((rows, columns // kind.block * kind.bytes), dtype=np.uint8)
    lib.ggml_quantize_init(kind.number)
    threads = threads or usable_cpus()
    step = max(_ROWS, -(-rows // (4 * threads)))

    def some(first: int) -> None:
        count = min(step, rows - first)
        lib.ggml_quantize_chunk(
            kind.number, weights[first:].ctypes.data, out[first:].ctypes.data, 0, count, columns,
            None if means is None else means.ctypes.data,
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(0, rows, step)))
    return out


def dequantize_matrix(blocks: np.ndarray, type_name: str, columns: int) -> np.ndarray:
    """Return float32 [R, ``columns``] of rows that ``quantize_matrix`` made."""
    kind, rows = GGML_TYPES[type_name], len(blocks)
    if type_name == "F32":
        return blocks.view(np.float32).reshape(rows, columns)
    traits = library().ggml_get_type_traits(kind.number).contents
    assert (traits.blck_size, traits.type_size) == (kind.block, kind.bytes), type_name
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    blocks = np.ascontiguousarray(blocks)
    out = np.empty((rows, columns), dtype=np.float32)
    convert(blocks.ctypes.data, out.ctypes.data, rows * columns)
    return out


def round_trip(
    weights: np.ndarray, type_name: str, importance: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """Return what is left of ``weights`` [R, C] in ``type_name``: quantized and dequantized, float32."""
    return dequantize_matrix(
        quantize_matrix(weights, type_name, importance, threads=threads), type_name, weights.shape[1]
    )
