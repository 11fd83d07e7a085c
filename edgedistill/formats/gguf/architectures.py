"""Say for each family that is converted how its config and tensors become llama.cpp's, and refuse what llama.cpp has not.

A family is an architecture of transformers. Whatever of its config.json changes what is computed is either written to the
GGUF here or refused by name: llama.cpp has one graph per architecture (src/models), and a setting that it does not know
would be lost without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of one approximation, the one that llama.cpp computes


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture of transformers becomes one of llama.cpp's.

    ``permute``: q/k rows are reordered (RoPE in pairs). ``transposed``: the layers' matrices lie columns first (Conv1D).
    ``gain``: what the norms' weights are added to. ``prefix``: what names of tensors may lack. ``whole``: tensors of the
    layers must be those of the config, none more. ``acts`` and ``ropes`` are the activations and kinds of RoPE known.
    """

    arch: str
    permute: bool = False
    transposed: bool = False
    gain: float = 0.0
    prefix: str = ""
    whole: bool = True
    acts: tuple[str, ...] = ("silu",)
    ropes: tuple[str, ...] = ("linear",)

    def is_turned(self, target: str) -> bool:
        """Tell whether the rows of a GGUF tensor are in another order than transformers'."""
        return self.permute and (".attn_q." in target or ".attn_k." in target)

    def shape(self, target: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, rows first, of a tensor that has ``shape`` in the checkpoint."""
        return shape[::-1] if self.transposed and target.startswith("blk.") else shape


_LLAMA = Family(arch="llama", permute=True, whole=False, ropes=("linear", "llama3"))
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family(arch="qwen2", whole=False, ropes=("linear", "llama3")),
    "Qwen3ForCausalLM": Family(arch="qwen3"),
    "Phi3ForCausalLM": Family(arch="phi3", ropes=("longrope",)),
    "GPT2LMHeadModel": Family(arch="gpt2", transposed=True, prefix="transformer.", acts=_GELU, ropes=()),
    "Gemma3ForCausalLM": Family(arch="gemma3", gain=1.0, acts=_GELU),
}


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """Return how to convert this config's architecture. Raises UsageError naming the supported ones."""
    name = (config.get("architectures") or [config.get("model_type", "unnamed")])[0]
    if name not in FAMILIES:
        raise UsageError(
            f"{where}: {name} cannot be converted to GGUF; supported: {', '.join(FAMILIES)}",
            "convert it with llama.cpp's convert_hf_to_gguf.py, then pass the f16 .gguf file",
        )
    return FAMILIES[name]


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's parameters in transformers 5's form (rope_type, rope_theta, …) from either form of config.json; of
    Gemma 3 those of the layers that see everything.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    gemma = config.get("model_type") == "gemma3_text"
    rope.setdefault("rope_theta", config.get("rope_theta", 1e6 if gemma else 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def head_size(config: dict[str, Any]) -> int:
    """Return the dimensions of one attention head."""
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def write_config(writer: Any, config: dict[str, Any], family: Family, model_dir: Path, notes: list[str]) -> None:
    """Add what config.json says to ``writer``, and to ``notes`` what a user should know. Raises UsageError for what
    llama.cpp computes otherwise.
    """
    where = f"{model_dir}/config.json"
    heads, head_dim = int(config["num_attention_heads"]), head_size(config)
    act = next(
        (config[key] for key in ("hidden_act", "hidden_activation", "activation_function") if config.get(key)), None
    )
    if act is not None and act not in family.acts:
        raise UsageError(f"{where}: hidden_act {act!r}; llama.cpp computes {family.acts[-1]} in this family")
    context = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    if family.arch == "gemma3":
        pass  # llama.cpp has its windows
    elif window and config.get("use_sliding_window", True) and int(window) < context:
        notes.append(f"context cut from {context} to the sliding window of {window}, where both engines agree")
        context = int(window)
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", *family.ropes):
        raise UsageError(
            f"{where}: RoPE scaling {rope['rope_type']!r} cannot be converted; known: {', '.join(family.ropes) or 'none'}"
        )
    rotated = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    if rotated != 1.0 and family.arch != "phi3":
        raise UsageError(f"{where}: partial_rotary_factor is not 1; llama.cpp rotates all of a head here")
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    if family.arch == "gpt2":
        writer.add_layer_norm_eps(float(config["layer_norm_epsilon"]))
        return
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rotated))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    _write_scaling(writer, config, notes)
    if family.arch == "gemma3":
        _write_windows(writer, config, where)


def check_settings(config: dict[str, Any], family: Family, where: str) -> None:
    """Raise UsageError for settings that llama.cpp's graph of this architecture does not have."""
    wanted: dict[str, Any] = {}
    if family.arch in ("qwen3", "gemma3"):
        wanted = {"attention_bias": False}
    if family.arch == "gpt2":
        wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    if family.arch == "gemma3":
        # llama.cpp knows Gemma 3 27B by its 62 layers, and scales attention otherwise there.
        large = int(config["num_hidden_layers"]) == 62
        scale = int(config["hidden_size"]) // int(config["num_attention_heads"]) if large else head_size(config)
        wanted |= {
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False,
            "query_pre_attn_scalar": scale,
        }  # fmt: skip
    for key, value in wanted.items():
        found = config.get(key, value)
        if (found or None) != (value or None):
            raise UsageError(
                f"{where}: {key} is {found!r}; llama.cpp's {family.arch} has only {value!r}", "choose another model"
            )


def _write_scaling(writer: Any, config: dict[str, Any], notes: list[str]) -> None:
    import gguf

    rope = rope_of(config)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "longrope":
        old = _original_context(config)
        factor = float(rope.get("factor") or int(config["max_position_embeddings"]) / old)
        attention = rope.get("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
        writer.add_rope_scaling_orig_ctx_len(old)
        writer.add_rope_scaling_attn_factors(float(attention))
        notes.append(
            f"longrope: llama.cpp rotates by the long factors wherever its context is set to more than {old} tokens, "
            "transformers where the text has more"
        )


def _original_context(config: dict[str, Any]) -> int:
    """Return the context before longrope: what stands beside the factors is overruled by what stands above them."""
    found = config.get("original_max_position_embeddings") or rope_of(config).get("original_max_position_embeddings")
    return int(found or config["max_position_embeddings"])


def _write_windows(writer: Any, config: dict[str, Any], where: str) -> None:
    """Add which of Gemma 3's layers see a window only, and their RoPE. Raises UsageError where llama.cpp has no such order."""
    depth, window = int(config["num_hidden_layers"]), int(config.get("sliding_window") or 4096)
    period = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    kinds = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(depth)
    ]
    first = next((layer for layer, kind in enumerate(kinds) if kind == "full_attention"), depth)
    period = first + 1  # the layers before the first that sees everything, and it
    if [kind == "full_attention" for kind in kinds] != [(layer + 1) % period == 0 for layer in range(depth)]:
        raise UsageError(
            f"{where}: layer_types has no regular order of sliding and full attention, as llama.cpp's gemma3 wants",
            "keep layers so that each full_attention follows as many sliding_attention",
        )
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        raise UsageError(
            f"{where}: the RoPE of sliding_attention is scaled; llama.cpp scales only that of full_attention"
        )
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern(period)
    writer.add_rope_freq_base_swa(float(local.get("rope_theta", config.get("rope_local_base_freq", 10000.0))))


def rope_tables(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors that llama.cpp divides RoPE's frequencies by: {name: float32 (head_dim / 2,)}, none for most."""
    import numpy as np

    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config)}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")
        }
    return {}


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """Return llama3's divisors of the RoPE frequencies, shape (head_dim / 2,).

    The formula is transformers' ``_compute_llama3_parameters``; llama.cpp divides each frequency by its factor.
    """
    import numpy as np

    rope = rope_of(config)
    dim = head_size(config)
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    waves = 2 * math.pi / frequencies
    smooth = (old / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < old / high, 1.0, np.where(waves > old / low, factor, between))
    return factors.astype(np.float32)
