"""Distillation losses over sparse targets, computed without a full [tokens, vocabulary] tensor.

All losses are sums over completion tokens, to be divided by the number of completion tokens of the whole optimiser step
(all micro-batches, all processes): means of means weigh short micro-batches wrongly. The distillation term carries T^2
(Hinton 2015), so that its gradient keeps its size when the temperature changes.

``HeadLoss`` computes the logits of a few positions at a time, and with them the gradient, which is known in closed
form: cross-entropy p - y; forward KL at T: T (p_T - q); top-K with the tail as one bucket: p_j - q_j for kept ids and
p_j (1 - q_tail / p_tail) elsewhere. Nothing but the gradient of the hidden states is kept for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgedistill.training.targets import SparseTargets

CHUNK = 128
"""Positions whose logits exist at a time."""
ROWS = 16
"""Positions of a chunk that pass through the softmax at a time: what fits the cache is four times faster on a CPU."""
TAIL_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Weights of the terms and the temperature of the distillation term."""

    kd: float = 0.0
    ce: float = 1.0
    temperature: float = 1.0


@dataclass(eq=False)
class BatchTargets:
    """Sparse targets of a batch in row-compressed form: position t has entries [offsets[t], offsets[t + 1]).

    ``q`` are probabilities at the loss temperature. ``tail`` [positions] is the mass of the tail bucket (top-k), or
    None. ``constant`` [positions] is the teacher's part of the divergence, sum of q log q, estimated where targets are
    sampled.
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    q: torch.Tensor
    tail: torch.Tensor | None
    constant: torch.Tensor


def batch_targets(targets: Sequence[SparseTargets], temperature: float) -> BatchTargets:
    """Put the targets of a batch's examples together at the loss temperature, in the order of the completion tokens."""
    sizes = np.concatenate([np.diff(one.offsets) for one in targets])
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    ids = np.concatenate([one.ids for one in targets]).astype(np.int64)
    q = np.concatenate([one.probabilities(temperature) for one in targets]).astype(np.float64)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    tail = None
    if targets[0].kind == "top-k":
        tail = np.clip(1.0 - np.bincount(rows, q, len(sizes)), 0.0, 1.0)
        constant = np.bincount(rows, q * np.log(np.maximum(q, 1e-30)), len(sizes))
        constant += tail * np.log(np.maximum(tail, 1e-30))
    else:
        known = [one.normaliser(temperature) for one in targets]
        logp = np.concatenate([one.logp for one in targets]).astype(np.float64) / temperature
        if all(one is not None for one in known):
            shift = np.concatenate([one for one in known if one is not None]).astype(np.float64)
            constant = np.bincount(rows, q * (logp - shift[rows]), len(sizes))
        else:
            constant = np.zeros(len(sizes))
    return BatchTargets(
        offsets=torch.from_numpy(offsets),
        ids=torch.from_numpy(ids),
        q=torch.from_numpy(q.astype(np.float32)),
        tail=None if tail is None else torch.from_numpy(tail.astype(np.float32)),
        constant=torch.from_numpy(constant.astype(np.float32)),
    )


def dense_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return forward KL(teacher_T || student_T) per position, without T^2: [positions]. The check for the rest."""
    logq = torch.log_softmax(teacher / temperature, -1)
    logp = torch.log_softmax(student / temperature, -1)
    return (logq.exp() * (logq - logp)).sum(-1)


def sparse_kl(targets: BatchTargets, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the sparse form of the same divergence for each position, plainly and differentiably: [positions]."""
    positions = student.shape[0]
    rows = torch.repeat_interleave(torch.arange(positions), targets.offsets.diff())
    logp = torch.log_softmax(student / temperature, -1)
    kept = logp[rows, targets.ids]
    cross = torch.zeros(positions, dtype=student.dtype).index_add(0, rows, targets.q.to(student.dtype) * kept)
    if targets.tail is not None:
        mass = torch.zeros(positions, dtype=student.dtype).index_add(0, rows, kept.exp())
        cross = cross + targets.tail.to(student.dtype) * torch.log((1.0 - mass).clamp_min(TAIL_FLOOR))
    return targets.constant.to(student.dtype) - cross


