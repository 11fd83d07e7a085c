"""Turn a GGUF back into a Hugging Face folder with weights in full precision and a tokenizer that splits as llama.cpp
does.

transformers can load a GGUF too, but it cannot save what it loaded, and the tokenizer that it rebuilds forgets the
pre-tokenizer (SmolLM2 loses its digit splitting): models trained on such ids would see other ids on the phone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.families import of_any_width
from edgedistill.formats.gguf.pretokenizers import SPLITTERS, pre_tokenizer_json, splitter
from edgedistill.formats.gguf.read import GgufInfo, read_info, read_tensor

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_DTYPES = ("float32", "float16", "bfloat16")
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_tensor_name(name: str) -> str | None:
    """Translate a llama-family GGUF tensor name to transformers' (None for tables that transformers computes
    itself).
    """
    stem, _, kind = name.rpartition(".")
    if stem == "rope_freqs":
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{kind}"
    raise UsageError(
        f"tensor {name!r} is not one of the llama family", "only llama-family GGUF files can be dequantized"
    )


def unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q/k rows: pairs (2i, 2i+1) become halves (i, i + head/2), as transformers
    rotates.
    """
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, half, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_to_hf(
    gguf: Path | str, out: Path | str, *, dtype: str = "float32", progress: Progress | None = None
) -> dict[str, Any]:
    """Write the llama-family model in ``gguf`` as a Hugging Face folder ``out`` (made whole, then renamed into place).

    Weights are dequantized to ``dtype`` (float32, float16 or bfloat16): the numbers are the quantized ones, exactly, in
    float32. The folder has config.json, model.safetensors, tokenizer.json, tokenizer_config.json with the chat
    template, and generation_config.json. Returns a dict of what was found (``quantized_from`` names the type of the
    source, so that callers can warn). Raises UsageError for a damaged file, another family, or a tokenizer that we
    cannot rebuild.
    """
    info = read_info(gguf)
    out = Path(out)
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}", "use float32")
    if info.architecture != "llama":
        raise UsageError(
            f"{info.path}: a GGUF of the {info.architecture or 'unnamed'!s} family; only llama can be dequantized",
            "use the original Hugging Face folder of that model",
        )
    tokenizer = tokenizer_json(info)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tied = not any(tensor.name == "output.weight" for tensor in info.tensors)
        config = hf_config(info, dtype=dtype, tied=tied)
        _write_weights(info, partial / "model.safetensors", config, dtype, progress)
        _dump(partial / "config.json", config)
        _dump(partial / "tokenizer.json", tokenizer, indent=None)
        _dump(partial / "tokenizer_config.json", tokenizer_config(info))
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        _dump(partial / "generation_config.json", {"_from_model_config": True, **ids})
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {
        "source": info.path.name, "quantized_from": info.file_type if info.is_quantized else "", "dtype": dtype,
        "bpw": round(info.bpw, 4), "tensors": len(info.tensors), "parameters": info.parameters, "tied": tied,
        "pre": info.tokenizer_pre, "vocab": info.vocab, "name": info.name, "license": info.license,
    }  # fmt: skip


