"""A Llama-shaped decoder layer as two autograd functions, for training in less time and memory, on a CPU above all.

Operation by operation, a layer is many small ones, each of which autograd keeps the inputs of, in float32 inside the norms.
Here the attention half and the MLP half are one function each, with the way back written out. Kept are the two residual
states in the model's own precision, the attention's padded view, gate and up, and the adapters' low-rank products; norms,
activations and their products are computed again. Projections that share an input share the product with their adapters'
A, and all gradients of that input are accumulated by the matrix products themselves.

``fused`` switches the layers of a model that are built this way (Llama, Mistral, Qwen2, with plain LoRA or without) while
inside; other layers stay as they are. The functions do what transformers' modules do, up to rounding, which ``selfcheck``
measures for the model at hand before it trains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgedistill.training.short_attention import Wide, attend, attend_back, fits

FUSABLE = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
"""Layers of exactly these parts: RMS norm, q/k/v/o, RMS norm, gate/up/down with SiLU, two residual sums."""
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FIELDS = 4  # tensors of a projection: weight, bias, A, B

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer, with its adapter where it has one: y = x W^T + bias + scaling (x A^T) B^T."""

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor | None
    a: torch.Tensor | None = None  # [rank, in]
    b: torch.Tensor | None = None  # [out, rank]
    scaling: float = 1.0

    @property
    def tensors(self) -> Tensors:
        """Return what autograd has to see."""
        return self.weight, self.bias, self.a, self.b


def projection(module: Any) -> Projection | None:
    """Read a linear layer or a plain LoRA layer around one; None for anything else (dropout, several adapters, DoRA)."""
    if type(module) is nn.Linear:
        return Projection(module.weight, module.bias)
    base = getattr(module, "base_layer", None)
    names = list(getattr(module, "active_adapters", ()))
    if type(base) is not nn.Linear or len(names) != 1 or not hasattr(module, "lora_A"):
        return None
    if module.disable_adapters:
        return Projection(base.weight, base.bias)
    name = names[0]
    plain = not module.merged and not module.lora_variant and not module.lora_bias.get(name)
    if not plain or not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Projection(base.weight, base.bias, a, b, module.scaling[name])


def read(tensors: Sequence[torch.Tensor | None], scalings: Sequence[float]) -> list[Projection]:
    """Put projections together again from the flat arguments of an autograd function."""
    found = []
    for at, scaling in enumerate(scalings):
        weight, bias, a, b = tensors[at * FIELDS : (at + 1) * FIELDS]
        assert weight is not None
        found.append(Projection(weight, bias, a, b, scaling))
    return found


