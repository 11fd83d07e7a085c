"""Checks that run before training, in seconds: the loss is what it claims to be, for this model and this data.

Each is an identity that a known bug of distillation code breaks: shifted labels, a mask that counts the prompt, means
of means under accumulation, targets of other tokens, sparse targets that lose mass, batches whose rows see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from edgedistill.errors import StepFailed
from edgedistill.training.data import Example, collate, counter_rng
from edgedistill.training.draws import sparse_from_logits, uniforms
from edgedistill.training.features import Features
from edgedistill.training.losses import LossTerms, batch_targets, completion_loss, dense_kl
from edgedistill.training.packing import causal_lm, completion_states, make_batch, packed_mode
from edgedistill.training.targets import SparseTargets

ROWS = 4
TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class SelfCheckReport:
    """What was compared, each as a measured difference with its limit, and how long it took."""

    differences: dict[str, float]
    limits: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def selfcheck(
    model: Any,
    examples: Sequence[Example],
    targets: Sequence[SparseTargets] | None = None,
    *,
    terms: LossTerms,
    vocab_size: int,
    guide: Features | None = None,
) -> SelfCheckReport:
    """Check loss, shift, mask, accumulation, sparse targets and hidden states on a few short rows of the real data.

    The model keeps its weights and its gradients. Raises StepFailed naming what does not hold.
    """
    started = time.monotonic()
    chosen = _choose(examples)
    few = [examples[at] for at in chosen]
    check = _Check()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = _plain_logits(model, few, vocab_size)
            _loss_and_layout(check, model, few, plain, vocab_size)
            _accumulation(check, model, few, vocab_size)
            _identity(check, plain, terms.temperature)
            if guide is not None:
                _features(check, model, few, guide)
        _gradient(check, model, few[:2], vocab_size)
        if targets is not None:
            _targets(check, few, [targets[at] for at in chosen], vocab_size)
            if len(examples) > 1:
                _alignment(check, examples, targets)
    finally:
        model.train(was_training)
    if check.broken:
        raise StepFailed(
            "the self-check before training failed: " + "; ".join(check.broken),
            hint="nothing was trained; report this with the model's config.json",
        )
    return SelfCheckReport(
        differences=check.differences, limits=check.limits, seconds=round(time.monotonic() - started, 3)
    )


class _Check:
    def __init__(self) -> None:
        self.differences: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.broken: list[str] = []

    def within(self, name: str, difference: float, limit: float, meaning: str) -> None:
        self.differences[name], self.limits[name] = difference, limit
        if not difference <= limit:
            self.broken.append(f"{meaning} ({name}: {difference:.3g}, at most {limit:.3g})")


def _choose(examples: Sequence[Example]) -> list[int]:
    """Pick a few rows: the shortest ones of a sample, so that the check stays cheap on long data."""
    rng = counter_rng("selfcheck", len(examples))
    sample = rng.permutation(len(examples))[:64]
    ordered = sorted((examples[at].length, int(at)) for at in sample)
    chosen, used = [], 0
    for length, at in ordered:
        if len(chosen) == ROWS or (chosen and used + length > TOKENS):
            break
        chosen.append(at)
        used += length
    return chosen


def _plain_logits(model: Any, few: Sequence[Example], vocab_size: int) -> list[torch.Tensor]:
    """Run each row alone through the model's own forward: logits [completion tokens, V] that predict the completion."""
    device = next(model.parameters()).device
    out = []
    for example in few:
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].float()
        out.append(logits[len(example.prompt_ids) - 1 : -1])
    return out


def _rounding(model: Any) -> float:
    return 1e-4 if next(causal_lm(model).parameters()).dtype == torch.float32 else 0.05


def _loss(model: Any, few: Sequence[Example], vocab_size: int) -> torch.Tensor:
    with packed_mode(model) as packed:
        batch = make_batch(few, packed=packed)
        states = completion_states(model, batch)
        kd, ce = completion_loss(
            model,
            states,
            batch.targets.to(states.device),
            torch.ones(len(batch.targets), device=states.device),
            None,
            LossTerms(ce=1.0),
            vocab_size=vocab_size,
        )
    return kd + ce