def hf_config(info: GgufInfo, *, dtype: str, tied: bool) -> dict[str, Any]:
    """Build transformers' config.json of a llama model from GGUF metadata."""
    heads = int(info.of_arch("attention.head_count", 0))
    if not heads or not info.n_layers or not info.hidden:
        raise UsageError(f"{info.path}: the metadata lacks llama.attention.head_count, block_count or embedding_length")
    head_dim = int(
        info.of_arch("attention.key_length", 0) or info.of_arch("rope.dimension_count", 0) or info.hidden // heads
    )
    if info.of_arch("rope.scaling.type", "none") not in ("none", ""):
        raise UsageError(f"{info.path}: RoPE scaling {info.of_arch('rope.scaling.type')!r} cannot be written back")
    if any(tensor.name == "rope_freqs.weight" for tensor in info.tensors):
        raise UsageError(f"{info.path}: llama3 RoPE factors (rope_freqs) cannot be written back to a config.json")
    biases = {
        tensor.name.split(".")[2] for tensor in info.tensors if tensor.name.endswith(".bias") and "." in tensor.name
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "attn_q" in biases,
        "attention_dropout": 0.0,
        "mlp_bias": "ffn_up" in biases,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": info.hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": int(info.of_arch("feed_forward_length", 0)),
        "max_position_embeddings": info.context_length,
        "num_attention_heads": heads,
        "num_hidden_layers": info.n_layers,
        "num_key_value_heads": int(info.of_arch("attention.head_count_kv", heads)),
        # The header stores float32: 1e-5 comes back as 9.999999747e-06.
        "rms_norm_eps": _short(info.of_arch("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_parameters": {"rope_type": "default", "rope_theta": _short(info.of_arch("rope.freq_base", 10000.0))},
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": info.vocab,
    }
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if (number := info.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[name] = int(number)
    return of_any_width(config)


def tokenizer_json(info: GgufInfo) -> dict[str, Any]:
    """Build tokenizer.json of a byte-level BPE tokenizer from GGUF metadata, with the splitter that llama.cpp uses."""
    if info.tokenizer_model != "gpt2" or splitter(info.tokenizer_pre) is None:
        raise UsageError(
            f"{info.path}: the tokenizer is {info.tokenizer_model or 'missing'!s} with pre-tokenizer "
            f"{info.tokenizer_pre or 'unnamed'!r}; it can be rebuilt for gpt2 with {', '.join(sorted(SPLITTERS))}",
            "use the original Hugging Face folder of that model",
        )
    known = splitter(info.tokenizer_pre)
    assert known is not None
    tokens = info.metadata["tokenizer.ggml.tokens"]
    kinds = info.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kinds[number] == _CONTROL}
        for number in range(len(tokens)) if kinds[number] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    bos = info.metadata.get("tokenizer.ggml.bos_token_id")
    steps: list[dict[str, Any]] = [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    ]
    if info.metadata.get("tokenizer.ggml.add_bos_token") and bos is not None:
        sequence: list[dict[str, Any]] = [{"SpecialToken": {"id": tokens[bos], "type_id": 0}}]
        steps.append({
            "type": "TemplateProcessing",
            "single": [*sequence, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*sequence, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        })  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": known.normalizer} if known.normalizer else None,
        "pre_tokenizer": pre_tokenizer_json(info.tokenizer_pre),
        "post_processor": steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": known.ignore_merges,
            "vocab": {token: number for number, token in enumerate(tokens)},
            # Pairs, not strings: the form that can hold a token with a space.
            "merges": [merge.split(" ", 1) for merge in info.metadata.get("tokenizer.ggml.merges", [])],
        },
    }


def tokenizer_config(info: GgufInfo) -> dict[str, Any]:
    """Build tokenizer_config.json, with the special tokens and the chat template."""
    tokens = info.metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": info.context_length,
        # The generic class: it takes tokenizer.json as it stands. A named class such as GPT2Tokenizer rebuilds the
        # pre-tokenizer from its own defaults in transformers 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = info.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    if "tokenizer.ggml.add_bos_token" in info.metadata:
        config["add_bos_token"] = bool(info.metadata["tokenizer.ggml.add_bos_token"])
    if info.chat_template:
        config["chat_template"] = info.chat_template
    return config


def _write_weights(info: GgufInfo, path: Path, config: dict[str, Any], dtype: str, progress: Progress | None) -> None:
    import torch
    from safetensors.torch import save_file

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    state: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(info.tensors):
        name = hf_tensor_name(tensor.name)
        if name is None:
            continue
        weights = read_tensor(info, tensor.name)
        if ".attn_q." in tensor.name:
            weights = unpermute(weights, heads)
        elif ".attn_k." in tensor.name:
            weights = unpermute(weights, kv_heads)
        state[name] = torch.from_numpy(weights.copy()).to(getattr(torch, dtype))
        if progress:
            progress(done + 1, len(info.tensors), tensor.name)
    save_file(state, path, metadata={"format": "pt"})


def _short(value: float) -> float:
    """Return the shortest decimal that is the same float32."""
    import numpy as np

    return float(str(np.float32(value)))


def _dump(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
