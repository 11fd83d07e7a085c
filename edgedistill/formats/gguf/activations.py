"""Run token rows through a GGUF with llama.cpp, and look at what every weight matrix is given.

Calibration (``imatrix``) sums the squares of it, rounding (``rounding``) its second moments. The caller passes token rows,
so that the text has the chat template and the length of the task's own prompts and answers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgedistill.cpus import usable_cpus
from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.read import read_info

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]
Take = Callable[[str, str, "np.ndarray"], None]
"""Called with a matrix's name, the name of its input and the input itself: float32 [tokens, columns], valid until it
returns. Matrices with the same input (query, key and value) name it alike."""

CHUNK = 512  # tokens a batch holds
_MAX_OUTPUTS = 1 << 28  # bytes that the logits of one batch may take
_SEQUENCES = 32


@dataclass(frozen=True)
class Seen:
    """How much text was run."""

    rows: int
    tokens: int


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor (ggml.h): as much of it as is read here."""

    _fields_ = (
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


class _Watcher:
    """The evaluation callback: hands over the input of every wanted matrix product inside the layers."""

    def __init__(self, wanted: Callable[[str], bool], take: Take) -> None:
        from llama_cpp._ggml import libggml

        self.wanted, self.take = wanted, take
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
        if not name.startswith("blk.") or not name.endswith(".weight") or value.type != 0 or not self.wanted(name):
            return not ask
        if ask:
            return True
        columns, rows = value.ne[0], value.ne[1]
        if value.nb[0] != 4 or value.ne[2] != 1 or value.ne[3] != 1:
            raise ValueError(f"the input of {name} has shape {tuple(value.ne)}, which is not a plain matrix")
        flat = np.ctypeslib.as_array((ctypes.c_float * (rows * value.nb[1] // 4)).from_address(value.data))
        self.take(name, value.name.decode() or name, flat.reshape(rows, value.nb[1] // 4)[:, :columns])
        return True


def watch_inputs(
    gguf: Path | str,
    token_rows: Sequence[Sequence[int]],
    take: Take,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    after: Callable[[], None] = lambda: None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Seen:
    """Run ``token_rows`` (each a text of its own, in token ids) through the model; ``take`` sees the inputs of the
    ``wanted`` matrices, and ``after`` is called behind every batch, where llama.cpp's threads rest.

    ``gguf`` should be the f16, bf16 or f32 file. Logits are asked of every token, since llama.cpp computes the last layer
    only for tokens whose logits are wanted. Raises UsageError for empty rows or ids outside the vocabulary, StepFailed
    when a decode fails.
    """
    import llama_cpp

    from edgedistill.formats.gguf.model_io import last_log, silence

    rows = [list(row) for row in token_rows if row]
    if not rows:
        raise UsageError("the calibration set is empty", "give at least a few dozen texts of the task")
    vocab = read_info(gguf).vocab
    if bad := next((number for row in rows for number in row if not 0 <= number < vocab), None):
        raise UsageError(f"calibration token {bad} is outside the vocabulary of {vocab}: rows of another tokenizer?")
    silence()
    llama_cpp.llama_backend_init()
    watcher = _Watcher(wanted, take)
    callback = llama_cpp.ggml_backend_sched_eval_callback(watcher)
    width = max(32, min(CHUNK, _MAX_OUTPUTS // (4 * vocab)))
    longest = max(len(row) for row in rows)
    total = sum(len(row) for row in rows)
    threads = threads or usable_cpus()
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
            if watcher.error or code != 0:
                raise StepFailed(f"calibration stopped: {watcher.error or f'llama_decode gave {code}: {last_log(3)}'}")
            after()
            done += len(items)
            if progress:
                progress(done, total, f"{done} of {total} tokens")
    finally:
        if batch is not None:
            llama_cpp.llama_batch_free(batch)
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return Seen(len(rows), total)


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