def _loss_and_layout(
    check: _Check, model: Any, few: Sequence[Example], plain: Sequence[torch.Tensor], vocab_size: int
) -> None:
    """Compare with cross-entropy as in the textbook, one row at a time, labels shifted by hand."""
    count = sum(len(one.completion_ids) for one in few)
    expected = sum(
        float(
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(one.completion_ids, device=logits.device), reduction="sum"
            )
        )
        for one, logits in zip(few, plain, strict=True)
    )
    got = float(_loss(model, few, vocab_size))
    check.within(
        "loss",
        abs(got - expected) / count,
        _rounding(model),
        "the loss over the batch is not the cross-entropy of its completions, shifted by one and without the prompts",
    )
    batch = collate(few, pad_to=16)
    check.within(
        "mask", float(abs(int((batch.labels >= 0).sum()) - count)), 0.0, "the loss counts tokens that are no completion"
    )
    with packed_mode(model) as packed:
        states = completion_states(model, make_batch(few, packed=packed))
    head = causal_lm(model).get_output_embeddings()
    logits = torch.nn.functional.linear(states, head.weight, head.bias)[:, :vocab_size].float()
    divergence = float(dense_kl(torch.cat(list(plain)), logits).mean())
    check.within(
        "layout",
        divergence,
        _rounding(model) / 5,
        "rows in a batch give other distributions than each row alone (padding, the shared prefix, or a model that "
        "changes logits after its head)",
    )


def _accumulation(check: _Check, model: Any, few: Sequence[Example], vocab_size: int) -> None:
    count = sum(len(one.completion_ids) for one in few)
    whole = float(_loss(model, few, vocab_size))
    parts = sum(float(_loss(model, [one], vocab_size)) for one in few)
    check.within(
        "accumulation", abs(whole - parts) / count, _rounding(model), "the loss depends on how the batch is cut"
    )


def _features(check: _Check, model: Any, few: Sequence[Example], guide: Features) -> None:
    """Compare the states' error of a batch with the sum over each row alone; of a student from itself there is none."""
    guide.watch(model)

    def sums(rows: Sequence[Example]) -> dict[str, float]:
        with packed_mode(model, *([guide.teacher] if guide.reads_along else [])) as packed:
            batch = make_batch(rows, packed=packed)
            completion_states(model, batch)
            own.update({name: float(value) for name, value in guide.of_itself(batch, rows).items()})
            return {name: float(value) for name, value in guide.sums(batch, rows).items()}

    own: dict[str, float] = {}
    alone = [sums([one]).get("features", 0.0) for one in few]
    together = sums(few).get("features", 0.0)
    check.within(
        "features",
        abs(together - sum(alone)) / max(abs(together), 1e-6),
        _rounding(model),
        "the error of the hidden states depends on how the batch is cut",
    )
    each = max(map(abs, own.values())) / sum(one.length for one in few)
    check.within("own features", each, 1e-5, "the hidden states of a model differ from themselves")


def _gradient(check: _Check, model: Any, few: Sequence[Example], vocab_size: int) -> None:
    """Compare the gradient of two rows together with the sum over each alone, on one weight in training."""
    trained = [one for one in model.parameters() if one.requires_grad and one.ndim > 1]
    if not trained or len(few) < 2:
        return
    # The last: B of an adapter starts at zero but has a gradient, A of the same layer has none yet.
    weight = trained[-1]
    (together,) = torch.autograd.grad(_loss(model, few, vocab_size), weight)
    alone = sum(torch.autograd.grad(_loss(model, [one], vocab_size), weight)[0].float() for one in few)
    scale = float(together.float().norm()) or 1.0
    check.within(
        "gradient",
        float((together.float() - alone).norm()) / scale,
        _rounding(model) * 2,
        "the gradient of a batch is not the sum over its rows",
    )


