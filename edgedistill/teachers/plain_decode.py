"""Decoding with transformers' own cache, for models that flat batches do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edgedistill.teachers.decode import Decoded, draw


def plain_decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    vocab_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    uniforms: np.ndarray | None = None,
) -> list[Decoded]:
    """Do what ``decode`` does, with left padding and the model's own key/value cache."""
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    results = [Decoded([], False, 0.0) for _ in prompts]
    stops, cache = set(stop_ids), None
    open_rows = set(range(len(prompts)))
    for step in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        logp = torch.log_softmax(out.logits[:, -1, :vocab_size].float(), -1)
        if temperature > 0:
            assert uniforms is not None
            chosen = draw(logp, temperature, top_p, torch.from_numpy(uniforms[:, step]).to(device))
        else:
            chosen = logp.max(-1).indices
        gained = logp.gather(1, chosen[:, None])[:, 0].tolist()
        for row in sorted(open_rows):
            token = int(chosen[row])
            results[row].logprob += gained[row]
            if token in stops:
                results[row].stopped = True
                open_rows.discard(row)
            else:
                results[row].tokens.append(token)
        if not open_rows:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones((len(prompts), 1))], 1)
    return results