def project(x: torch.Tensor, group: Sequence[Projection]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Apply projections that share their input x [tokens, in]: (results [tokens, out] each, x A^T [tokens, ranks])."""
    results = [nn.functional.linear(x, one.weight, one.bias) for one in group]
    stacked = _stacked(group)
    if stacked is None:
        return results, None
    low = x @ stacked.T
    for result, one, part in zip(results, group, _ranks(group), strict=True):
        if one.b is not None:
            result.addmm_(low[:, part], one.b.T, alpha=one.scaling)
    return results, low


def project_back(
    x: torch.Tensor,
    group: Sequence[Projection],
    low: torch.Tensor | None,
    grads: Sequence[torch.Tensor],
    needs: Sequence[bool],
    *,
    of_input: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradient of x, and those of every projection's tensors, for the gradients of the results."""
    found: list[torch.Tensor | None] = [None] * (FIELDS * len(group))
    of_x: torch.Tensor | None = None
    for at, (one, grad) in enumerate(zip(group, grads, strict=True)):
        if of_input:
            of_x = grad @ one.weight if of_x is None else of_x.addmm_(grad, one.weight)
        if needs[at * FIELDS]:
            found[at * FIELDS] = grad.T @ x
        if needs[at * FIELDS + 1]:
            found[at * FIELDS + 1] = grad.sum(0)
    stacked = _stacked(group)
    if stacked is None or low is None:
        return of_x, found
    of_low = torch.empty_like(low)
    for at, (one, grad, part) in enumerate(zip(group, grads, _ranks(group), strict=True)):
        if one.b is None:
            continue
        torch.mm(grad, one.b, out=of_low[:, part])
        if one.scaling != 1.0:
            of_low[:, part] *= one.scaling
        if needs[at * FIELDS + 3]:
            # The product of the narrow matrix from the left is the faster one.
            found[at * FIELDS + 3] = (low[:, part].T @ grad).mul_(one.scaling).T
    if any(needs[2::FIELDS]):
        of_a = of_low.T @ x
        for at, (one, part) in enumerate(zip(group, _ranks(group), strict=True)):
            if one.a is not None:
                found[at * FIELDS + 2] = of_a[part]
    if of_x is not None:
        of_x.addmm_(of_low, stacked)
    return of_x, found


def _stacked(group: Sequence[Projection]) -> torch.Tensor | None:
    adapters = [one.a for one in group if one.a is not None]
    return None if not adapters else adapters[0] if len(adapters) == 1 else torch.cat(adapters)


def _ranks(group: Sequence[Projection]) -> list[slice]:
    """Return the columns of the low-rank product that belong to each projection."""
    found, start = [], 0
    for one in group:
        end = start + (0 if one.a is None else one.a.shape[0])
        found.append(slice(start, end))
        start = end
    return found


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' RMS norm of x [tokens, H], and the float32 reciprocals of the root mean squares [tokens, 1]."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return _scaled(x, scale, weight), scale


def _scaled(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x * scale).to(x.dtype).mul_(weight)


def rms_norm_back(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, need: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradient of x, that of the residual path around the norm added, and the gradient of the gains."""
    unit = x * scale
    of_weight = (grad * unit).sum(0).to(weight.dtype) if need else None
    of_unit = (grad * weight).float()
    along = torch.linalg.vecdot(of_unit, unit).div_(x.shape[-1])[:, None]
    of_x = of_unit.addcmul_(unit, along, value=-1).mul_(scale)
    return of_x.add_(residual).to(x.dtype), of_weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of x [tokens, heads, D] by the angles of cos and sin [tokens, 1, D]; -1 turns back."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    out = x * cos
    out[..., :half].addcmul_(right, sin[..., :half], value=-sign)
    out[..., half:].addcmul_(left, sin[..., half:], value=sign)
    return out


def _filled(rows: torch.Tensor, tail: int) -> torch.Tensor:
    """Put ``tail`` rows of zeros behind ``rows`` [tokens, H]."""
    return nn.functional.pad(rows, (0, 0, 0, tail)) if tail else rows


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What an attention half needs beside its tensors."""

    layout: Any
    cos: torch.Tensor  # [tokens, 1, D]
    sin: torch.Tensor
    eps: float
    dim: int
    scale: float
    window: int | None
    scalings: tuple[float, ...]


class AttentionHalf(torch.autograd.Function):
    """x + o(attention(q, k, v of norm(x))), x [tokens, H] of a flat batch."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: torch.Tensor, plan: AttentionPlan, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        *inner, last = read(tensors, plan.scalings)
        normed, scale = rms_norm(x, norm, plan.eps)
        (query, key, value), low = project(normed, inner)
        heads = [one.view(len(x), -1, plan.dim) for one in (query, key, value)]
        turned = [rotate(one, plan.cos, plan.sin) for one in heads[:2]]
        real = len(x) - plan.layout.tail
        seen, wide = attend(turned[0][:real], turned[1][:real], heads[2][:real], plan.layout, plan.scale, plan.window)
        seen = _filled(seen.reshape(real, -1), plan.layout.tail)
        (out,), low_out = project(seen, [last])
        ctx.plan = plan
        ctx.save_for_backward(x, norm, scale, seen, low, low_out, *(t for one in wide for t in one), *tensors)
        ctx.count = len(tensors)
        return out.add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        saved, plan = ctx.saved_tensors, ctx.plan
        x, norm, scale, seen, low, low_out = saved[:6]
        tensors, wide = saved[len(saved) - ctx.count :], saved[6 : len(saved) - ctx.count]
        *inner, last = read(tensors, plan.scalings)
        needs = ctx.needs_input_grad[3:]
        cut = len(inner) * FIELDS
        grad = grads[0]
        of_seen, of_last = project_back(seen, [last], low_out, [grad], needs[cut:])
        assert of_seen is not None
        real = len(x) - plan.layout.tail
        of = attend_back(
            of_seen.view(len(x), -1, plan.dim)[:real],
            [Wide(*wide[at : at + 4]) for at in range(0, len(wide), 4)],
            plan.layout,
            plan.scale,
        )
        turned = [rotate(one, plan.cos[:real], plan.sin[:real], -1) for one in of[:2]]
        flat = [_filled(one.reshape(real, -1), plan.layout.tail) for one in (*turned, of[2])]
        below = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        of_normed, of_inner = project_back(_scaled(x, scale, norm), inner, low, flat, needs[:cut], of_input=below)
        of_x = of_norm = None
        if of_normed is not None:
            of_x, of_norm = rms_norm_back(of_normed, x, scale, norm, grad, ctx.needs_input_grad[1])
        return (of_x, of_norm, None, *of_inner, *of_last)


class MlpHalf(torch.autograd.Function):
    """x + down(silu(gate) * up) of norm(x), x [tokens, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        scalings: tuple[float, ...],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        *inner, last = read(tensors, scalings)
        normed, scale = rms_norm(x, norm, eps)
        (gate, up), low = project(normed, inner)
        (out,), low_out = project(nn.functional.silu(gate).mul_(up), [last])
        ctx.scalings, ctx.count = scalings, len(tensors)
        ctx.save_for_backward(x, norm, scale, gate, up, low, low_out, *tensors)
        return out.add_(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, norm, scale, gate, up, low, low_out, *tensors = ctx.saved_tensors
        *inner, last = read(tensors, ctx.scalings)
        needs = ctx.needs_input_grad[4:]
        cut = len(inner) * FIELDS
        grad = grads[0]
        active = nn.functional.silu(gate)
        of_product, of_last = project_back(active * up, [last], low_out, [grad], needs[cut:])
        assert of_product is not None
        of_up = active.mul_(of_product)
        of_gate = torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        of_normed, of_inner = project_back(_scaled(x, scale, norm), inner, low, [of_gate, of_up], needs[:cut])
        assert of_normed is not None
        of_x, of_norm = rms_norm_back(of_normed, x, scale, norm, grad, ctx.needs_input_grad[1])
        return (of_x, of_norm, None, None, *of_inner, *of_last)


# ── transformers' layers ──


def fusable(layer: Any) -> bool:
    """Tell whether a decoder layer is made of exactly what the two halves compute."""
    if type(layer).__name__ not in FUSABLE or not isinstance(layer.mlp.act_fn, nn.SiLU | _transformers_silu()):
        return False
    if getattr(layer.self_attn, "attention_dropout", 0.0):
        return False
    parts = [*(getattr(layer.self_attn, name) for name in ATTENTION), *(getattr(layer.mlp, name) for name in MLP)]
    return all(projection(part) is not None for part in parts)


def _transformers_silu() -> type:
    from transformers.activations import SiLUActivation

    return SiLUActivation


def _read_all(owner: Any, names: Sequence[str]) -> tuple[list[Projection], list[torch.Tensor | None]]:
    found = [projection(getattr(owner, name)) for name in names]
    every = [one for one in found if one is not None]
    assert len(every) == len(names)  # fusable
    return every, [tensor for one in every for tensor in one.tensors]


def _window(layer: Any) -> int | None:
    own = layer.self_attn
    if hasattr(own, "sliding_window"):
        return own.sliding_window
    return getattr(own.config, "sliding_window", None) if type(layer).__name__.startswith("Mistral") else None


def _hooked(modules: Sequence[nn.Module]) -> bool:
    """Tell whether somebody watches a module whose forward the two functions go around."""
    return any(one._forward_hooks or one._forward_pre_hooks or one._backward_hooks for one in modules)


def _forward(
    layer: Any,
    inner: Sequence[nn.Module],
    whole: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    *positional: Any,
    position_embeddings: Any = None,
    layout: Any = None,
    **others: Any,
) -> torch.Tensor:
    heads = layer.self_attn.config.num_attention_heads
    small = (
        layout is not None
        and hasattr(layout, "counts")  # else the decoder's key/value cache
        and not positional
        and fits(len(layout.counts), heads, layout.widest, layout.prefix, hidden_states.device)
    )
    if not small or _hooked(inner):
        if layout is not None:
            others["layout"] = layout
        return whole(hidden_states, *positional, position_embeddings=position_embeddings, **others)
    halves = functools.partial(_halves, layer, layout, *(one[0][:, None] for one in position_embeddings))
    if layer.gradient_checkpointing and layer.training:  # transformers looks at this in the forward that we stand for
        return layer._gradient_checkpointing_func(halves, hidden_states)
    return halves(hidden_states)


def _halves(layer: Any, layout: Any, cos: torch.Tensor, sin: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """Run both halves over a flat batch: [1, tokens, H] -> [1, tokens, H]."""
    attention, norm = layer.self_attn, layer.input_layernorm
    every, tensors = _read_all(attention, ATTENTION)
    plan = AttentionPlan(
        layout,
        cos,
        sin,
        norm.variance_epsilon,
        attention.head_dim,
        attention.scaling,
        _window(layer),
        tuple(one.scaling for one in every),
    )
    half: Any = AttentionHalf.apply(hidden_states[0], norm.weight, plan, *tensors)
    every, tensors = _read_all(layer.mlp, MLP)
    norm = layer.post_attention_layernorm
    scalings = tuple(one.scaling for one in every)
    out: Any = MlpHalf.apply(half, norm.weight, norm.variance_epsilon, scalings, *tensors)
    return out[None]


@contextmanager
def fused(layers: Sequence[Any]) -> Iterator[int]:
    """Let the layers that can run as two functions while inside; yields how many do."""
    chosen = [layer for layer in layers if "forward" not in layer.__dict__ and fusable(layer)]
    for layer in chosen:
        inner = [module for module in layer.modules() if module is not layer]
        layer.forward = functools.partial(_forward, layer, inner, layer.forward)
    try:
        yield len(chosen)
    finally:
        for layer in chosen:
            layer.__dict__.pop("forward", None)  # who put a forward of its own in this place took it away again
