"""Keeping what the student knew: general rows beside those of the task, on which it is held to its own start.

Text of one task alone moves the whole distribution, elsewhere too. Each step takes a few general rows more, and its loss
grows by ``kl`` times the mean KL divergence from the student's start to the student, or ``ce`` times the mean cross-entropy on
their references (Li and Hoiem 2016, arXiv:1606.09282, whose old network is the start here; Robins 1995 for rehearsal). These
means are over the general rows' own tokens: long chats do not drown short answers, and what the task's rows count stays what
it is without them. The start of an adapter is the same model with the adapter switched off, so nothing is copied; a student
that is trained in full keeps a frozen copy.

Some general rows are never trained on. Their loss before and after training says what was forgotten; with ``stop`` it is
looked at on the way, and the weights that ship are the last that were within it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training.checkpoint import State, load_weights, save_weights
from edgedistill.training.data import Example, counter_rng
from edgedistill.training.dense import DenseTargets, DenseTeacher
from edgedistill.training.losses import LossTerms, completion_loss
from edgedistill.training.packing import PackedBatch, PaddedBatch, causal_lm, completion_states, make_batch, packed_mode
from edgedistill.training.settings import TrainSettings

CHECKED = 5
"""One of so many general rows is not trained on,"""
HELD = 32
"""and so many at most."""
LOOKS = 10
"""How often the loss on them is looked at in a run, where that may stop it."""
PATIENCE = 2
"""Looks in a row beyond the bound that stop the run: one may be a bad batch."""


class Keeper:
    """The general rows of one run of ``total`` steps, and the student's start. ``folder`` takes the weights of the last look
    that was within the bound.
    """

    def __init__(
        self, general: Sequence[Example], settings: TrainSettings, *, total: int, vocab_size: int, folder: Path
    ) -> None:
        assert settings.keep is not None
        if len(general) < 2 * CHECKED:
            raise UsageError(
                f"{len(general)} general rows are too few to keep anything by",
                hint=f"give distill.keep at least {2 * CHECKED}",
            )
        self.settings, self.keep, self.vocab_size, self.total = settings, settings.keep, vocab_size, total
        self.terms = LossTerms(kd=self.keep.kl, ce=self.keep.ce)
        held = list(range(CHECKED - 1, len(general), CHECKED))[:HELD]
        self.held = [general[at] for at in held]
        self.mixed = [one for at, one in enumerate(general) if at not in set(held)]
        self.count = max(1, round(self.keep.share * settings.batch_size)) if self.keep.kl or self.keep.ce else 0
        self.every = max(1, total // LOOKS)
        self.snapshot = folder / "within.safetensors"
        self.frozen: DenseTeacher | None = None
        self.before: list[float] = []
        self._order: tuple[int, np.ndarray] | None = None

    def freeze(self, model: Any) -> None:
        """Keep the start of a model that is trained in full; before anything watches its layers."""
        if self.keep.kl and self.settings.method in ("full", "norms"):
            self.frozen = DenseTeacher(copy.deepcopy(model), self.vocab_size)

    def begin(self, model: Any, device: Any, dtype: torch.dtype) -> None:
        """Measure the start on the rows that are held out."""
        if self.frozen is not None:
            self.frozen.to(device, dtype)
        self.before = self.measure(model)

    def rows(self, step: int) -> list[Example]:
        """Return the general rows of a step: as many in each, from one shuffled epoch after the other. A function of (rows,
        seed, step), so that a resumed run takes the same.
        """
        found = []
        for place in range(step * self.count, (step + 1) * self.count):
            epoch, at = divmod(place, len(self.mixed))
            found.append(self.mixed[int(self.order(epoch)[at])])
        return found

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of the general rows in one epoch, the last one made at hand."""
        if self._order is None or self._order[0] != epoch:
            shuffled = counter_rng("general", self.settings.seed, epoch).permutation(len(self.mixed))
            self._order = epoch, shuffled
        return self._order[1]

    def backward(
        self, model: Any, step: int, *, packed: bool, part: tuple[int, int], collect: Callable[[], None]
    ) -> tuple[float, float]:
        """Take the way back through a step's general rows, ``collect`` after each micro-batch; return both terms, weighted, as
        means over the tokens of them all. ``part`` is (rank, processes): each process takes its share of the micro-batches.
        """
        rows, (rank, world) = self.rows(step), part
        tokens = sum(len(one.completion_ids) for one in rows)
        size = self.settings.micro_batch or max(1, math.ceil(len(rows) / world))
        kl = ce = 0.0
        for at, first in enumerate(range(0, len(rows), size)):
            if at % world != rank:
                continue
            if self.settings.lora.dropout and self.settings.method != "full":
                torch.manual_seed((self.settings.seed * 1_000_003 + step) * 1009 + 1008 - at)  # the task's count from 0
            one_kl, one_ce = self.loss(model, rows[first : first + size], packed=packed)
            ((one_kl + one_ce) / tokens).backward()
            collect()
            kl, ce = kl + float(one_kl.detach()) / tokens, ce + float(one_ce.detach()) / tokens
        return kl, ce

    def words(self, kl: float, ce: float) -> dict[str, float]:
        """Return the log's words for the two terms, without their weights."""
        weights = {"keep_kl": (kl, self.keep.kl), "keep_ce": (ce, self.keep.ce)}
        return {name: value / weight for name, (value, weight) in weights.items() if weight}

    def loss(self, model: Any, examples: Sequence[Example], *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sums over completion tokens of KL(start || student) and of cross-entropy."""
        batch = make_batch(examples, packed=packed)
        start = self.start(model, batch) if self.keep.kl else None
        states = completion_states(model, batch)
        labels, weights = batch.targets.to(states.device), batch.weights.to(states.device)
        return completion_loss(model, states, labels, weights, start, self.terms, vocab_size=self.vocab_size)

    def start(self, model: Any, batch: PackedBatch | PaddedBatch) -> DenseTargets:
        """Return the start's distributions over a batch."""
        if self.frozen is not None:
            return self.frozen.targets(batch)
        with torch.no_grad(), model.disable_adapter():
            states = completion_states(model, batch)
        head = causal_lm(model).get_output_embeddings()
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        return DenseTargets(states, head.weight[: self.vocab_size], bias)

    def measure(self, model: Any) -> list[float]:
        """Return the cross-entropy of each row that is held out, summed over its completion, in nats."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), packed_mode(model) as packed:
                sums = []
                for example in self.held:
                    batch = make_batch([example], packed=packed)
                    states = completion_states(model, batch)
                    labels, ones = batch.targets.to(states.device), torch.ones(len(batch.targets), device=states.device)
                    _, ce = completion_loss(model, states, labels, ones, None, LossTerms(), vocab_size=self.vocab_size)
                    sums.append(float(ce))
        finally:
            model.train(training)
        return sums

    @property
    def tokens(self) -> int:
        """Return the completion tokens of the rows that are held out."""
        return sum(len(one.completion_ids) for one in self.held)

    def due(self, done: int) -> bool:
        """Tell whether the loss is looked at after so many steps."""
        return self.keep.stop is not None and (done % self.every == 0 or done == self.total)

    def look(self, model: Any, state: State, masters: dict[str, torch.Tensor], *, write: bool) -> float:
        """Look at the rows that are held out, and remember the weights where they are within the bound. Returns nats a token."""
        found = self.measure(model)
        assert self.keep.stop is not None
        if (sum(found) - sum(self.before)) / self.tokens <= self.keep.stop:
            state.within, state.beyond = state.step, 0
            if write:
                save_weights(self.snapshot, masters)
        else:
            state.beyond += 1
        return sum(found) / self.tokens

    def stopped(self, state: State) -> bool:
        """Tell whether the run is to end here."""
        return state.beyond >= PATIENCE

    def restore(self, state: State, masters: dict[str, torch.Tensor]) -> None:
        """Put back the weights of the last look within the bound, where the run has gone beyond. Raises StepFailed where no
        look was.
        """
        if self.keep.stop is None or state.within == state.step:
            return
        if not state.within:
            raise StepFailed(
                f"the loss on general rows had risen by more than {self.keep.stop:g} nats a token at the first look, after "
                f"{self.every} steps",
                hint="try a lower distill.lr, a larger distill.keep.kl, or a larger distill.keep.stop",
            )
        load_weights(self.snapshot, masters)

    def report(self, model: Any, state: State) -> dict[str, Any]:
        """Say what the student that ships has forgotten: nats a token before and after, and the rise, paired by row."""
        from edgedistill.evals.statistics import clustered_mean

        after, counts = self.measure(model), [len(one.completion_ids) for one in self.held]
        rise, _ = clustered_mean([b - a for a, b in zip(self.before, after, strict=True)], counts)
        return {
            "before": clustered_mean(self.before, counts)[0].to_json(),
            "after": clustered_mean(after, counts)[0].to_json(),
            "rise": rise.to_json(),
            "tokens": self.tokens,
            "shipped_step": state.step if self.keep.stop is None else state.within,
            "stopped_at": state.step if self.stopped(state) else None,
        }
