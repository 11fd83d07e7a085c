"""The KV cache of llama.cpp: the types that keys and values may have in it, and the bytes that it takes.

Names are those of llama.cpp's ``-ctk`` and ``-ctv``. A quantized type packs 32 values of a head in a block; quantized values need
flash attention, quantized keys alone do not (src/llama-context.cpp).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, get_args

from edgedistill.fingerprint import Key

if TYPE_CHECKING:
    from edgedistill.model_facts import ModelFacts
    from edgedistill.step import Context

KvType = Literal["f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
KV_TYPES: tuple[str, ...] = get_args(KvType)
Pair = tuple[str, str]
"""The types of keys and of values."""

F16: Pair = ("f16", "f16")
CHOICES: tuple[Pair, ...] = (F16, ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
"""What "auto" tries, in this order: each keeps less of keys or values than the one before it. Keys lose more by few bits than
values do, so they keep 8 where half of that is too much.
"""
BLOCK = 32
OLLAMA = ("f16", "q8_0", "q4_0")  # what OLLAMA_KV_CACHE_TYPE takes, for keys and values alike


def told(kv: Pair) -> str:
    """Name the types as people read them: ``q8_0``, or ``q8_0 / q4_0`` (keys / values) where they differ."""
    return kv[0] if kv[0] == kv[1] else f"{kv[0]} / {kv[1]}"


def ggml_number(name: str) -> int:
    """Return ggml's number of a type."""
    from edgedistill.formats.gguf.types import ggml_type

    return ggml_type(name.upper()).number


def needs_flash_attention(kv: Pair) -> bool:
    """Tell whether llama.cpp makes such a cache only with flash attention."""
    return kv[1] != "f16"


def value_bytes(kv: Pair) -> float:
    """Return the bytes of one value in the keys and one in the values."""
    from edgedistill.formats.gguf.types import ggml_type

    return sum(ggml_type(name.upper()).bpw / 8 for name in kv)


def cache_bytes(facts: ModelFacts, context: int, kv: Pair) -> int:
    """Return the bytes that the cache of ``context`` tokens takes, with every layer attending to all of it."""
    return round(facts.layers * facts.kv_heads * facts.head * context * value_bytes(kv))


def arguments(kv: Pair) -> str:
    """Return what llama-cli, llama-server and llama-bench are told; nothing for f16. It begins with a blank."""
    if kv == F16:
        return ""
    return f" -ctk {kv[0]} -ctv {kv[1]}" + (" -fa on" if needs_flash_attention(kv) else "")


def types_of(ctx: Context, kv: Pair | Key) -> Pair:
    """Return the types that a step was given, or those that the entry of ``kv-cache`` chose."""
    if not isinstance(kv, Key):
        return kv
    found = json.loads(ctx.path(kv, "kv_cache.json").read_text())
    return found["k"], found["v"]
