"""LoRA's linear layer in fewer passes over memory, for training on a CPU.

PEFT computes base(x) + scaling * B(A(x)) with a multiplication and an addition over the whole output, and autograd adds
the two gradients of the input the same way. Here the products accumulate into the output and into the gradient. Only
plain layers are replaced (one adapter, no dropout, nn.Linear); the modules and what they save stay PEFT's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T with W frozen; x [tokens, in] -> [tokens, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        low = x @ a.T
        y = torch.nn.functional.linear(x, weight, bias)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grads[0]
        of_low = (grad @ b).mul_(ctx.scaling)
        of_b = (grad.T @ low).mul_(ctx.scaling)
        of_a = of_low.T @ x
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight
            of_x.addmm_(of_low, a)
        return of_x, None, None, of_a, of_b, None


def _forward(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    flat = x.reshape(-1, x.shape[-1])
    y = LoraLinear.apply(
        flat, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )
    return y.view(*x.shape[:-1], y.shape[-1])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def speed_up(model: Any) -> int:
    """Replace the forward of every plain LoRA layer of a PEFT model; return how many."""
    from peft.tuners.lora import Linear

    count = 0
    for layer in model.modules():
        if not isinstance(layer, Linear) or type(layer.base_layer) is not nn.Linear:
            continue
        names = list(layer.active_adapters)
        if len(names) != 1 or layer.merged or layer.lora_variant or layer.lora_bias.get(names[0]):
            continue
        if not isinstance(layer.lora_dropout[names[0]], nn.Identity):
            continue
        layer.forward = functools.partial(_forward, layer, names[0])
        count += 1
    return count


def restore(model: Any) -> None:
    """Give the layers their own forward back."""
    for layer in model.modules():
        if isinstance(layer.__dict__.get("forward"), functools.partial):
            del layer.forward
