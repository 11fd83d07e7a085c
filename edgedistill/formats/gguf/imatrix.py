"""Collect an importance matrix: mean squared input of every weight matrix over calibration text, in llama.cpp's format.

The stock tool reads raw text in chunks; here the caller passes token rows, so that the calibration has the chat
template and the length of the task's own prompts and answers. The file is the one that ``llama-imatrix`` writes (GGUF,
tensors NAME.in_sum2 and NAME.counts) and that ``llama-quantize --imatrix`` reads.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.read import read_info, read_tensor

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]

_CHUNK = 512  # tokens a batch holds; also what the file states as its chunk size
_MAX_OUTPUTS = 1 << 28  # bytes that the logits of one batch may take
_SEQUENCES = 32


@dataclass(frozen=True, kw_only=True)
class ImatrixReport:
    """What was collected: ``tensors`` of ``matrices`` weight matrices inside the layers, over ``tokens`` in
    ``rows``.
    """

    path: Path
    tensors: int
    matrices: int
    rows: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor (ggml.h): as much of it as is read here."""

    _fields_ = (
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


class _Collector:
    """The evaluation callback: sums the squares of the input of every matrix product inside the layers."""

    def __init__(self) -> None:
        from llama_cpp._ggml import libggml

        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.error = ""
        libggml.ggml_op_name.restype = ctypes.c_char_p
        libggml.ggml_op_name.argtypes = [ctypes.c_int]
        # Operation numbers move between releases; names do not.
        self.mul_mat = next(number for number in range(200) if libggml.ggml_op_name(number) == b"MUL_MAT")

    def __call__(self, address: int, ask: bool, user_data: Any) -> bool:
        try:
            return self._see(address, ask)
        except Exception as error:  # an exception cannot cross the C frames: keep it, and stop the decode
            self.error = self.error or f"{type(error).__name__}: {error}"
            return False

    def _see(self, address: int, ask: bool) -> bool:
        import numpy as np

        node = _Tensor.from_address(address)
        if node.op != self.mul_mat:
            return not ask
        weight, value = _Tensor.from_address(node.src[0]), _Tensor.from_address(node.src[1])
        name = weight.name.decode()
        if not name.startswith("blk.") or not name.endswith(".weight") or value.type != 0:
            return not ask
        if ask:
            return True
        columns, rows = value.ne[0], value.ne[1]
        if value.nb[0] != 4 or value.ne[2] != 1 or value.ne[3] != 1:
            raise ValueError(f"the input of {name} has shape {tuple(value.ne)}, which is not a plain matrix")
        flat = np.ctypeslib.as_array((ctypes.c_float * (rows * value.nb[1] // 4)).from_address(value.data))
        inputs = flat.reshape(rows, value.nb[1] // 4)[:, :columns]
        total = np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + rows
        return True


def collect(
    gguf: Path | str, token_rows: Sequence[Sequence[int]], out: Path | str, *, threads: int | None = None,
    dataset: str = "calibration", progress: Progress | None = None,
) -> ImatrixReport:  # fmt: skip
    """Run ``token_rows`` (each a text of its own, in token ids) through the model and save its importance matrix to
    ``out``.

    ``gguf`` should be the f16, bf16 or f32 file that will be quantized. Logits are asked of every token, since
    llama.cpp computes the last layer only for tokens whose logits are wanted. Raises UsageError for empty rows or ids
    outside the vocabulary, StepFailed when a decode fails or the activations are not finite.
    """
    import llama_cpp
    import numpy as np

    from edgedistill.formats.gguf.model_io import last_log, silence

    started = time.monotonic()
    out = Path(out)
    info = read_info(gguf)
    rows = [list(row) for row in token_rows if row]
    if not rows:
        raise UsageError("the calibration set is empty", "give at least a few dozen texts of the task")
    vocab = info.vocab
    if bad := next((number for row in rows for number in row if not 0 <= number < vocab), None):
        raise UsageError(f"calibration token {bad} is outside the vocabulary of {vocab}: rows of another tokenizer?")
    silence()
    llama_cpp.llama_backend_init()
    collector = _Collector()
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector)
    width = max(32, min(_CHUNK, _MAX_OUTPUTS // (4 * vocab)))
    longest = max(len(row) for row in rows)
    total = sum(len(row) for row in rows)
    threads = threads or os.cpu_count() or 1
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise UsageError(f"{gguf}: llama.cpp cannot load this model: {last_log(2)}", "edgedistill doctor")
    context = batch = None
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(width, longest), width, width
        params.n_seq_max, params.kv_unified = _SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise StepFailed(f"llama.cpp could not make a context of {params.n_ctx} tokens: {last_log(2)}")
        memory = cast(Any, llama_cpp.llama_get_memory(context))
        batch = llama_cpp.llama_batch_init(width, 0, 1)
        done = 0
        for fresh, items in _batches(rows, width):
            if fresh:
                llama_cpp.llama_memory_clear(memory, True)
            batch.n_tokens = len(items)
            for i, (token, position, sequence) in enumerate(items):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, 1
            code = llama_cpp.llama_decode(context, batch)
            if collector.error or code != 0:
                raise StepFailed(
                    f"calibration stopped: {collector.error or f'llama_decode gave {code}: {last_log(3)}'}"
                )
            done += len(items)
            if progress:
                progress(done, total, f"{done} of {total} tokens")
    finally:
        if batch is not None:
            llama_cpp.llama_batch_free(batch)
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    for name, values in collector.sums.items():
        if not np.isfinite(values).all():
            raise StepFailed(
                f"the input of {name} is not finite: the model is broken", "compare the f16 file with the checkpoint"
            )
    save(out, {name: (values, collector.counts[name]) for name, values in collector.sums.items()}, total, dataset)
    matrices = sum(1 for tensor in info.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1)
    return ImatrixReport(
        path=out, tensors=len(collector.sums), matrices=matrices, rows=len(rows), tokens=total,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _batches(rows: list[list[int]], width: int) -> Iterator[tuple[bool, list[tuple[int, int, int]]]]:
    """Yield (start with an empty cache?, [(token, position, sequence)]): short rows share a batch, long ones take
    several.
    """
    shared: list[tuple[int, int, int]] = []
    sequence = 0
    for row in rows:
        if len(row) > width:
            for first in range(0, len(row), width):
                part = row[first : first + width]
                yield first == 0, [(token, first + i, 0) for i, token in enumerate(part)]
            continue
        if shared and (len(shared) + len(row) > width or sequence == _SEQUENCES):
            yield True, shared
            shared, sequence = [], 0
        shared = shared + [(token, i, sequence) for i, token in enumerate(row)]
        sequence += 1
    if shared:
        yield True, shared


def save(out: Path, sums: dict[str, tuple[np.ndarray, int]], tokens: int, dataset: str) -> None:
    """Write {tensor: (sum of squares per column, tokens seen)} in llama.cpp's imatrix format, whole or not at all."""
    import gguf
    import numpy as np

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "imatrix")
    try:
        writer.kv_data[0].pop("general.architecture")  # llama.cpp's own file has none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", -(-tokens // _CHUNK))
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        for name in sorted(sums):
            values, count = sums[name]
            writer.add_tensor(f"{name}.in_sum2", np.asarray(values, dtype=np.float32).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror or error}", "free some disk space") from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def load(path: Path | str) -> dict[str, np.ndarray]:
    """Read an importance matrix: {tensor name: mean squared input per column, float32}, as llama-quantize normalizes
    it.

    Raises UsageError for a damaged file, one that is no imatrix, and the old .dat format.
    """
    import numpy as np

    info = read_info(path)
    names = [tensor.name.removesuffix(".in_sum2") for tensor in info.tensors if tensor.name.endswith(".in_sum2")]
    known = {tensor.name for tensor in info.tensors}
    if info.metadata.get("general.type") != "imatrix" or not names:
        raise UsageError(f"{path}: not an importance matrix (general.type is {info.metadata.get('general.type')!r})")
    means: dict[str, np.ndarray] = {}
    for name in names:
        if f"{name}.counts" not in known:
            raise UsageError(f"{path}: {name} has sums but no counts", "collect the importance matrix again")
        sums, counts = read_tensor(info, f"{name}.in_sum2"), read_tensor(info, f"{name}.counts").reshape(-1, 1)
        sums = sums.reshape(counts.shape[0], -1)
        # An expert that no token reached counts as 1, as in llama-quantize.
        means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32).reshape(-1)
    return means