def _identity(check: _Check, plain: Sequence[torch.Tensor], temperature: float) -> None:
    """With student = teacher the dense divergence is 0, and the sampled one is 0 within its standard error."""
    logits = torch.cat(list(plain))[:96].cpu()
    dense = float(dense_kl(logits, logits, temperature).abs().max())
    check.within("identity", dense, 1e-5, "the divergence of a model from itself is not 0")
    uniform = torch.from_numpy(uniforms(0, "selfcheck", len(logits), 64))
    sampled = sparse_from_logits(logits, kind="sampled", n=64, temperature=temperature, uniform=uniform)
    logp = torch.log_softmax(logits / temperature, -1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    variance = ((p * logp.square()).sum(-1) - entropy.square()).clamp_min(0) / 64
    cross = -np.bincount(
        sampled.rows, sampled.probabilities(temperature) * logp[sampled.rows, sampled.ids].numpy(), len(logits)
    )
    error = float((torch.from_numpy(cross) - entropy).sum())
    standard = math.sqrt(float(variance.sum())) or 1e-6
    check.within(
        "sampled",
        abs(error) / standard,
        5.0,
        "sampled targets do not agree with the dense distribution (standard errors)",
    )
    # A second model: the same logits, pushed. Sparse and dense must agree on how far it is away.
    pushed = logits + torch.from_numpy(counter_rng("push").standard_normal(logits.shape[1], dtype=np.float32))
    dense_far = dense_kl(logits, pushed, temperature)
    logq = torch.log_softmax(pushed / temperature, -1)
    ratio = logp - logq
    spread = ((p * ratio.square()).sum(-1) - dense_far.square()).clamp_min(0) / 64
    estimate = np.bincount(
        sampled.rows, sampled.probabilities(temperature) * ratio[sampled.rows, sampled.ids].numpy(), len(logits)
    )
    error = float((torch.from_numpy(estimate) - dense_far).sum())
    check.within(
        "sparse",
        abs(error) / (math.sqrt(float(spread.sum())) or 1e-6),
        5.0,
        "the sparse divergence does not agree with the dense one (standard errors)",
    )


def _targets(check: _Check, few: Sequence[Example], targets: Sequence[SparseTargets], vocab_size: int) -> None:
    wrong = [one.id for one, soft in zip(few, targets, strict=True) if soft.positions != len(one.completion_ids)]
    check.within("positions", float(len(wrong)), 0.0, f"soft targets have another length than rows {wrong}")
    beyond = sum(int((soft.ids >= vocab_size).sum()) for soft in targets)
    check.within("vocabulary", float(beyond), 0.0, "soft targets name tokens beyond the student's vocabulary")
    soft = batch_targets(targets, targets[0].temperature)
    mass = np.bincount(np.repeat(np.arange(len(soft.offsets) - 1), soft.offsets.diff()), soft.weights.numpy())
    if soft.log_tail is not None:
        mass = mass + soft.log_tail.exp().numpy()
    check.within("mass", float(np.abs(mass - 1).max()), 1e-2, "the probabilities of a position do not add up to 1")


def _alignment(check: _Check, examples: Sequence[Example], targets: Sequence[SparseTargets]) -> None:
    """The teacher's mass on the written token must not be larger one position earlier or later than at its own.

    The difference counts in units of twice its own noise (hits are counts), so a teacher that knows nothing of the text,
    and text that repeats one token, are no alarm.
    """
    hits = {-1: 0.0, 0: 0.0, 1: 0.0}
    count = 0
    for example, soft in list(zip(examples, targets, strict=True))[:256]:
        ids = np.asarray(example.completion_ids)
        if soft.positions != len(ids) or len(ids) < 3:
            continue
        q = soft.probabilities(soft.temperature)
        rows = soft.rows
        inner = (rows >= 1) & (rows < len(ids) - 1)
        for shift in hits:
            hits[shift] += float(q[inner][soft.ids[inner] == ids[rows[inner] + shift]].sum())
        count += len(ids) - 2
    if count >= 32:
        check.within(
            "alignment",
            max((hits[at] - hits[0]) / (2 * math.sqrt(hits[at] + hits[0] + 1.0)) for at in (-1, 1)),
            1.0,
            "soft targets fit the tokens one position away better than their own (shifted by one)",
        )
