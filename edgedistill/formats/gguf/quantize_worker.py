"""Quantize one GGUF in a process of its own: the request comes as JSON on standard input.

llama.cpp may abort the process on a failed assertion, so the caller never runs it in-process. Its dry run says which type each
tensor gets; ``assemble`` then writes the file. Standard output carries one JSON object a line: {"tensor", "done", "total",
"type"} for progress, with "key", "found" and "errors" where tensors are found again, and {"ok": true} or {"error", "log"} at
the end. Request: src, out, ftype, output_type, embedding_type (ggml numbers or null), pure, dry_run, threads, imatrix (path or
null), types ({tensor: ggml number}, over what the file type has for it), store (folder whose quantized files are looked through,
or null), feedback (digest of what tensors will be rounded by, or "") and rounded (the types that will be).
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any, cast

_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-\s+\[.*?\], type =\s*(\S+), (.*)")
_NEW_TYPE = re.compile(r"(?:converting to (\S+) |\((\S+)\)\s*$)")


def main() -> int:
    """Read the request, quantize, check that the result computes finite logits; the exit code is 0 or 1."""
    request = json.load(sys.stdin)
    log: list[str] = []
    types: dict[str, str] = {}
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
                types[match[3]] = _spell((changed[1] or changed[2]) if changed else match[4])

    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = request["ftype"], request["threads"]
    params.pure, params.dry_run = request["pure"], True
    if request["output_type"] is not None:
        params.output_tensor_type = request["output_type"]
    if request["embedding_type"] is not None:
        params.token_embedding_type = request["embedding_type"]
    keep: list[Any] = []  # ctypes keeps no references to what the structure points to
    if request["types"]:
        _attach_types(params, request["types"], keep)
    means: dict[str, Any] = {}
    notes: dict[str, int] = {}
    if request["imatrix"]:
        means, notes = _attach_imatrix(params, request["imatrix"], keep)
    code = llama_cpp.llama_model_quantize(
        request["src"].encode(), request["out"].encode(), cast(Any, ctypes.byref(params))
    )
    problem = next((line for line in reversed(log) if "failed" in line), f"code {code}") if code else ""
    if not problem and request["dry_run"]:
        for done, (name, type_name) in enumerate(types.items(), 1):
            _tell({"tensor": name, "done": done, "total": len(types), "type": type_name})
    elif not problem:
        problem = _write(request, types, means, notes) or _try_out(request["out"])
    _tell({"error": problem, "log": log[-8:]} if problem else {"ok": True})
    return 1 if problem else 0


def _write(request: dict[str, Any], types: dict[str, str], means: dict[str, Any], notes: dict[str, int]) -> str:
    """Write the file; returns what is wrong, or an empty string."""
    from edgedistill.formats.gguf.assemble import Written, assemble
    from edgedistill.formats.gguf.model_io import library_build
    from edgedistill.formats.gguf.reuse import find_tensors

    told = 0

    def tell(one: Written) -> None:
        nonlocal told
        told += 1
        message = {"tensor": one.name, "done": told, "total": len(types), "type": one.type}
        _tell(message | ({"key": one.key, "found": one.found, "errors": one.errors} if one.key else {}))

    def rounded(name: str, type_name: str) -> str:
        return request["feedback"] if name.startswith("blk.") and type_name in request["rounded"] else ""

    store = request["store"]
    try:
        assemble(
            Path(request["src"]), Path(request["out"]), types,
            file_type=request["ftype"], notes=notes, means=means, threads=request["threads"],
            known=None if store is None else find_tensors(Path(store)),
            build=library_build()["library_sha256"] if store is not None else "",
            rounded=rounded, tell=tell,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return f"failed to quantize: {error}"
    return ""


def _spell(name: str) -> str:
    """Return our spelling of a type that llama.cpp logged in its own case (q4_K, iq4_nl, bf16)."""
    from edgedistill.formats.gguf.types import GGML_TYPES

    return next((known for known in GGML_TYPES if known.upper() == name.upper()), name)


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


def _attach_imatrix(params: Any, path: str, keep: list[Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Give llama.cpp an importance matrix; returns it, and what the header says of it."""
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
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    keep.append(entries)
    # The same notes in the metadata as llama-quantize leaves, less the file's path: equal inputs give equal bytes.
    chunks = int(read_info(path).metadata.get("imatrix.chunk_count", 0))
    return means, {"quantize.imatrix.entries_count": len(means), "quantize.imatrix.chunks_count": chunks}


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
