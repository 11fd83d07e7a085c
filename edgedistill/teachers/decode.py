"""Batched decoding with a key/value cache of our own, over flat batches.

The prompts of a batch run flat, without padding and with their common prefix once (see training/packing.py); every
later step is one token a row. Rows that have ended leave the batch as soon as a quarter of it has: no time goes into
padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgedistill.training.draws import invert
from edgedistill.training.packing import Layout, body, common_prefix, lay_out, packed_attention


@dataclass
class Decoded:
    """Tokens of one row (without the one that ended it), whether it ended by itself, and its log-probability."""

    tokens: list[int]
    stopped: bool
    logprob: float


class _Prefill:
    """Layout of the prompts' forward: attends like any flat batch and keeps keys and values in the cache."""

    def __init__(self, cache: KeyValues, layout: Layout) -> None:
        self.cache, self.layout = cache, layout

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        self.cache.fill(module.layer_idx, key, value, self.layout)  # pyright: ignore[reportArgumentType]
        out, _ = packed_attention(
            module, query, key, value, None, scaling=scaling, sliding_window=window, layout=self.layout
        )
        return out


class KeyValues:
    """Keys and values [rows, kv heads, room, D] of every layer, rows left-aligned; the layout of one-token steps."""

    def __init__(self, lengths: Sequence[int], room: int, device: torch.device) -> None:
        self.device = device
        self.lengths = torch.tensor(lengths, device=device)
        self.room = room
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._rows = torch.arange(len(lengths), device=device)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._used = 0

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor, layout: Layout) -> None:
        """Store what the prompts' forward computed: flat [1, kv heads, tokens, D]."""
        rows, widest, prefix = len(layout.counts), layout.widest, layout.prefix
        for store, flat in ((self.keys, key), (self.values, value)):
            cache = flat.new_zeros((rows, flat.shape[1], self.room, flat.shape[3]))
            cache[:, :, :prefix] = flat[:, :, :prefix]
            own = flat[0, :, prefix:].index_select(1, layout.pad_index)
            cache[:, :, prefix : prefix + widest] = own.view(flat.shape[1], rows, widest, -1).transpose(0, 1)
            store[layer] = cache

    def advance(self) -> torch.Tensor:
        """Open the next position of every row and return the positions: [1, rows]."""
        self._masks.clear()
        self._used = int(self.lengths.max()) + 1
        positions = self.lengths.clone()
        self.lengths += 1
        return positions[None]

    def _mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            at = torch.arange(self._used, device=self.device)[None]
            mask = at < self.lengths[:, None]
            if window is not None:
                mask &= at >= self.lengths[:, None] - window
            zeros = torch.zeros(mask.shape, device=self.device)
            self._masks[window] = zeros.masked_fill_(~mask, -torch.inf)[:, None, None]
        return self._masks[window]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend with one new token a row: query [1, heads, rows, D] -> [1, rows, heads, D]."""
        layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        keys, values = self.keys[layer], self.values[layer]
        at = self.lengths - 1
        keys[self._rows, :, at] = key[0].transpose(0, 1)
        values[self._rows, :, at] = value[0].transpose(0, 1)
        rows, kv_heads, dim = keys.shape[0], keys.shape[1], keys.shape[3]
        heads = query.shape[1]
        # The query heads of one kv head stand in for positions: no copy of the cache for grouped heads.
        grouped = query[0].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, dim)
        # One query a row: two batched products are faster on a CPU than the flash kernel.
        scores = torch.matmul(grouped, keys[:, :, : self._used].transpose(2, 3)).float()
        scores.mul_(scaling if scaling is not None else dim**-0.5).add_(self._mask(window))
        weights = torch.softmax(scores, -1).to(values.dtype)
        return torch.matmul(weights, values[:, :, : self._used]).view(1, rows, heads, dim)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.lengths = self.lengths[rows]
        self._rows = torch.arange(len(rows), device=self.device)
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, rows)


def decode(
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
    """Write up to ``max_new_tokens`` after each prompt, in packed mode; returns the rows in the order of the prompts.

    Greedy when ``temperature`` is 0. Otherwise token t of row r is decided by ``uniforms[r, t]`` in [0, 1) alone, so a
    draw does not depend on the batch that the row is in.
    """
    decoder, head = body(model), model.get_output_embeddings()
    shortest = min(len(prompt) for prompt in prompts)
    prefix = min(common_prefix(prompts), shortest - 1) if len(prompts) > 1 else 0
    ids, positions, layout = lay_out(prompts, prefix)
    device = next(decoder.parameters()).device
    layout.to(device)
    longest = max(len(prompt) for prompt in prompts)
    cache = KeyValues([len(prompt) for prompt in prompts], longest + max_new_tokens, device)
    results = [Decoded([], False, 0.0) for _ in prompts]
    alive = list(range(len(prompts)))
    done = np.zeros(len(prompts), dtype=bool)
    stops = set(stop_ids)
    states = decoder(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
        layout=_Prefill(cache, layout),
    ).last_hidden_state
    ends = torch.tensor(layout.counts, device=device).cumsum(0) + layout.prefix - 1
    hidden = states[0].index_select(0, ends)
    for step in range(max_new_tokens):
        logits = head(hidden)[:, :vocab_size].float()
        logp = torch.log_softmax(logits, -1)
        if temperature > 0:
            assert uniforms is not None
            chosen = draw(logp, temperature, top_p, torch.from_numpy(uniforms[alive, step]).to(device))
        else:
            chosen = logp.max(-1).indices
        gained = logp.gather(1, chosen[:, None])[:, 0].tolist()
        tokens = chosen.tolist()
        for row, token, value in zip(alive, tokens, gained, strict=True):
            if done[row]:
                continue
            results[row].logprob += value
            if token in stops:
                results[row].stopped = True
                done[row] = True
            else:
                results[row].tokens.append(token)
        open_rows = [at for at, row in enumerate(alive) if not done[row]]
        if not open_rows or step + 1 == max_new_tokens:
            break
        if len(open_rows) <= 0.75 * len(alive):
            keep = torch.tensor(open_rows, device=device)
            cache.keep(keep)
            chosen = chosen[keep]
            alive = [alive[at] for at in open_rows]
        hidden = decoder(
            input_ids=chosen[None], position_ids=cache.advance(), use_cache=False, layout=cache
        ).last_hidden_state[0]
    return results


def draw(logp: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one id a row by inverting the cumulative distribution: [rows]."""
    p = torch.softmax(logp / temperature, -1)
    if top_p < 1.0:
        ordered, order = p.sort(-1, descending=True)
        # Keep the smallest set that reaches top_p: every id before which less than top_p has been collected.
        kept = ordered * (ordered.cumsum(-1) - ordered < top_p)
        p = torch.zeros_like(p).scatter_(1, order, kept)
    return invert(p, uniform.float()[:, None])[:, 0]
