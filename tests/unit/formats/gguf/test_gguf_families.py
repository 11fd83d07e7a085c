"""Families beside Llama's: llama.cpp computes what transformers does, and sizes and moments are right for their tensors too."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.check import compare_logits
from edgedistill.formats.gguf.convert import PROBES, convert, places
from edgedistill.formats.gguf.moments import collect
from edgedistill.formats.gguf.quantize import dry_run, quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.types import estimate_file_size, plan_tensors, tensor_shapes
from edgedistill.model_facts import folder_facts
from tests.unit.formats.gguf.error_costs import ROWS, STARTS, cost_ratios

Tiny = Callable[..., Path]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3", "pre": "qwen2", "head_dim": 32},
    "qwen3-untied": {
        "family": "qwen3", "pre": "qwen2", "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 3,
        "tie_word_embeddings": False, "dtype": "bfloat16", "rope_parameters": LINEAR,
    },
    "phi3": {"family": "phi3", "tie_word_embeddings": False, "num_attention_heads": 8},
    "phi3-longrope": {
        "family": "phi3", "max_position_embeddings": 1024, "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2, 2.5],
            "long_factor": [2.0, 3, 4, 8], "partial_rotary_factor": 0.5,
        },
    },
    "phi3-long-text": {
        "family": "phi3", "max_position_embeddings": 256, "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [1.5, 2.0, 3, 4, 5, 6, 7, 8],
        },
    },
    "gpt2": {"family": "gpt2", "pre": "gpt-2"},
    "gpt2-untied": {"family": "gpt2", "tie_word_embeddings": False, "n_inner": 96, "num_attention_heads": 2},
    "gemma3": {
        "family": "gemma3_text", "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
    },
    "gemma3-odd": {
        "family": "gemma3_text", "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
        "num_key_value_heads": 1, "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
}  # fmt: skip
# Rows that fit k-quants, and enough layers for every rule of the mixes.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "head_dim": 64, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {**WIDE, "pre": "qwen2"},
    "phi3": {**WIDE, "tie_word_embeddings": False},
    "gpt2": {**WIDE, "n_inner": 512},
    "gemma3_text": {**WIDE, "query_pre_attn_scalar": 64},
}
SMALL: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3", "pre": "qwen2", "head_dim": 32},
    "phi3": {"family": "phi3", "tie_word_embeddings": False, "num_attention_heads": 8},
    "gpt2": {"family": "gpt2", "tie_word_embeddings": False},
    "gemma3_text": {"family": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16},
}
# Settings under which llama.cpp would compute something else, by family.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
    ("qwen3", {"head_dim": 32}, r"attn_output.weight has shape \(64, 64\)"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE scaling 'linear'.* known: longrope"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"activation_function": "relu"}, "hidden_act 'relu'"),
    ("gpt2", {"n_inner": 100}, r"ffn_down.weight has shape \(64, 256\), where config.json makes it \(64, 100\)"),
    ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}, "no regular order"),
]


def prompts(kind: str = "") -> list[str]:
    """Return texts to compare logits on; both engines rotate by the long factors only where all of them are long."""
    return ["".join(PROBES)[:150], *["Set an alarm for 7:45 tomorrow"] * (kind != "phi3-long-text")]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_does(kind: str, tiny: Tiny, tiny_gguf: Tiny) -> None:
    options = KINDS[kind]
    texts = [unicodedata.normalize("NFC", text) for text in PROBES]
    report = compare_logits(tiny(**options), tiny_gguf(to="f32", **options), prompts(kind), texts=texts, threads=1)
    assert report.top1 > 0.97 and report.kld < 1e-4 and report.mean_diff < 0.003 * report.spread
    assert report.texts.tokens > 500 and report.greedy_tokens > 0
    half = compare_logits(tiny(**options), tiny_gguf(**options), prompts(kind), greedy=0, threads=1)
    assert half.top1 > 0.95 and half.kld < 1e-3  # float16 rounds these weights; compare_logits has its own limits


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_file(kind: str, tiny: Tiny, tiny_gguf: Tiny) -> None:
    info = read_info(tiny_gguf(**KINDS[kind]))
    config = json.loads((tiny(**KINDS[kind]) / "config.json").read_text())
    tables = {tensor.name: tensor for tensor in info.tensors if tensor.name.startswith("rope_")}
    assert {tensor.name: tensor.shape for tensor in info.tensors if tensor.name not in tables} == tensor_shapes(config)
    assert {tensor.name: tensor.type for tensor in info.tensors if tensor.name not in tables} == {
        plan.name: plan.got for plan in plan_tensors(tensor_shapes(config), "F16")
    }
    data = sum(-(-tensor.nbytes // 32) * 32 for tensor in info.tensors)
    assert 0 < estimate_file_size(config, None, "F16") - data < 30_000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_llama_cpps_own(family: str, tiny_gguf: Tiny) -> None:
    path = tiny_gguf(family, **FAMILIES[family])
    shapes = {tensor.name: tensor.shape for tensor in read_info(path).tensors}
    info = read_info(path)
    gqa = info.of_arch("attention.head_count") // info.of_arch("attention.head_count_kv")
    for name in ("Q4_K_M", "Q3_K_M", "Q2_K"):
        want = {plan.name: plan.got for plan in plan_tensors(shapes, name, gqa=gqa)}
        assert {tensor.name: tensor.got for tensor in dry_run(path, name).tensors} == want, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_file_has_the_size_that_was_told(family: str, tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path) -> None:
    config = json.loads((tiny(family, **FAMILIES[family]) / "config.json").read_text())
    report = quantize(tiny_gguf(family, **FAMILIES[family]), tmp_path / "q.gguf", "Q4_K_M", threads=1)
    assert report.size == pytest.approx(estimate_file_size(config, None, "Q4_K_M"), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_what_errors_cost(family: str, tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny(**SMALL[family]), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value *= 0.1  # larger than the inputs, as they were drawn, they make all tokens alike
    model.save_pretrained(folder)

    where, found = places(folder), dict(collect(folder, ROWS, STARTS, threads=1))
    matrices = sorted(name for name, value in model.named_parameters() if value.ndim == 2 and "wpe" not in name)
    assert set(found) == {where[name][0] for name in matrices}
    turned = (lambda name: ".h." in name) if family == "gpt2" else (lambda name: False)  # Conv1D
    ratios = cost_ratios(model, where, found, matrices, turned=turned, seed=5)
    assert all(0.6 < ratio < 1.6 for ratio in ratios.values()), ratios
    assert 0.85 < np.mean(list(ratios.values())) < 1.15, ratios


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    options = {"qwen3": {"pre": "qwen2"}, "gemma3_text": {"query_pre_attn_scalar": 16}}.get(family, {})
    folder = shutil.copytree(tiny(family, head_dim=16, **options), tmp_path / "broken")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=words):
        convert(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("family", SMALL)
def test_the_plan_knows_the_size_from_the_facts(family: str, tiny: Tiny) -> None:
    folder = tiny(**SMALL[family])
    config = json.loads((folder / "config.json").read_text())
    assert tensor_shapes(folder_facts(folder).config()) == tensor_shapes(config)
