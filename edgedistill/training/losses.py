"""Distillation losses over sparse targets, computed without a full [tokens, vocabulary] tensor.

All losses are weighted sums over completion tokens, to be divided by the sum of the weights (the number of tokens, where all
are 1) of the whole optimiser step (all micro-batches, all processes): means of means weigh short micro-batches wrongly. The
distillation term carries T^2 (Hinton 2015), so that its gradient keeps its size when the temperature changes.

``HeadLoss`` computes the logits of a few positions at a time, and with them the gradient, which is known in closed
form: cross-entropy p - y; a divergence at T: T (pull_j - p_j sum of the pulls), see ``divergences.py``; with the tail as one
bucket, the pull of a token in the tail is its share p_j / p_tail of the bucket's. Nothing but the gradient of the hidden
states is kept for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgedistill.training.dense import DenseTargets
from edgedistill.training.divergences import FORWARD_KL, Divergence
from edgedistill.training.targets import SparseTargets

CHUNK = 128
"""Positions whose logits exist at a time."""
ROWS = 16
"""Positions of a chunk that pass through the softmax at a time: what fits the cache is four times faster on a CPU."""
TAIL_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Weights of the terms; the divergence of the distillation term and its temperature."""

    kd: float = 0.0
    ce: float = 1.0
    temperature: float = 1.0
    divergence: Divergence = FORWARD_KL


@dataclass(eq=False)
class BatchTargets:
    """Sparse targets of a batch in row-compressed form: position t has entries [offsets[t], offsets[t + 1]).

    ``weights`` are what each entry counts: the teacher's probability at the loss temperature (top-k), or the entry's share
    of the draws (sampled). ``logq`` are the logs of the teacher's probabilities at that temperature; None where the draws'
    normaliser is not known, which forward KL can do without. ``log_tail`` [positions] is the log of the tail bucket's mass
    (top-k), or None.
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logq: torch.Tensor | None
    log_tail: torch.Tensor | None


def batch_targets(targets: Sequence[SparseTargets], temperature: float) -> BatchTargets:
    """Put the targets of a batch's examples together at the loss temperature, in the order of the completion tokens."""
    sizes = np.concatenate([np.diff(one.offsets) for one in targets])
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    ids = np.concatenate([one.ids for one in targets]).astype(np.int64)
    weights = np.concatenate([one.probabilities(temperature) for one in targets]).astype(np.float64)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    log_tail = logq = None
    if targets[0].kind == "top-k":
        tail = np.clip(1.0 - np.bincount(rows, weights, len(sizes)), 0.0, 1.0)
        log_tail = torch.from_numpy(np.log(np.maximum(tail, 1e-30)).astype(np.float32))
        logq = torch.from_numpy(np.log(np.maximum(weights, 1e-30)).astype(np.float32))
    else:
        known = [one.normaliser(temperature) for one in targets]
        if all(one is not None for one in known):
            logp = np.concatenate([one.logp for one in targets]).astype(np.float64) / temperature
            shift = np.concatenate([one for one in known if one is not None]).astype(np.float64)
            logq = torch.from_numpy((logp - shift[rows]).astype(np.float32))
    return BatchTargets(
        offsets=torch.from_numpy(offsets),
        ids=torch.from_numpy(ids),
        weights=torch.from_numpy(weights.astype(np.float32)),
        logq=logq,
        log_tail=log_tail,
    )