class HeadLoss(torch.autograd.Function):
    """LM head and loss in one: hidden states [N, H] and head weight [>= V, H] -> (kd sum, ce sum), both weighted.

    With ``separate`` each result has its own gradient. Without, one gradient is kept, that of their sum: differentiate
    kd + ce only, and half of the work is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        weights: torch.Tensor,
        targets: BatchTargets | None,
        terms: LossTerms,
        vocab_size: int,
        separate: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        head = weight[:vocab_size]
        head_bias = None if bias is None else bias[:vocab_size]
        train_head = ctx.needs_input_grad[1]
        grads = [torch.empty_like(hidden) for _ in range(2 if separate else 1)]
        head_grad = torch.zeros_like(weight, dtype=torch.float32) if train_head else None
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for start in range(0, count, chunk):
            end = min(start + chunk, count)
            states = hidden[start:end]
            logits = torch.nn.functional.linear(states, head, head_bias)
            # The gradient takes the place of the logits: one large buffer for a chunk, two where the terms are kept
            # apart.
            of_kd = torch.empty_like(logits) if separate else logits
            for low in range(start, end, ROWS):
                high = min(low + ROWS, end)
                place = slice(low - start, high - start)
                kd, ce, kd_grad, ce_grad = _terms(
                    logits[place], labels[low:high], weights[low:high], targets, low, high, terms
                )
                totals[0] += kd
                totals[1] += ce
                if separate:
                    of_kd[place] = kd_grad if kd_grad is not None else 0.0
                    logits[place] = ce_grad if ce_grad is not None else 0.0
                elif kd_grad is not None and ce_grad is not None:
                    logits[place] = kd_grad.add_(ce_grad)
                else:
                    only = kd_grad if kd_grad is not None else ce_grad
                    logits[place] = only if only is not None else 0.0
            grads[0][start:end] = of_kd @ head
            if separate:
                grads[1][start:end] = logits @ head
            if head_grad is not None:
                both = logits + of_kd if separate else logits
                head_grad[:vocab_size] += (both.T @ states).float()
        ctx.separate = separate
        ctx.save_for_backward(*grads, *([] if head_grad is None else [head_grad]))
        ctx.weight_dtype = weight.dtype
        kd_value = terms.kd * totals[0]
        ce_value = terms.ce * totals[1]
        return kd_value.float(), ce_value.float()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        head_grad = saved.pop() if ctx.needs_input_grad[1] else None
        if ctx.separate:
            grad = saved[0] * outputs[0].to(saved[0].dtype) + saved[1] * outputs[1].to(saved[1].dtype)
        else:
            grad = saved[0] * outputs[0].to(saved[0].dtype)
        weight_grad = None if head_grad is None else (head_grad * outputs[0]).to(ctx.weight_dtype)
        return (grad, weight_grad, *([None] * 8))


def _terms(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    targets: BatchTargets | None,
    low: int,
    high: int,
    terms: LossTerms,
) -> tuple[float | torch.Tensor, float | torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return (kd sum, ce sum, gradient of kd, gradient of ce) of some positions; the gradients are weighted, [n, V]
    float32.
    """
    kd = ce = 0.0
    kd_grad = ce_grad = None
    z = logits.float()
    use_kd = targets is not None and terms.kd != 0.0
    p, lse = _softmax(z) if terms.ce != 0.0 or terms.temperature == 1.0 else (z, z)
    if use_kd:
        assert targets is not None
        if terms.temperature == 1.0:
            kd_grad, scaled, scaled_lse = (p.clone() if terms.ce != 0.0 else p), z, lse
        else:
            scaled = z / terms.temperature
            kd_grad, scaled_lse = _softmax(scaled)
        values = _kd_values(scaled, scaled_lse, kd_grad, targets, low, high)
        kd = (values * weights).sum().double() * terms.temperature**2
        kd_grad.mul_((terms.kd * terms.temperature * weights)[:, None])
    if terms.ce != 0.0:
        rows = torch.arange(len(labels), device=logits.device)
        ce = ((lse - z[rows, labels]) * weights).sum().double()
        ce_grad = p
        ce_grad[rows, labels] -= 1.0
        ce_grad.mul_((terms.ce * weights)[:, None])
    return kd, ce, kd_grad, ce_grad


def _softmax(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax and log-sum-exp of float32 logits, the latter from the largest entry: it never underflows."""
    p = torch.softmax(z, -1)
    return p, z.amax(-1) - p.amax(-1).log()


def _kd_values(
    z: torch.Tensor, lse: torch.Tensor, p: torch.Tensor, targets: BatchTargets, start: int, end: int
) -> torch.Tensor:
    """Return the divergence of each position [n], without T^2, and turn ``p`` into its gradient times T, in place."""
    offsets = targets.offsets[start : end + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    device = z.device
    rows = torch.repeat_interleave(torch.arange(end - start), offsets.diff()).to(device)
    ids, q = targets.ids[first:last].to(device), targets.q[first:last].to(device)
    logp = z[rows, ids] - lse[rows]
    cross = torch.zeros(end - start, device=device).index_add_(0, rows, q * logp)
    kept = logp.exp()
    if targets.tail is not None:
        tail = targets.tail[start:end].to(device)
        mass = torch.zeros(end - start, dtype=torch.float64, device=device).index_add_(0, rows, kept.double())
        rest = (1.0 - mass).float().clamp_(min=TAIL_FLOOR)
        cross += tail * rest.log()
        p.mul_((1.0 - tail / rest)[:, None])
    p[rows, ids] = kept - q
    return targets.constant[start:end].to(device) - cross


def completion_loss(
    model: Any,
    states: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    targets: BatchTargets | None,
    terms: LossTerms,
    *,
    vocab_size: int,
    separate: bool = False,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed, weighted (kd, ce) of the states that predict completion tokens.

    ``vocab_size`` is the tokenizer's: rows of the head beyond it are padding (152,064 for 151,936 in one family) and
    stay out of every softmax. With ``separate`` false only the sum kd + ce is to be differentiated.
    """
    from edgedistill.training.packing import causal_lm

    head = causal_lm(model).get_output_embeddings()
    return HeadLoss.apply(states, head.weight, head.bias, labels, weights, targets, terms, vocab_size, separate, chunk)  # pyright: ignore[reportReturnType]
