"""Looking at rows held out while training goes on: the best weights so far are kept, and training ends where none come.

The rows are of two kinds, those of the task and those of other text. What is looked for is the least divergence from the teacher on
the first; weights that lost more than a given factor on the second are not taken, however good they are at the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgedistill.training.checkpoint import State, load_weights, save_weights
from edgedistill.training.data import Example
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.losses import LossTerms, completion_loss
from edgedistill.training.packing import completion_states, make_batch, packed_mode

EVERY = 8
"""A run is looked at so many times,"""
ROWS = 16
"""on so many rows of each kind at most, so many of them at a time,"""
PATIENCE = 3
"""and ends where so many looks in a row were not better than all before them."""
DENSE = LossTerms(kd=1.0, ce=0.0)


class Looks:
    """The looks of one run. ``worse`` is the factor that the divergence on ``other`` may grow by; ``folder`` takes the best
    weights.
    """

    def __init__(
        self, teacher: DenseTeacher, task: Sequence[Example], other: Sequence[Example], *, worse: float, folder: Path
    ) -> None:
        self.teacher, self.worse = teacher, worse
        self.sets = [list(task[:ROWS]), list(other[:ROWS])]
        self.start = (0.0, 0.0)
        self.every = self.total = 1
        self.snapshot = folder / "best.safetensors"
        self._read: dict[int, Any] = {}

    def begin(self, model: Any, total: int) -> None:
        """Look at the start of a run of ``total`` steps."""
        self.total, self.every = total, max(1, total // EVERY)
        self.start = self.measure(model)

    def due(self, done: int) -> bool:
        """Tell whether it is time after so many steps."""
        return done % self.every == 0 or done == self.total

    def look(self, model: Any, state: State, masters: dict[str, torch.Tensor], *, write: bool) -> dict[str, float]:
        """Look, and keep the weights where they are the best so far; return what the log says of it, nats a token."""
        task, other = self.measure(model)
        # The first steps of Adam often harm before they help: whether a run still comes down is told by its own looks.
        state.without = 0 if task < state.looked else state.without + 1
        state.looked = min(state.looked, task)
        if task < min(state.lowest, self.start[0]) and other <= self.worse * self.start[1]:
            state.lowest, state.lowest_step = task, state.step
            if write:
                save_weights(self.snapshot, masters)
        start = dict(zip(("held_out_start", "other_text_start"), self.start, strict=True))
        return {"held_out": task, "other_text": other, **start}

    def stopped(self, state: State) -> bool:
        """Tell whether the run is to end here."""
        return state.without >= PATIENCE

    def restore(self, state: State, masters: dict[str, torch.Tensor]) -> None:
        """Put the best weights back; where no look was better than the start, there are none."""
        if state.lowest_step not in (0, state.step):
            load_weights(self.snapshot, masters)

    def measure(self, model: Any) -> tuple[float, float]:
        """Return the mean divergence from the teacher a completion token, of the task's rows and of the others."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), packed_mode(model, self.teacher.teacher) as packed:
                return self._mean(model, 0, packed), self._mean(model, 1, packed)
        finally:
            model.train(training)

    def _mean(self, model: Any, which: int, packed: bool) -> float:
        if which not in self._read:  # the teacher's last states are a few megabytes, and always the same
            batch = make_batch(self.sets[which], packed=packed)
            self._read[which] = batch, self.teacher.targets(batch)
        batch, targets = self._read[which]
        states = completion_states(model, batch)
        labels, weights = batch.targets.to(states.device), batch.weights.to(states.device)
        vocab = self.teacher.vocab_size
        kd, _ = completion_loss(model, states, labels, weights, targets, DENSE, vocab_size=vocab)
        return float(kd) / float(weights.sum())
