"""Attention over many short rows: batched matrix products instead of the flash kernel.

The CPU's flash kernel works row block by row block and spends its time on overhead when rows are some dozens of tokens
(measured on 2 Zen 4 cores, 16 rows of 36, 9 heads: 1.1 ms a call against 0.45 ms here, and more with a mask). Here the
grouped query heads of one key/value head stand in for rows, so keys and values are not repeated either. Probabilities
are kept for the way back, so this is for short rows only; ``fits`` says when.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

LIMIT = 1 << 24
"""Largest number of attention scores of one call (32 MB of bf16 a layer)."""


def fits(rows: int, heads: int, width: int, prefix: int, device: torch.device) -> bool:
    """Tell whether this way pays: for short rows."""
    return device.type in ("cpu", "cuda") and width + prefix <= 512 and rows * heads * width * (width + prefix) <= LIMIT


class Wide(NamedTuple):
    """What the way back needs of one call: queries, keys and values in the padded view, and the probabilities."""

    query: torch.Tensor  # [rows * kv heads, groups * widest, D]
    key: torch.Tensor  # [rows * kv heads, prefix + widest, D]
    value: torch.Tensor
    p: torch.Tensor  # [rows * kv heads, groups * widest, prefix + widest]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Any, scale: float, window: int | None
) -> tuple[torch.Tensor, list[Wide]]:
    """Let the shared prefix attend to itself, and each row to the prefix and itself, causally.

    query [tokens, heads, D], key and value [tokens, kv heads, D] of a flat batch -> ([tokens, heads, D], what
    ``attend_back`` needs).
    """
    if not layout.prefix:
        out, saved = _attend(query, key, value, layout, scale, window)
        return out, [saved]
    head = slice(0, layout.prefix)
    alone, first = _attend(query[head], key[head], value[head], layout.prefix_alone, scale, window)
    own, second = _attend(query, key, value, layout, scale, window)
    return torch.cat([alone, own], 0), [first, second]


def attend_back(
    grad: torch.Tensor, saved: list[Wide], layout: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value of ``attend``, for that of its result [tokens, heads, D]."""
    if not layout.prefix:
        return _back(grad, saved[0], layout, scale)
    of_prefix = _back(grad[: layout.prefix], saved[0], layout.prefix_alone, scale)
    own_query, key, value = _back(grad[layout.prefix :], saved[1], layout, scale)
    key[: layout.prefix] += of_prefix[1]
    value[: layout.prefix] += of_prefix[2]
    return torch.cat([of_prefix[0], own_query], 0), key, value


def _wide_query(own: torch.Tensor, layout: Any, kv_heads: int) -> torch.Tensor:
    """[own tokens, heads, D] -> [rows * kv heads, groups * widest, D]."""
    _, heads, dim = own.shape
    rows, widest = len(layout.counts), layout.widest
    wide = own.index_select(0, layout.pad_index).view(rows, widest, kv_heads, heads // kv_heads, dim)
    return wide.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, heads // kv_heads * widest, dim)


def _wide_keys(flat: torch.Tensor, layout: Any) -> torch.Tensor:
    """[prefix + own tokens, kv heads, D] -> [rows * kv heads, prefix + widest, D]."""
    _, kv_heads, dim = flat.shape
    rows, widest, prefix = len(layout.counts), layout.widest, layout.prefix
    own = flat[prefix:].index_select(0, layout.pad_index).view(rows, widest, kv_heads, dim)
    wide = flat.new_empty((rows, kv_heads, prefix + widest, dim))
    wide[:, :, :prefix] = flat[:prefix].transpose(0, 1)
    wide[:, :, prefix:] = own.transpose(1, 2)
    return wide.view(rows * kv_heads, prefix + widest, dim)


def _flat_queries(wide: torch.Tensor, layout: Any, heads: int) -> torch.Tensor:
    """[rows * kv heads, groups * widest, D] -> [own tokens, heads, D]."""
    rows, widest, dim = len(layout.counts), layout.widest, wide.shape[-1]
    kv_heads = wide.shape[0] // rows
    own = wide.view(rows, kv_heads, heads // kv_heads, widest, dim).permute(0, 3, 1, 2, 4)
    return own.reshape(rows * widest, heads, dim).index_select(0, layout.unpad_index)


def _flat_keys(wide: torch.Tensor, layout: Any, kv_heads: int) -> torch.Tensor:
    """Gradient of ``_wide_keys``: [rows * kv heads, prefix + widest, D] -> [tokens, kv heads, D]."""
    rows, widest, prefix, dim = len(layout.counts), layout.widest, layout.prefix, wide.shape[-1]
    wide = wide.view(rows, kv_heads, prefix + widest, dim)
    own = wide[:, :, prefix:].transpose(1, 2).reshape(rows * widest, kv_heads, dim)
    own = own.index_select(0, layout.unpad_index)
    if not prefix:
        return own
    shared = wide[:, :, :prefix].sum(0, dtype=torch.float32).to(wide.dtype)
    return torch.cat([shared.transpose(0, 1), own], 0)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Any, scale: float, window: int | None
) -> tuple[torch.Tensor, Wide]:
    """Attend for the rows' own tokens alone: -> [own tokens, heads, D]."""
    heads, kv_heads = query.shape[1], key.shape[1]
    wide_query = _wide_query(query[layout.prefix :], layout, kv_heads)
    wide_key, wide_value = _wide_keys(key, layout), _wide_keys(value, layout)
    scores = torch.bmm(wide_query, wide_key.transpose(1, 2)).float().mul_(scale)
    scores += layout.additive_mask(window, heads // kv_heads)
    p = torch.softmax(scores, -1).to(query.dtype)
    return _flat_queries(torch.bmm(p, wide_value), layout, heads), Wide(wide_query, wide_key, wide_value, p)


def _back(
    grad: torch.Tensor, saved: Wide, layout: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of the own queries [own tokens, heads, D], and of all keys and values."""
    heads, rows = grad.shape[1], len(layout.counts)
    kv_heads = saved.key.shape[0] // rows
    # The padded view repeats token 0 where there is no token: those rows get no gradient.
    wide = _wide_query(grad, layout, kv_heads)
    wide = (wide.view(rows, kv_heads, -1, layout.widest, wide.shape[-1]) * layout.real).view_as(wide)
    of_value = torch.bmm(saved.p.transpose(1, 2), wide)
    of_p = torch.bmm(wide, saved.value.transpose(1, 2)).float()
    of_scores = torch.ops.aten._softmax_backward_data(of_p, saved.p.float(), -1, torch.float32)
    of_scores = of_scores.mul_(scale).to(grad.dtype)
    of_query = _flat_queries(torch.bmm(of_scores, saved.key), layout, heads)
    of_key = torch.bmm(of_scores.transpose(1, 2), saved.query)
    return of_query, _flat_keys(of_key, layout, kv_heads), _flat_keys(of_value, layout, kv_heads)


class ShortAttention(torch.autograd.Function):
    """``attend`` for transformers' shapes: query [1, heads, tokens, D], key and value [1, kv heads, tokens, D] ->
    [tokens, heads, D].
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
        flat = [one[0].transpose(0, 1) for one in (query, key, value)]
        out, saved = attend(flat[0], flat[1], flat[2], layout, scale, window)
        ctx.save_for_backward(*(tensor for wide in saved for tensor in wide))
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        flat = ctx.saved_tensors
        saved = [Wide(*flat[at : at + 4]) for at in range(0, len(flat), 4)]
        of = attend_back(grads[0], saved, ctx.layout, ctx.scale)
        return (*(one.transpose(0, 1)[None] for one in of), None, None, None)
