"""Write a quantized GGUF tensor by tensor: the file that ``llama_model_quantize`` writes, byte for byte.

Which type each tensor gets llama.cpp has said before (its dry run); the header is made by ggml's own functions, the tensors by
``ggml_quantize_chunk``. So a tensor that was quantized before can be put in as it is, and no more than a slab of rows is in memory
for each thread, where llama.cpp holds a whole matrix in float32.

A wrong argument ends the process with an assertion inside ggml: this runs in a process of its own (``quantize_worker``).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.formats.gguf.ggml import library
from edgedistill.formats.gguf.read import TensorInfo, read_info
from edgedistill.formats.gguf.reuse import Place, rounded_key, source_digest, tensor_key
from edgedistill.formats.gguf.types import GGML_TYPES, NEEDS_IMATRIX, row_bytes

if TYPE_CHECKING:
    import numpy as np

_SLAB = 1 << 20  # weights that a thread has in memory, where a row is not longer
_BLOCK = 1 << 22  # bytes copied at once
_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT: what llama.cpp pads every tensor to, the last one too


class _InitParams(ctypes.Structure):
    """gguf_init_params (gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


@dataclass(frozen=True, kw_only=True)
class Written:
    """One tensor as it was written: its ``key``, if it is one that is found again, and whether it was ``found``, rounded where
    ``errors`` are given.
    """

    name: str
    type: str
    key: str = ""
    found: bool = False
    errors: tuple[float, float] | None = None


def assemble(
    src: Path,
    out: Path,
    types: Mapping[str, str],
    *,
    file_type: int,
    notes: Mapping[str, int],
    means: Mapping[str, np.ndarray],
    threads: int,
    known: Mapping[str, Place] | None = None,
    build: str = "",
    rounded: Callable[[str, str], str] = lambda name, type_name: "",
    tell: Callable[[Written], None] = lambda written: None,
) -> None:
    """Write ``src`` with its tensors in ``types``, in that order, to ``out``.

    ``notes`` go to the header (uint32), ``means`` is the importance matrix. Tensors that are in ``known`` are copied from there;
    None: digests are not even taken. ``rounded`` gives the digest of what a tensor will be rounded by, "" where it stays as
    it is. ``tell`` is called for each tensor in turn. Raises ValueError in words where llama.cpp would refuse, OSError of the
    disk.
    """
    info = read_info(src)
    tensors = {tensor.name: tensor for tensor in info.tensors}
    head, offsets = _header(src, types, file_type, notes)
    with open(src, "rb") as source, open(out, "wb") as target, ThreadPoolExecutor(threads) as pool:
        last = tensors[list(types)[-1]]
        rows = math.prod(last.shape[:-1])
        end = len(head) + offsets[-1] + rows * row_bytes(types[last.name], last.shape[-1])
        target.truncate(-(-end // _ALIGNMENT) * _ALIGNMENT)  # with the zeros between tensors
        files = source.fileno(), target.fileno()
        _put(files[1], head, 0)
        keys = dict.fromkeys(types, "")
        if known is not None:
            names = pool.map(lambda name: _key(files[0], tensors[name], types[name], means, build), types)
            keys = dict(zip(types, names, strict=True))
        waiting: list[tuple[Written, list[Future[None]]]] = []
        for (name, type_name), offset in zip(types.items(), offsets, strict=True):
            tensor, at = tensors[name], len(head) + offset
            if tensor.type == type_name:
                waiting.append((Written(name=name, type=type_name), [pool.submit(_copy, files, tensor, at)]))
                continue
            key = keys[name]
            final = rounded_key(key, name, feedback) if key and (feedback := rounded(name, type_name)) else key
            place = (known or {}).get(final)
            data = place.read() if place else None
            found = data is not None
            if not found and key != final and (nearest := (known or {}).get(key)):
                data = nearest.read()  # to be rounded yet
            if data is not None:
                _put(files[1], data, at)
            written = Written(
                name=name, type=type_name, key=final, found=found, errors=place.errors if place and found else None
            )
            waiting.append((written, [] if data is not None else _quantized(pool, files, tensor, at, type_name, means)))
        try:
            for written, parts in waiting:
                for part in parts:
                    part.result()
                tell(written)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _header(src: Path, types: Mapping[str, str], file_type: int, notes: Mapping[str, int]) -> tuple[bytes, list[int]]:
    """Return the header that llama.cpp gives the file, and where each tensor begins behind it."""
    lib = _functions()
    context = ctypes.c_void_p()
    read = lib.gguf_init_from_file(str(src).encode(), _InitParams(True, ctypes.pointer(context)))
    if not read:
        raise ValueError(f"ggml cannot read the header of {src}")
    made = lib.gguf_init_empty()
    try:
        lib.gguf_set_kv(made, read)
        values = {"general.quantization_version": 2, "general.file_type": file_type}  # GGML_QNT_VERSION
        for key, value in {**values, **notes}.items():
            lib.gguf_set_val_u32(made, key.encode(), value)
        for name in types:
            lib.gguf_add_tensor(made, lib.ggml_get_tensor(context, name.encode()))
        for name, type_name in types.items():
            lib.gguf_set_tensor_type(made, name.encode(), GGML_TYPES[type_name].number)
        head = ctypes.create_string_buffer(lib.gguf_get_meta_size(made))
        lib.gguf_get_meta_data(made, head)
        return head.raw, [lib.gguf_get_tensor_offset(made, at) for at in range(len(types))]
    finally:
        lib.gguf_free(made)
        lib.gguf_free(read)
        lib.ggml_free(context)


def _key(source: int, tensor: TensorInfo, type_name: str, means: Mapping[str, np.ndarray], build: str) -> str:
    """Name a tensor in its new type; "" where it stays as it is."""
    if tensor.type == type_name:
        return ""
    importance = _importance(tensor, type_name, means)
    own = None if importance is None else importance.tobytes()
    return tensor_key(source_digest(source, tensor), tensor.type, tensor.shape, type_name, own, build)


def _copy(files: tuple[int, int], tensor: TensorInfo, offset: int) -> None:
    """Copy a tensor as it is."""
    for at in range(0, tensor.nbytes, _BLOCK):
        data = os.pread(files[0], min(_BLOCK, tensor.nbytes - at), tensor.offset + at)
        _check(tensor.name, tensor.type, data, "has invalid data: a weight is not finite")
        _put(files[1], data, offset + at)


def _importance(tensor: TensorInfo, type_name: str, means: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the importance of a tensor's columns, one row an expert; None where there is none, as in llama.cpp."""
    import numpy as np

    embedded = tensor.name in ("token_embd.weight", "per_layer_token_embd.weight")
    found, columns = means.get(tensor.name), tensor.shape[-1]
    size = columns * (tensor.shape[0] if len(tensor.shape) > 2 else 1)
    if found is not None and found.size != size:
        if not embedded:
            raise ValueError(f"imatrix size {found.size} is different from tensor size {size} for {tensor.name}")
        found = None
    if found is None and (
        library().ggml_quantize_requires_imatrix(GGML_TYPES[type_name].number)
        or (type_name in NEEDS_IMATRIX and not embedded and tensor.name != "output.weight")
    ):
        raise ValueError(f"Missing importance matrix for tensor {tensor.name} in a very low-bit quantization")
    return None if found is None else np.ascontiguousarray(found, dtype=np.float32).reshape(-1, columns)


def _quantized(
    pool: ThreadPoolExecutor,
    files: tuple[int, int],
    tensor: TensorInfo,
    offset: int,
    type_name: str,
    means: Mapping[str, np.ndarray],
) -> list[Future[None]]:
    """Quantize a tensor slab by slab; a slab lies within one expert."""
    importance = _importance(tensor, type_name, means)
    columns = tensor.shape[-1]
    rows = tensor.shape[-2]
    experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
    library().ggml_quantize_init(GGML_TYPES[type_name].number)
    some = max(1, _SLAB // columns)
    row = row_bytes(tensor.type, columns), row_bytes(type_name, columns)

    def one(first: int, count: int, own: np.ndarray | None) -> None:
        data = os.pread(files[0], count * row[0], tensor.offset + first * row[0])
        _check(tensor.name, tensor.type, data, "has invalid data: a weight is not finite")
        weights = _floats(data, tensor.type)
        made = ctypes.create_string_buffer(count * row[1])
        library().ggml_quantize_chunk(
            GGML_TYPES[type_name].number, weights.ctypes.data, made, 0, count, columns, None if own is None else own.ctypes.data
        )  # fmt: skip
        _check(tensor.name, type_name, made, f"cannot be quantized to {type_name}")
        _put(files[1], made, offset + first * row[1])

    return [
        pool.submit(one, expert * rows + first, min(some, rows - first), None if importance is None else importance[expert])
        for expert in range(experts)
        for first in range(0, rows, some)
    ]  # fmt: skip


def _floats(data: bytes, type_name: str) -> np.ndarray:
    """Return weights in float32."""
    import numpy as np

    if type_name == "F32":
        return np.frombuffer(data, dtype=np.float32)
    lib = _functions()
    out = np.empty(len(data) // 2, dtype=np.float32)
    convert = {"F16": lib.ggml_fp16_to_fp32_row, "BF16": lib.ggml_bf16_to_fp32_row}[type_name]
    convert(data, out.ctypes.data, out.size)
    return out


def _check(name: str, type_name: str, data: Any, why: str) -> None:
    if not _functions().ggml_validate_row_data(GGML_TYPES[type_name].number, data, len(data)):
        raise ValueError(f"tensor {name} {why}")


def _put(file: int, data: Any, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


@cache
def _functions() -> Any:
    """Return ggml's library with the functions used here typed."""
    lib = library()
    text, number, pointer, size = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, (text, _InitParams)),
        ("gguf_init_empty", pointer, ()),
        ("gguf_free", None, (pointer,)),
        ("ggml_free", None, (pointer,)),
        ("gguf_set_kv", None, (pointer, pointer)),
        ("gguf_set_val_u32", None, (pointer, text, ctypes.c_uint32)),
        ("ggml_get_tensor", pointer, (pointer, text)),
        ("gguf_add_tensor", None, (pointer, pointer)),
        ("gguf_set_tensor_type", None, (pointer, text, ctypes.c_int)),
        ("gguf_get_meta_size", size, (pointer,)),
        ("gguf_get_meta_data", None, (pointer, pointer)),
        ("gguf_get_tensor_offset", size, (pointer, number)),
        ("ggml_validate_row_data", ctypes.c_bool, (ctypes.c_int, pointer, size)),
        ("ggml_fp16_to_fp32_row", None, (text, pointer, number)),
        ("ggml_bf16_to_fp32_row", None, (text, pointer, number)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, list(arguments)
    return lib
