"""Attention over many short rows on a CPU: batched matrix products instead of the flash kernel.

The CPU's flash kernel works row block by row block and spends its time on overhead when rows are some dozens of tokens
(measured on 2 Zen 4 cores, 16 rows of 36, 9 heads: 1.1 ms a call against 0.45 ms here, and more with a mask). Here the
grouped query heads of one key/value head stand in for rows, so keys and values are not repeated either. Probabilities
are kept for the way back, so this is for short rows only; ``fits`` says when.
"""

from __future__ import annotations

from typing import Any

import torch

LIMIT = 1 << 24
"""Largest number of attention scores of one call (32 MB of bf16 a layer)."""


def fits(rows: int, heads: int, width: int, prefix: int, device: torch.device) -> bool:
    """Tell whether this way pays: on a CPU, for short rows."""
    return device.type == "cpu" and width + prefix <= 512 and rows * heads * width * (width + prefix) <= LIMIT


def _wide_query(flat: torch.Tensor, layout: Any, kv_heads: int) -> torch.Tensor:
    """[heads, own tokens, D] -> [rows * kv heads, groups * widest, D]."""
    heads, _, dim = flat.shape
    rows, widest = len(layout.counts), layout.widest
    own = flat.transpose(0, 1).index_select(0, layout.pad_index)
    own = own.view(rows, widest, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return own.reshape(rows * kv_heads, heads // kv_heads * widest, dim)


def _wide_keys(flat: torch.Tensor, layout: Any) -> torch.Tensor:
    """[kv heads, prefix + own tokens, D] -> [rows * kv heads, prefix + widest, D]."""
    kv_heads, _, dim = flat.shape
    rows, widest, prefix = len(layout.counts), layout.widest, layout.prefix
    own = flat[:, prefix:].transpose(0, 1).index_select(0, layout.pad_index).view(rows, widest, kv_heads, dim)
    wide = flat.new_empty((rows, kv_heads, prefix + widest, dim))
    wide[:, :, :prefix] = flat[:, :prefix]
    wide[:, :, prefix:] = own.transpose(1, 2)
    return wide.view(rows * kv_heads, prefix + widest, dim)


def _flat_queries(wide: torch.Tensor, layout: Any, heads: int) -> torch.Tensor:
    """[rows * kv heads, groups * widest, D] -> [own tokens, heads, D]."""
    rows, widest, dim = len(layout.counts), layout.widest, wide.shape[-1]
    kv_heads = wide.shape[0] // rows
    own = wide.view(rows, kv_heads, heads // kv_heads, widest, dim).permute(0, 3, 1, 2, 4)
    return own.reshape(rows * widest, heads, dim).index_select(0, layout.unpad_index)


def _flat_keys(wide: torch.Tensor, layout: Any, kv_heads: int) -> torch.Tensor:
    """Gradient of ``_wide_keys``: [rows * kv heads, prefix + widest, D] -> [1, kv heads, tokens, D]."""
    rows, widest, prefix, dim = len(layout.counts), layout.widest, layout.prefix, wide.shape[-1]
    wide = wide.view(rows, kv_heads, prefix + widest, dim)
    own = wide[:, :, prefix:].transpose(1, 2).reshape(rows * widest, kv_heads, dim)
    own = own.index_select(0, layout.unpad_index)
    if prefix:
        shared = wide[:, :, :prefix].sum(0, dtype=torch.float32).to(wide.dtype)
        own = torch.cat([shared.transpose(0, 1), own], 0)
    return own.transpose(0, 1)[None]


class ShortAttention(torch.autograd.Function):
    """Attention of the rows' own tokens over the shared prefix and themselves; the prefix's own is done elsewhere.

    query [1, heads, tokens, D], key and value [1, kv heads, tokens, D] -> [own tokens, heads, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Any,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        wide_query = _wide_query(query[0, :, layout.prefix :], layout, kv_heads)
        wide_key, wide_value = _wide_keys(key[0], layout), _wide_keys(value[0], layout)
        scores = torch.bmm(wide_query, wide_key.transpose(1, 2)).float().mul_(scale)
        scores += layout.additive_mask(window, heads // kv_heads)
        p = torch.softmax(scores, -1).to(query.dtype)
        ctx.save_for_backward(wide_query, wide_key, wide_value, p)
        ctx.layout, ctx.scale, ctx.heads, ctx.kv_heads = layout, scale, heads, kv_heads
        return _flat_queries(torch.bmm(p, wide_value), layout, heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        wide_query, wide_key, wide_value, p = ctx.saved_tensors
        layout, heads, kv_heads = ctx.layout, ctx.heads, ctx.kv_heads
        # The padded view repeats token 0 where there is no token: those rows get no gradient.
        wide = _wide_query(grads[0].transpose(0, 1), layout, kv_heads)
        wide = (wide.view(len(layout.counts), kv_heads, -1, layout.widest, wide.shape[-1]) * layout.real).view_as(wide)
        of_value = torch.bmm(p.transpose(1, 2), wide)
        of_p = torch.bmm(wide, wide_value.transpose(1, 2)).float()
        p32 = p.float()
        of_scores = torch.ops.aten._softmax_backward_data(of_p, p32, -1, torch.float32).mul_(ctx.scale).to(p.dtype)
        of_query = _flat_queries(torch.bmm(of_scores, wide_key), layout, heads)
        of_key = torch.bmm(of_scores.transpose(1, 2), wide_query)
        if layout.prefix:
            of_query = torch.cat([of_query.new_zeros((layout.prefix, heads, of_query.shape[-1])), of_query], 0)
        return (
            of_query.transpose(0, 1)[None],
            _flat_keys(of_key, layout, kv_heads),
            _flat_keys(of_value, layout, kv_heads),
            None,
            None,
            None,
        )
