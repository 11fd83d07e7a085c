"""Run one GGUF for timing, with llama-bench's settings, through llama-cpp-python's own shared library.

What llama-bench does and this does too (tools/llama-bench/llama-bench.cpp): a context of its own for each test, no
longer than the test; batch 2048, micro-batch 512, f16 KV cache and flash attention "auto" (or the types of -ctk and -ctv, with
-fa on where they need it); an explicit thread pool with default polling; KV cache cleared before each sample; random tokens
after BOS; one synchronize after a prompt, one after every generated token.
"""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path
from typing import Any

from edgedistill.devices.protocol import BATCH, MICRO_BATCH, Messages
from edgedistill.errors import StepFailed, UsageError
from edgedistill.kv_cache import F16, Pair, ggml_number, needs_flash_attention, told

_CPU_DEVICE = 0  # enum ggml_backend_dev_type
_FLASH_ATTENTION_AUTO, _FLASH_ATTENTION_ON = -1, 1  # enum llama_flash_attn_type


class GgufEngine:
    """One loaded GGUF, in the process that measures it."""

    def __init__(self, path: Path, threads: int, kv: Pair = F16) -> None:
        import llama_cpp

        from edgedistill.formats.gguf.model_io import last_log, silence
        from edgedistill.formats.gguf.read import read_info

        info = read_info(path)
        silence()
        self.threads, self.info, self.api, self.kv = threads, info, llama_cpp, kv
        self.random = random.Random(0)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UsageError(f"{path}: llama.cpp cannot load it: {last_log(2)}", "edgedistill doctor")
        self.vocab: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.add_bos = llama_cpp.llama_vocab_get_add_bos(self.vocab)
        self.pool = _thread_pool(llama_cpp.llama_cpp._lib, threads)
        self.context: Any = None
        self.room = 0
        self.test = ""
        self.one = llama_cpp.llama_batch_init(1, 0, 1)
        self.one.n_tokens = 1
        self.one.n_seq_id[0], self.one.seq_id[0][0], self.one.logits[0] = 1, 0, 1

    def describe(self) -> dict[str, str]:
        """Name the engine, its version, the ggml commit and the instruction sets that it was compiled for."""
        lib = self.api.llama_cpp._lib
        for name in ("ggml_version", "ggml_commit"):
            getattr(lib, name).restype = ctypes.c_char_p
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {self.api.__version__}",
            "commit": f"ggml {lib.ggml_version().decode()} {lib.ggml_commit().decode()}",
            "build": _instruction_sets(self.api.llama_print_system_info().decode()),
        }

    def bytes_per_token(self) -> tuple[int, bool]:
        """Return (weight bytes that one generated token reads, True): of an untied embedding only one row is read."""
        tensors = {tensor.name: tensor for tensor in self.info.tensors}
        total = sum(tensor.nbytes for tensor in tensors.values())
        if "output.weight" in tensors and "token_embd.weight" in tensors:
            embedding = tensors["token_embd.weight"]
            total -= embedding.nbytes - embedding.nbytes // max(1, embedding.shape[0])
        return total, True

    def prompt(self, n: int) -> float:
        """Return the seconds that processing ``n`` random tokens takes from an empty cache."""
        self._open("pp", n)
        tokens = self._random_tokens(n)
        start = time.perf_counter()
        self._feed(tokens)
        self.api.llama_synchronize(self.context)
        return time.perf_counter() - start

    def generate(self, n: int) -> float:
        """Return the seconds that ``n`` tokens take one after the other from an empty cache."""
        self._open("tg", n)
        tokens = self._random_tokens(n)
        batch, context = self.one, self.context
        decode, synchronize = self.api.llama_decode, self.api.llama_synchronize
        token_at, position_at = batch.token, batch.pos
        start = time.perf_counter()
        for position, token in enumerate(tokens):
            token_at[0], position_at[0] = token, position
            if decode(context, batch) != 0:
                raise StepFailed(f"llama.cpp failed at token {position} of {n}")
            synchronize(context)
        return time.perf_counter() - start

    def answer(self, messages: Messages, limit: int, context: int) -> tuple[float, float, int, int]:
        """Answer greedily; return (seconds to the first token, seconds to the last, prompt tokens, new tokens)."""
        import numpy as np

        self._open("chat", context)
        start = time.perf_counter()
        tokens = self._encode(messages)
        if len(tokens) + limit > context:
            raise UsageError(
                f"a prompt of {len(tokens)} tokens and an answer of {limit} do not fit a context of {context}",
                "raise the target's runtime.context or shorten the prompt",
            )
        self._feed(tokens)
        first = 0.0
        made = 0
        batch = self.one
        while made < limit:
            logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), shape=(self.n_vocab,))
            token = int(logits.argmax())
            made += 1
            first = first or time.perf_counter() - start
            if self.api.llama_vocab_is_eog(self.vocab, token):
                break
            if made < limit:
                batch.token[0], batch.pos[0] = token, len(tokens) + made - 1
                if self.api.llama_decode(self.context, batch) != 0:
                    raise StepFailed(f"llama.cpp failed at token {made} of an answer")
        return first, time.perf_counter() - start, len(tokens), made

    def fill(self, context: int, prompt: int) -> None:
        """Hold a KV cache of ``context`` tokens and process a prompt in it: the memory that a chat takes."""
        self._open("chat", context)
        self._feed(self._random_tokens(min(prompt, context)))
        self.api.llama_synchronize(self.context)

    def _open(self, test: str, room: int) -> None:
        """Have an empty context of ``room`` tokens for ``test``; one is kept at a time."""
        if self.context and (self.test, self.room) != (test, room):
            self.api.llama_free(self.context)
            self.context = None
        if not self.context:
            self.context = self.api.llama_init_from_model(self.model, self._params(room))
            if not self.context:
                raise StepFailed(
                    f"llama.cpp could not make a context of {room} tokens, KV cache in {told(self.kv)}",
                    "lower the target's context" if self.kv == F16 else 'set runtime.kv_cache = "f16"',
                )
            self.test, self.room = test, room
            attach = self.api.llama_cpp._lib.llama_attach_threadpool
            attach.argtypes, attach.restype = [ctypes.c_void_p] * 3, None
            attach(self.context, self.pool, None)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def _params(self, room: int) -> Any:
        """Return a context's settings: llama-bench's."""
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = room, BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k, params.type_v = map(ggml_number, self.kv)
        params.flash_attn_type = _FLASH_ATTENTION_ON if needs_flash_attention(self.kv) else _FLASH_ATTENTION_AUTO
        params.op_offload, params.swa_full = True, False
        return params

    def _feed(self, tokens: list[int]) -> None:
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            array = (self.api.llama_token * len(part))(*part)
            if (code := self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(part)))) != 0:
                raise StepFailed(f"llama.cpp could not process a prompt of {len(tokens)} tokens (code {code})")

    def _random_tokens(self, n: int) -> list[int]:
        tokens = [self.random.randrange(self.n_vocab) for _ in range(n)]
        if self.add_bos:
            tokens[0] = self.api.llama_vocab_bos(self.vocab)
        return tokens

    def _encode(self, messages: Messages) -> list[int]:
        from edgedistill.evals.runners.base import render_chat

        text = render_chat(
            self.info.chat_template or _no_template(self.info.path),
            messages,
            bos=self._text(self.api.llama_vocab_bos(self.vocab)),
            eos=self._text(self.api.llama_vocab_eos(self.vocab)),
        ).encode()
        room = len(text) + 8
        array = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self.vocab, text, len(text), array, room, False, True)
        return list(array[:count])

    def _text(self, token: int) -> str:
        return (self.api.llama_vocab_get_text(self.vocab, token) or b"").decode() if token >= 0 else ""


