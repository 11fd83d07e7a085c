"""Open GGUF models through llama-cpp-python: quiet, with load failures in words, and with the build's identity."""

from __future__ import annotations

import collections
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.cpus import usable_cpus
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.read import read_info

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama

_LOG: collections.deque[str] = collections.deque(maxlen=400)
_callback: Any = None


def silence() -> None:
    """Send llama.cpp's log to a buffer of 400 pieces instead of stderr; ``last_log`` reads it."""
    global _callback
    import ctypes

    import llama_cpp

    if _callback is None:

        @llama_cpp.llama_log_callback
        def keep(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
            _LOG.append(text.decode("utf-8", "replace"))

        _callback = keep  # ctypes keeps no reference of its own
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def last_log(lines: int = 12) -> str:
    """Return the last lines that llama.cpp logged."""
    return "\n".join("".join(_LOG).splitlines()[-lines:])


def open_model(
    path: Path | str,
    *,
    n_ctx: int = 512,
    threads: int | None = None,
    logits_all: bool = False,
    n_batch: int = 512,
    vocab_only: bool = False,
    **options: Any,
) -> Llama:
    """Load a GGUF with llama.cpp and return its ``llama_cpp.Llama`` (close it with ``.close()``).

    ``n_ctx`` in tokens; ``threads`` for decoding and prompt processing alike (default: the machine's cores);
    ``options`` go to ``llama_cpp.Llama``. ``logits_all`` keeps n_ctx x vocabulary floats in memory: prefer
    ``all_logits`` below. Raises UsageError when the file is damaged, of a family that this llama.cpp does not know, or
    too big for the memory.
    """
    info = read_info(path)
    try:
        import llama_cpp
    except ImportError as error:
        raise UsageError(f"llama-cpp-python cannot be imported: {error}", "pip install llama-cpp-python") from None

    silence()
    threads = threads or usable_cpus()
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=n_ctx, n_batch=min(n_batch, n_ctx) if n_ctx else n_batch, n_ubatch=min(n_batch, 512),
            n_threads=threads, n_threads_batch=threads, logits_all=logits_all, vocab_only=vocab_only,
            verbose=False, **options,
        )  # fmt: skip
    except (ValueError, RuntimeError, MemoryError) as error:
        why = next(
            (line.strip() for line in reversed(last_log(60).splitlines()) if "error" in line.lower()), str(error)
        )
        raise UsageError(
            f"{path}: llama.cpp cannot load this {info.architecture or 'GGUF'} model: {why}",
            f"edgedistill doctor (llama-cpp-python {llama_cpp.__version__})",
        ) from None


def all_logits(model: Llama, ids: list[int], *, start: int = 0) -> np.ndarray:
    """Decode ``ids`` from an empty cache and return the logits of every token from ``start`` on.

    Shape (len(ids) - start, vocabulary), float32. Raises UsageError when the ids do not fit the context.
    """
    import llama_cpp
    import numpy as np

    if not 0 < len(ids) <= model.n_ctx():
        raise UsageError(
            f"{len(ids)} tokens do not fit the context of {model.n_ctx()}", "open the model with a larger n_ctx"
        )
    vocab = model.n_vocab()
    out = np.empty((len(ids) - start, vocab), dtype=np.float32)
    context = model._ctx.ctx
    model.reset()
    model._ctx.kv_cache_clear()
    step = model.n_batch
    batch = llama_cpp.llama_batch_init(step, 0, 1)
    try:
        for first in range(0, len(ids), step):
            part = ids[first : first + step]
            batch.n_tokens = len(part)
            wanted = 0
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = first + i >= start
                wanted += first + i >= start
            if (code := llama_cpp.llama_decode(context, batch)) != 0:
                raise UsageError(f"llama.cpp could not decode {len(part)} tokens (code {code}): {last_log(3)}")
            if wanted:
                rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(wanted * vocab,))
                at = max(first - start, 0)
                out[at : at + wanted] = rows.reshape(wanted, vocab)
    finally:
        llama_cpp.llama_batch_free(batch)
    return out


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    """Continue ``ids`` by ``count`` most likely tokens (first one wins a tie); stops after an end-of-generation
    token.
    """
    import llama_cpp
    import numpy as np

    made: list[int] = []
    model.reset()
    model.eval(ids)
    for _ in range(count):
        pointer = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        token = int(np.argmax(np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),))))
        made.append(token)
        if llama_cpp.llama_vocab_is_eog(model._model.vocab, token) or model.n_tokens >= model.n_ctx():
            break
        model.eval([token])
    return made


@lru_cache(maxsize=1)
def library_build() -> dict[str, Any]:
    """Return what identifies the llama.cpp in use: versions, digest of its library, processor features it was built
    for.
    """
    import llama_cpp
    from llama_cpp import llama_cpp as binding

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = next((path for path in sorted(folder.glob("libllama.*")) if path.is_file()), None)
    # The kernels live in the CPU backend, so its bytes belong to the build as much as libllama's.
    digest = hashlib.sha256()
    for path in sorted({file.resolve() for file in folder.glob("lib*") if "mtmd" not in file.name}):
        digest.update(path.read_bytes())
    features = {}
    for part in llama_cpp.llama_print_system_info().decode().replace("CPU :", "").split("|"):
        name, _, value = part.partition("=")
        if value.strip():
            features[name.strip()] = value.strip()
    version = getattr(binding, "llama_version", None)
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": version().decode() if version else "",
        "library": library.resolve().name if library else "",
        "library_sha256": digest.hexdigest(),
        "features": features,
    }
