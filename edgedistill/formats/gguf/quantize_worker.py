"""Quantize one GGUF in a process of its own: the request comes as JSON on standard input.

llama.cpp may abort the process on a failed assertion and may leave a truncated file after an error, so the caller never
runs it in-process. Standard output carries one JSON object a line: {"tensor", "done", "total", "type"} for progress,
and {"ok": true} or {"error", "log"} at the end. Request: src, out, ftype, output_type, embedding_type (ggml numbers or
null), pure, dry_run, threads, imatrix (path or null), types ({tensor: ggml number}, over what the file type has for it).
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any, cast

_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-\s+\[.*?\], type =\s*(\S+), (.*)")
_NEW_TYPE = re.compile(r"(?:converting to (\S+) |\((\S+)\)\s*$)")


def main() -> int:
    """Read the request, quantize, check that the result computes finite logits; the exit code is 0 or 1."""
    request = json.load(sys.stdin)
    if sys.platform == "linux":
        # Die with the caller: a killed build must not leave somebody who still writes to the file of the next one.
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    log: list[str] = []
    pending = ""

    import llama_cpp

    @llama_cpp.llama_log_callback
    def on_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        nonlocal pending
        pending += text.decode("utf-8", "replace")
        *lines, pending = pending.split("\n")
        for line in lines:
            log.append(line)
            if match := _LINE.search(line):
                changed = _NEW_TYPE.search(match[5])
                kind = (changed[1] or changed[2]) if changed else match[4]
                _tell({"tensor": match[3], "done": int(match[1]), "total": int(match[2]), "type": kind.upper()})

    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = request["ftype"], request["threads"]
    params.pure, params.dry_run = request["pure"], request["dry_run"]
    if request["output_type"] is not None:
        params.output_tensor_type = request["output_type"]
    if request["embedding_type"] is not None:
        params.token_embedding_type = request["embedding_type"]
    keep: list[Any] = []  # ctypes keeps no references to what the structure points to
    if request["types"]:
        _attach_types(params, request["types"], keep)
    if request["imatrix"]:
        _attach_imatrix(params, request["imatrix"], keep)
    code = llama_cpp.llama_model_quantize(
        request["src"].encode(), request["out"].encode(), cast(Any, ctypes.byref(params))
    )
    if code == 0 and not request["dry_run"]:
        problem = _try_out(request["out"])
    else:
        problem = next((line for line in reversed(log) if "failed" in line), f"code {code}") if code else ""
    _tell({"error": problem, "log": log[-8:]} if problem else {"ok": True})
    return 1 if problem else 0


def _attach_types(params: Any, types: dict[str, int], keep: list[Any]) -> None:
    """Give matrices types of their own. llama.cpp takes the embedding's and the head's from fields of their own."""
    import llama_cpp

    inner = {name: number for name, number in types.items() if name.startswith("blk.")}
    overrides = (llama_cpp.llama_model_tensor_override * (len(inner) + 1))()
    for override, (name, number) in zip(overrides, inner.items(), strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), number
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    params.token_embedding_type = types.get("token_embd.weight", params.token_embedding_type)
    params.output_tensor_type = types.get("output.weight", params.output_tensor_type)
    keep.append(overrides)


def _attach_imatrix(params: Any, path: str, keep: list[Any]) -> None:
    import llama_cpp
    import numpy as np

    from edgedistill.formats.gguf.imatrix import load
    from edgedistill.formats.gguf.read import read_info

    means = load(path)
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        data = np.ascontiguousarray(values)
        entry.name, entry.size = name.encode(), data.size
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep.append(data)
    # The same notes in the metadata as llama-quantize leaves, less the file's path: equal inputs give equal bytes.
    notes = (
        ("quantize.imatrix.entries_count", len(means)),
        ("quantize.imatrix.chunks_count", read_info(path).metadata.get("imatrix.chunk_count", 0)),
    )
    overrides = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
    for override, (key, value) in zip(overrides, notes, strict=False):
        override.key, override.tag = key.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        override.value.val_i64 = int(value)
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    params.kv_overrides = ctypes.cast(overrides, type(params.kv_overrides))
    keep += [entries, overrides]


def _try_out(path: str) -> str:
    """Load the file and decode one token; returns what is wrong, or an empty string."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        return "the quantized file does not load"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = 32
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return "no context can be made for the quantized file"
    tokens = (llama_cpp.llama_token * 1)(0)
    if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 1)) != 0:
        return "the quantized file does not decode"
    vocab = llama_cpp.llama_vocab_n_tokens(cast(Any, llama_cpp.llama_model_get_vocab(model)))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocab,))
    finite = bool(np.isfinite(logits).all())
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return "" if finite else "the quantized file computes logits that are not finite"


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