def _no_template(path: Path) -> str:
    raise UsageError(
        f"{path}: the GGUF has no chat template, so chat prompts cannot be timed", "measure without prompts"
    )


def _thread_pool(lib: ctypes.CDLL, threads: int) -> Any:
    """Make the thread pool that llama-bench makes, by calls that the binding does not wrap."""
    for name, arguments in (
        ("ggml_backend_dev_by_type", [ctypes.c_int]),
        ("ggml_backend_dev_backend_reg", [ctypes.c_void_p]),
        ("ggml_backend_reg_get_proc_address", [ctypes.c_void_p, ctypes.c_char_p]),
        ("ggml_threadpool_params_init", [ctypes.c_void_p, ctypes.c_int]),
    ):
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = ctypes.c_void_p
    device = lib.ggml_backend_dev_by_type(_CPU_DEVICE)
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_threadpool_new")
    if not address:
        raise StepFailed("this llama.cpp has no thread pools of its own", "pip install -U llama-cpp-python")
    params = ctypes.create_string_buffer(8192)  # struct ggml_threadpool_params: 512 flags and five numbers
    lib.ggml_threadpool_params_init(params, threads)
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(params))


def _instruction_sets(info: str) -> str:
    """Shorten llama.cpp's "CPU : SSE3 = 1 | AVX = 1 | ..." to the names of what is there."""
    _, _, listed = info.partition(":")
    pairs = (item.partition("=") for item in (listed or info).split("|"))
    return " ".join(name.strip() for name, _, value in pairs if value.strip() not in ("", "0"))