def dense_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return forward KL(teacher_T || student_T) per position, without T^2: [positions]. The check for the rest."""
    logq = torch.log_softmax(teacher / temperature, -1)
    logp = torch.log_softmax(student / temperature, -1)
    return (logq.exp() * (logq - logp)).sum(-1)


def dense_divergence(
    teacher: torch.Tensor, student: torch.Tensor, divergence: Divergence, temperature: float = 1.0
) -> torch.Tensor:
    """Return a divergence of dense logits [positions, V] per position, without T^2, differentiable: [positions]."""
    logq, logp = torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)
    return divergence.parts(logq, logp)[0].sum(-1)


def sparse_divergence(
    targets: BatchTargets, student: torch.Tensor, divergence: Divergence, temperature: float = 1.0
) -> torch.Tensor:
    """Return the sparse form of the same divergence for each position, plainly and differentiably: [positions].

    Draws without a known normaliser (forward KL) leave out the teacher's own part, which no gradient depends on.
    """
    positions, kind = student.shape[0], student.dtype
    rows = torch.repeat_interleave(torch.arange(positions), targets.offsets.diff())
    logp = torch.log_softmax(student / temperature, -1)
    kept = logp[rows, targets.ids]
    values = _outcomes(targets.weights.to(kind), targets.logq, kept, divergence, drawn=targets.log_tail is None)[0]
    total = torch.zeros(positions, dtype=kind).index_add(0, rows, values)
    if targets.log_tail is not None:
        mass = torch.zeros(positions, dtype=kind).index_add(0, rows, kept.exp())
        rest = torch.log((1.0 - mass).clamp_min(TAIL_FLOOR))
        total = total + divergence.parts(targets.log_tail.to(kind), rest)[0]
    return total


def _outcomes(
    weights: torch.Tensor, logq: torch.Tensor | None, logp: torch.Tensor, divergence: Divergence, *, drawn: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (value, pull) of the kept outcomes, where draws count by their share over their probability."""
    if drawn and divergence.name == "forward-kl":
        return weights * (-logp if logq is None else logq.to(logp) - logp), -weights
    assert logq is not None  # objectives.problem
    value, pull = divergence.parts(logq.to(logp), logp)
    if not drawn:
        return value, pull
    share = weights * (-logq.to(logp)).exp()
    return value * share, pull * share


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
        targets: BatchTargets | DenseTargets | None,
        terms: LossTerms,
        vocab_size: int,
        separate: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        head = weight[:vocab_size]
        head_bias = None if bias is None else bias[:vocab_size]
        train_head = ctx.needs_input_grad[1]
        sparse = None if isinstance(targets, DenseTargets) else targets
        known = targets.known if isinstance(targets, DenseTargets) else None
        kd_weights = weights if known is None else weights * known
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
            whole = targets.logits(start, end) if isinstance(targets, DenseTargets) else None
            for low in range(start, end, ROWS):
                high = min(low + ROWS, end)
                place = slice(low - start, high - start)
                kd, ce, kd_grad, ce_grad = _terms(
                    logits[place],
                    labels[low:high],
                    weights[low:high],
                    kd_weights[low:high],
                    sparse if whole is None else whole[place],
                    low,
                    high,
                    terms,
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
    kd_weights: torch.Tensor,
    targets: BatchTargets | torch.Tensor | None,
    low: int,
    high: int,
    terms: LossTerms,
) -> tuple[float | torch.Tensor, float | torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return (kd sum, ce sum, gradient of kd, gradient of ce) of some positions; the gradients are weighted, [n, V]
    float32. ``targets`` are the batch's, or the teacher's logits of these positions [n, V] (for ``uld`` of its own V).
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
        if isinstance(targets, torch.Tensor):
            logq = torch.log_softmax(targets / terms.temperature, -1)
            values = _dense_values(scaled - scaled_lse[:, None], kd_grad, logq, terms.divergence)
        else:
            values = _kd_values(scaled, scaled_lse, kd_grad, targets, terms.divergence, low, high)
        kd = (values * kd_weights).sum().double() * terms.temperature**2
        kd_grad.mul_((terms.kd * terms.temperature * kd_weights)[:, None])
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


def _dense_values(logp: torch.Tensor, p: torch.Tensor, logq: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Return the divergence of each position [n], without T^2, and turn ``p`` into its gradient times T, in place."""
    values, pulls = divergence.parts(logq, logp)
    p.mul_(-pulls.sum(-1, keepdim=True)).add_(pulls)
    return values.sum(-1)


def _kd_values(
    z: torch.Tensor,
    lse: torch.Tensor,
    p: torch.Tensor,
    targets: BatchTargets,
    divergence: Divergence,
    start: int,
    end: int,
) -> torch.Tensor:
    """Return the divergence of each position [n], without T^2, and turn ``p`` into its gradient times T, in place."""
    offsets = targets.offsets[start : end + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    device = z.device
    rows = torch.repeat_interleave(torch.arange(end - start), offsets.diff()).to(device)
    ids, weights = targets.ids[first:last].to(device), targets.weights[first:last].to(device)
    logq = None if targets.logq is None else targets.logq[first:last].to(device)
    logp = z[rows, ids] - lse[rows]
    values, pulls = _outcomes(weights, logq, logp, divergence, drawn=targets.log_tail is None)
    value = torch.zeros(end - start, device=device).index_add_(0, rows, values)
    pull = torch.zeros(end - start, device=device).index_add_(0, rows, pulls)
    elsewhere: torch.Tensor | float = 0.0  # pull over probability of a token that was not kept
    kept = logp.exp()
    if targets.log_tail is None and divergence.name == "forward-kl":
        p[rows, ids] = kept - weights  # the shares of the draws add up to 1: one pass over the vocabulary less
        return value
    if targets.log_tail is not None:
        mass = torch.zeros(end - start, dtype=torch.float64, device=device).index_add_(0, rows, kept.double())
        rest = (1.0 - mass).float().clamp_(min=TAIL_FLOOR)
        of_tail, tail_pull = divergence.parts(targets.log_tail[start:end].to(device), rest.log())
        value += of_tail
        pull += tail_pull
        elsewhere = tail_pull / rest
    p.mul_((elsewhere - pull)[:, None])
    p[rows, ids] = pulls - kept * pull[rows]
    return value


def completion_loss(
    model: Any,
    states: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    targets: BatchTargets | DenseTargets | None,
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
