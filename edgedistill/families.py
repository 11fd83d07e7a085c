"""What a checkpoint's family allows: whose vocabulary can be trimmed, and what transformers calls a decoder of the Llama kind
whose width is no multiple of its heads. Imports neither torch nor numpy: the command line asks it before it plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.errors import UsageError

SHARED = frozenset({
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "use_cache", "vocab_size",
})  # fmt: skip
"""What a Llama's config.json has in common with a Mistral's."""


def of_any_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that transformers loads, whatever its hidden size.

    transformers refuses a Llama whose hidden size is no multiple of its heads, though nothing in it needs that once the heads
    have a size of their own. A Mistral without a sliding window is the same function and takes any width; llama.cpp calls
    both llama. Raises UsageError for a Llama with biases, which a Mistral has not.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if config["model_type"] != "llama" or hidden % heads == 0:
        return dict(config)
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UsageError(
            f"a Llama with biases whose hidden size of {hidden} is no multiple of its {heads} heads: transformers has none",
            f"take a multiple of {heads}",
        )
    shared = {name: value for name, value in config.items() if name in SHARED}
    return shared | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


BYTES = 256
"""Tokens without which a byte-level BPE cannot spell every text."""


def check_trimmable(folder: Path) -> int:
    """Return the tokens that a trimmed vocabulary keeps whatever is taught: single bytes and added tokens. Raises UsageError where
    the tokenizer of a checkpoint is no byte-level BPE: only that can spell any text.
    """
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UsageError(
            f"{path}: a {model.get('type', 'missing')} tokenizer; only a byte-level BPE vocabulary can be trimmed",
            "leave student.vocabulary out",
        )
    added = {token["content"] for token in data.get("added_tokens", [])}
    return len(added | {token for token in model["vocab"] if len(token) == 1})


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the names that Llama's has, and with what its family takes for granted where it is silent.

    GPT-2 has names of its own (n_embd, n_layer, …), and its FFN is four times as wide where none is given.
    """
    found = dict(config)
    if found.get("model_type") == "gpt2":
        names = {
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }  # fmt: skip
        found |= {name: found[theirs] for name, theirs in names.items() if found.get(theirs) is not None}
        if "n_embd" in found:
            found["intermediate_size"] = found.get("n_inner") or 4 * int(found["n_embd"])
            found |= {"num_key_value_heads": found.get("num_attention_heads"), "head_dim": None}
    if found.get("model_type") in ("gpt2", "gemma3_text"):
        found.setdefault("tie_word_embeddings", True)
    return found
