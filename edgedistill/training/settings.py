"""What a training run is given, what follows from it alone, and what stops it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training.checkpoint import State
from edgedistill.training.data import Example, eased_batches, groups_of, make_batches
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.objectives import FeatureTerms, problem
from edgedistill.training.targets import SparseTargets

if TYPE_CHECKING:
    import torch

WINDOW = 20
"""Steps over which the loss is averaged before it is called divergent."""
LATER = (
    *("optimizer", "gradient_checkpointing", "on_policy", "on_policy_tokens", "on_policy_temperature"),
    *("features", "keep", "curriculum", "code_lr", "scale_lr", "norm_lr"),
)
"""Settings that came later: at their default they are no part of a run's digest."""
OPTIMIZERS = ("adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
"""By transformers' names; all of torch's own, whose state is tensors and nothing else."""
FIRST = 5
"""Steps at the start whose largest loss is what the first average is held against."""


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """How general rows hold the student to its start (``keeping.py``): ``share`` x batch_size of them in each step, by ``kl`` times
    the mean divergence from the start and ``ce`` times the mean cross-entropy; ``stop`` is the rise of their loss, in nats a
    token, that ends training.
    """

    share: float = 0.25
    kl: float = 1.0
    ce: float = 0.0
    stop: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. ``batch_size`` rows (prompts, where several rows are the answers to one) make one optimiser step, computed
    ``micro_batch`` rows at a time.

    ``steps`` (optimiser steps) goes before ``epochs``. ``warmup`` is a share of the steps. ``dtype`` is the type of the
    computation; weights in training are kept in float32 beside it. ``hidden`` is the weight of the hidden states' mean
    relative error (``hidden.py``), ``features`` what else is compared of them (``features.py``). ``on_policy`` is the share of
    rows that the student writes itself (``on_policy.py``), up to ``on_policy_tokens`` tokens drawn at
    ``on_policy_temperature``. ``curriculum`` names what orders the rows of the first epoch from easy to hard (``curriculum.py``).
    ``code_lr`` (steps of the grid), ``scale_lr`` (shares of the scales) and ``norm_lr`` are the learning rates of a quantized
    file's blocks and norms (``quantized.py``). ``gradient_norms`` is every how many steps the norms of the kd, ce and features
    gradients are taken apart (0: never).
    """

    method: Literal["lora", "qlora", "full", "norms", "weights"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    lr: float = 2e-4
    code_lr: float = 1.5e-3
    scale_lr: float = 1e-4
    norm_lr: float = 1e-4
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    micro_batch: int | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0
    on_policy: float = 0.0
    on_policy_tokens: int = 64
    on_policy_temperature: float = 1.0
    keep: KeepSettings | None = None
    curriculum: Literal["none", "length", "loss", "confidence", "evolution"] = "none"
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    loss: LossTerms = field(default_factory=LossTerms)
    hidden: float = 0.0
    features: FeatureTerms | None = None
    freeze_embeddings: bool = True
    dtype: str = "auto"
    seed: int = 0
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 60.0
    gradient_norms: int = 25

    @property
    def guided(self) -> dict[str, float]:
        """Return the weights of the terms that compare hidden states, by their names in the log."""
        of_features = self.features.weights if self.features else {}
        return {"hidden": self.hidden} if self.hidden else of_features


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did. ``path`` is the adapter's folder (lora) or the model's (full); rates are of this process."""

    path: Path
    method: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    loss: float
    kd: float
    ce: float
    trainable_parameters: int
    peak_memory: int
    resumed_at: int
    dtype: str
    general: dict[str, Any] | None = None  # what was forgotten, where general rows were kept: keeping.Keeper.report
    best_step: int | None = None  # whose weights these are, where rows held out were looked at: looks.Looks

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "path": self.path.name}


