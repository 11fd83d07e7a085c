"""Tiny random models and rows: everything here takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgedistill.training.data import Example, counter_rng
from edgedistill.training.draws import sparse_from_logits, uniforms
from edgedistill.training.targets import Kind, SparseTargets

VOCAB = 300


def make_llama(layers: int = 3, *, tied: bool = True, seed: int = 0, vocab: int = VOCAB) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # off the tiny default scale: distributions that differ from uniform
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.eval()


def make_examples(count: int = 24, *, prefix: int = 5, seed: int = 0, vocab: int = VOCAB) -> list[Example]:
    rng = counter_rng("examples", seed)
    shared = rng.integers(0, vocab, prefix).tolist()
    return [
        Example(
            id=f"row-{at}",
            prompt_ids=(*shared, *rng.integers(0, vocab, rng.integers(1, 12)).tolist()),
            completion_ids=tuple(rng.integers(0, vocab, rng.integers(1, 9)).tolist()),
        )
        for at in range(count)
    ]


def score(
    model: Any, examples: Sequence[Example], *, kind: Kind = "sampled", n: int = 12, temperature: float = 1.0
) -> list[SparseTargets]:
    """Score with the model's plain forward, one row at a time: the reference for the teacher's batched way."""
    out = []
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
            logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
            uniform = torch.from_numpy(uniforms(0, example.id, len(example.completion_ids), n))
            out.append(sparse_from_logits(logits, kind=kind, n=n, temperature=temperature, uniform=uniform))
    return out


def zipf_logits(positions: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Logits whose probabilities fall like 1 / rank, in another order at each position: [positions, vocab]."""
    rng = counter_rng("zipf", seed)
    base = -np.log(np.arange(1, vocab + 1))
    return torch.from_numpy(np.stack([base[rng.permutation(vocab)] for _ in range(positions)]).astype(np.float32))
