"""The whole distribution of a teacher in memory, over the same batch as the student's: nothing stored, nothing estimated.

Costs the teacher's forward in every epoch, and its weights in memory; the two heads meet a few positions at a time
(``losses.HeadLoss``), so no [tokens, vocabulary] tensor of either exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from edgedistill.training.data import Example, PaddedBatch
from edgedistill.training.packing import PackedBatch, causal_lm, read_beside

if TYPE_CHECKING:
    from edgedistill.training.losses import BatchTargets


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """What a batch's distributions are made of: the teacher's last states [completion tokens, H], and its head's rows for
    the student's tokens [V, H] with their bias [V] or None. ``known`` [completion tokens] is 0 where the teacher says nothing of a
    token, and 1 elsewhere; None: it says something of all.
    """

    states: torch.Tensor
    head: torch.Tensor
    bias: torch.Tensor | None
    known: torch.Tensor | None = None

    def logits(self, start: int, end: int) -> torch.Tensor:
        """Return the teacher's logits of some positions, float32 [end - start, V]."""
        return torch.nn.functional.linear(self.states[start:end], self.head, self.bias).float()


class Beside(Protocol):
    """A teacher that gives the targets of a batch when they are needed."""

    reads_along: ClassVar[bool]
    """Whether it is a model in memory whose batch is the student's."""
    teacher: Any

    def to(self, device: Any, dtype: torch.dtype) -> None:
        """Move its weights, where it has any here."""
        ...

    def targets(
        self, batch: PackedBatch | PaddedBatch, rows: Sequence[int], examples: Sequence[Example]
    ) -> DenseTargets | BatchTargets:
        """Return the targets of a batch of ``examples``; ``rows`` are the numbers of those that they came from."""
        ...


class DenseTeacher:
    """A teacher that reads what the student reads. ``tokens`` are its numbers of the student's tokens, where the student's
    vocabulary was trimmed: the probability of the others is left out, and the rest adds up to 1 again.
    """

    reads_along: ClassVar[bool] = True
    """Whether the teacher's batch is the student's."""

    def __init__(self, teacher: Any, vocab_size: int, *, tokens: Sequence[int] | None = None) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.tokens = None if tokens is None else torch.as_tensor(tokens)[:vocab_size]
        self._head: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def to(self, device: Any, dtype: torch.dtype) -> None:
        """Move the teacher; its rotary frequencies are buffers and stay in float32."""
        for parameter in self.teacher.parameters():
            parameter.data = parameter.data.to(dtype)
        self.teacher.to(device)
        head = causal_lm(self.teacher).get_output_embeddings()
        rows = slice(self.vocab_size) if self.tokens is None else self.tokens.to(device)
        self._head = head.weight[rows], None if head.bias is None else head.bias[rows]

    def targets(
        self, batch: PackedBatch | PaddedBatch, rows: Sequence[int] = (), examples: Sequence[Example] = ()
    ) -> DenseTargets:
        """Run the teacher over a batch that the student has seen, or will."""
        assert self._head is not None  # to() comes first
        return DenseTargets(read_beside(self.teacher, batch, self.tokens), *self._head)