def make_optimizer(settings: TrainSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer that ``settings.optimizer`` names, over groups of float32 tensors with their weight decay."""
    import torch

    lr = settings.lr
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    if settings.optimizer == "adagrad":
        return torch.optim.Adagrad(groups, lr=lr)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, settings.beta2), fused=True)


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Return the learning rate of optimiser step ``step`` (from 0) of ``total``."""
    warm = max(1, round(settings.warmup * total)) if settings.warmup > 0 else 0
    if step < warm:
        return settings.lr * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    if settings.schedule == "constant":
        factor = 1.0
    elif settings.schedule == "linear":
        factor = 1.0 - share
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * share))
    return settings.min_lr + (settings.lr - settings.min_lr) * factor


def steps_per_epoch(examples: Sequence[Example], settings: TrainSettings) -> int:
    """Return how many optimiser steps take every row once."""
    return math.ceil(len(groups_of(examples)) / settings.batch_size)


def plan_steps(
    examples: Sequence[Example], settings: TrainSettings, difficulty: Sequence[float] | None = None
) -> list[list[int]]:
    """Return the rows of every optimiser step: a pure function of lengths, batch size, seed and number of steps, and of how hard
    each row is, where the first epoch goes from easy to hard. Rows of one group are in one step: what their weights add up to is
    what the step's loss is divided by, and a step of unlikely answers alone would count as much as one of likely ones.
    """
    groups = groups_of(examples)
    if len(groups) < len(examples):
        return [[row for group in step for row in groups[group]] for step in _plan_groups(examples, groups, settings)]
    per_epoch = steps_per_epoch(examples, settings)
    total = settings.steps if settings.steps is not None else max(1, round(settings.epochs * per_epoch))
    plan: list[list[int]] = []
    epoch = 0
    if difficulty is not None:
        plan += eased_batches(examples, difficulty, batch_size=settings.batch_size, seed=settings.seed)
        epoch += 1
    while len(plan) < total:
        plan += make_batches(examples, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch)
        epoch += 1
    return plan[:total]


def _plan_groups(
    examples: Sequence[Example], groups: Sequence[Sequence[int]], settings: TrainSettings
) -> list[list[int]]:
    """Return the groups of every optimiser step, planned as if each were one row as long as its longest."""
    whole = [max((examples[row] for row in group), key=lambda one: one.length) for group in groups]
    return plan_steps([replace(one, group="") for one in whole], settings)


def check_settings(
    settings: TrainSettings,
    examples: Sequence[Example],
    targets: Sequence[SparseTargets] | None,
    device: str,
    *,
    dense: bool = False,
) -> None:
    if not examples:
        raise UsageError("there is nothing to train on: no example is left", hint="look at the yield of the filters")
    if settings.batch_size < 1:
        raise UsageError(f"batch_size is {settings.batch_size}: it must be at least 1")
    if settings.curriculum != "none" and any(one.group for one in examples):
        raise UsageError(
            "a curriculum orders single rows, and some rows are the answers to one prompt",
            hint="set curriculum = 'none'",
        )
    if settings.optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer = {settings.optimizer!r}: use one of {', '.join(OPTIMIZERS)}")
    if settings.method == "qlora":
        raise UsageError(
            "method = 'qlora' needs an NVIDIA GPU (its 4-bit kernels are CUDA code)"
            + (" and the package bitsandbytes, which is not part of this version" if device == "cuda" else ""),
            hint="use method = 'lora'",
        )
    if settings.method not in ("lora", "full", "norms", "weights"):
        raise UsageError(f"method = {settings.method!r}: use 'lora', 'full' or 'norms'")
    if settings.on_policy and not (dense and settings.loss.kd):
        raise UsageError(
            "on_policy needs the teacher beside the student: what that writes was never scored",
            hint="set score.kind = 'dense' (a served teacher: 'top-k') and loss.kd above 0",
        )
    if settings.loss.kd and targets is None and not dense:
        raise UsageError("loss.kd is set, but there are no soft targets", hint="set loss.kd = 0, or a score step")
    if not settings.loss.kd and not settings.loss.ce and not settings.guided:
        raise UsageError("loss.kd, loss.ce and hidden are all 0: there is nothing to learn from")
    if targets is not None:
        one = settings.loss.divergence
        found = problem(one.name, one.share, targets[0].kind if targets else "", settings.loss.temperature)
        if settings.loss.kd and found is not None:
            raise UsageError(found[0], hint=found[1])
        if len(targets) != len(examples):
            raise UsageError(f"{len(targets)} soft targets for {len(examples)} examples")
        for example, one in zip(examples, targets, strict=True):
            if one.positions != len(example.completion_ids):
                raise UsageError(
                    f"row {example.id!r}: soft targets for {one.positions} of {len(example.completion_ids)} tokens"
                )


def check_loss(record: dict[str, Any], state: State, settings: TrainSettings, *, eased: int = 0) -> None:
    """Raise StepFailed for a loss that is not finite, or that runs away from the lowest mean of ``WINDOW`` steps so far.

    Of the first ``eased`` steps, whose rows get harder, the loss is expected to rise: they are no measure, and are not measured.
    """
    loss = record["loss"]
    if not math.isfinite(loss) or not math.isfinite(record["gradient"]):
        raise StepFailed(
            f"step {record['step']}: the loss is {loss:g} and the gradient {record['gradient']:g}",
            hint=f"try {_slower(settings)}, or a longer warmup",
        )
    step = record["step"] - eased
    if step < 1:
        return
    state.last_losses = [*state.last_losses[1 - WINDOW :], loss]
    mean = sum(state.last_losses) / len(state.last_losses)
    if len(state.last_losses) < WINDOW:
        # Until the first window is full there is no mean to compare with. A single batch may have been an easy one: where
        # rows are of several kinds, their losses differ by more than what is called divergent. The price: a loss that
        # jumps within these steps and stays there is not noticed, only one that goes on rising.
        state.best = max(state.last_losses[:FIRST])
        return
    growth = 1.0 if step == WINDOW else 0.5
    if mean > state.best + growth * abs(state.best) + 1.0:  # a KL that is estimated from draws may lie below 0
        raise StepFailed(
            f"step {record['step']}: the loss runs away ({state.best:.3g} at best, {mean:.3g} over the last {WINDOW} steps)",
            hint=f"try {_slower(settings)}, max_grad_norm = {settings.clip / 2 or 1:g} or a longer warmup",
        )
    state.best = mean if step == WINDOW else min(state.best, mean)


def _slower(settings: TrainSettings) -> str:
    """Return lower rates, as the table that has them names them."""
    names = ("code_lr", "scale_lr", "norm_lr") if settings.method == "weights" else ("lr",)
    return ", ".join(f"{name} = {getattr(settings, name) / 4:g}" for name in names)


def run_digest(
    model: Any,
    examples: Sequence[Example],
    targets: Sequence[SparseTargets] | None,
    settings: TrainSettings,
    vocab_size: int,
    general: Sequence[Example] = (),
) -> str:
    """Hash what a checkpoint must agree with: settings (but for how often to save), rows, targets, the model."""
    fields = asdict(settings)
    for name in ("checkpoint_steps", "checkpoint_seconds"):
        del fields[name]
    for name in LATER:  # a run that an older version began goes on
        if fields[name] == getattr(TrainSettings, name):
            del fields[name]
    for name in ("dora", "rslora"):
        if not fields["lora"][name]:
            del fields["lora"][name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(f"{vocab_size} {model.config.model_type}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {float(parameter.detach().flatten()[0])}".encode())
    for example in (*examples, *general):
        digest.update(example.token_hash + repr(example.weight).encode())
        if example.weights:
            digest.update(repr(example.weights).encode())
        if settings.curriculum == "evolution":
            digest.update(repr(example.evolution).encode())
        if example.group:
            digest.update(example.group.encode())
    for one in targets or ():
        digest.update(one.ids.tobytes())
        digest.update(one.counts.tobytes())
    return digest.hexdigest()
