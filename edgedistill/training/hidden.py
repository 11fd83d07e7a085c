"""Feature distillation for a pruned student: the teacher's hidden states, layer by layer, as targets.

Layer ``kept[j]`` of the teacher became layer j of the student, and its successor there is layer ``kept[j + 1]``. So the
student's layer j must do the work of the teacher's layers ``kept[j]`` to ``kept[j + 1] - 1``, and what it ought to give is
the teacher's state where layer ``kept[j + 1]`` begins (Sun et al. 2019, arXiv:1908.09355; Muralidharan et al. 2024,
arXiv:2407.14679). Every token of prompt and completion teaches, not only the few whose label is known. On the quickstart's
task, a third of the layers after 1,600 rows at the same settings: 0.22 exact match without it, 0.30 with weight 3 (n = 120).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, PaddedBatch
from edgedistill.training.packing import PackedBatch, body, read_beside


class Guide(ABC):
    """A teacher that reads what its student reads, and the states of both at some pairs of layers.

    ``pairs`` are (layer of the teacher, layer of the student), counted from 0. ``tokens`` are the teacher's numbers of the
    student's tokens, where its vocabulary was trimmed. There may be no ``teacher``: its states are stored
    (``cached_states.py``).
    """

    reads_along: ClassVar[bool] = True
    """Whether a teacher reads the student's batch."""

    def __init__(
        self, teacher: Any | None, pairs: Iterable[tuple[int, int]], *, tokens: Sequence[int] | None = None
    ) -> None:
        self.teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)
        self.pairs = list(pairs)
        self.tokens = None if tokens is None else torch.as_tensor(tokens)
        self._teachers: dict[int, torch.Tensor] = {}
        self._students: dict[int, torch.Tensor] = {}
        self._watched: list[Any] = []
        if teacher is not None:
            for at in {of_teacher for of_teacher, _ in self.pairs}:
                catch_output(layers_of(teacher)[at], at, self._teachers)

    def watch(self, student: Any) -> None:
        """Keep the states of the student's layers from now on, and those of no other student."""
        for hook in self._watched:
            hook.remove()
        layers = layers_of(student)
        self._watched = [catch_output(layers[at], at, self._students) for at in {of for _, of in self.pairs}]

    def to(self, device: Any, dtype: torch.dtype) -> None:
        """Move the teacher; its rotary frequencies are buffers and stay in float32."""
        if self.teacher is not None:
            for parameter in self.teacher.parameters():
                parameter.data = parameter.data.to(dtype)
            self.teacher.to(device)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return what is trained beside the student and not shipped, by name."""
        return {}

    @abstractmethod
    def sums(
        self, batch: PackedBatch | PaddedBatch, examples: Sequence[Example], *, read: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return the sum of every term over the batch that the student has just seen, by its name in the log. Without
        ``read`` the teacher has just seen it too.
        """

    def read(self, batch: PackedBatch | PaddedBatch) -> None:
        """Run the teacher over a batch."""
        read_beside(self.teacher, batch, self.tokens)


class HiddenStates(Guide):
    """Compare a student's hidden states with those of the teacher that it was cut from, over the same batch.

    ``kept`` are the teacher's layers that the student was cut from, ascending; ``basis`` [teacher's width, student's] is what
    the student's states are written in, where its residual stream was narrowed. Raises UsageError where the two do not fit:
    other widths, or another number of layers.
    """

    def __init__(
        self,
        teacher: Any,
        kept: Sequence[int],
        *,
        tokens: Sequence[int] | None = None,
        basis: torch.Tensor | None = None,
    ) -> None:
        matched = [at - 1 for at in kept[1:]] + [len(layers_of(teacher)) - 1]
        super().__init__(teacher, [(of_teacher, at) for at, of_teacher in enumerate(matched)], tokens=tokens)
        self.basis = basis

    def to(self, device: Any, dtype: torch.dtype) -> None:
        super().to(device, dtype)
        if self.basis is not None:
            self.basis = self.basis.to(device)

    def watch(self, student: Any) -> None:
        layers = layers_of(student)
        width = self.teacher.config.hidden_size if self.basis is None else self.basis.shape[1]
        if len(layers) != len(self.pairs) or student.config.hidden_size != width:
            raise UsageError(
                f"hidden states cannot be matched: the student has {len(layers)} layers of width "
                f"{student.config.hidden_size}, the teacher's kept layers are {len(self.pairs)} of width {width}",
                hint="cut the student from the teacher (student.layers), or set heal.hidden = 0",
            )
        super().watch(student)

    def sums(
        self, batch: PackedBatch | PaddedBatch, examples: Sequence[Example], *, read: bool = True
    ) -> dict[str, torch.Tensor]:
        return {"hidden": self.error(batch, read=read)}

    def error(self, batch: PackedBatch | PaddedBatch, *, read: bool = True) -> torch.Tensor:
        """Run the teacher over the batch that the student has just seen; return the error summed over the tokens.

        A token's error is ``relative_error``, averaged over the layers. The first token of a row does not count: it is the
        attention sink, with states a thousand times as large and nothing to learn.
        """
        if read:
            self.read(batch)
        weights = state_weights(batch).to(self._students[0].device)
        total = torch.zeros((), device=weights.device)
        for matched, at in self.pairs:
            teacher = self._teachers[matched].float()
            if self.basis is not None:
                teacher = teacher @ self.basis
            relative = relative_error(self._students[at].float(), teacher)
            total = total + (relative * weights).sum()
        return total / len(self.pairs)


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return |s - t|^2 / |t|^2 of states [..., H]: later layers have larger states, and none may drown the others."""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-6)


def tokens_of(examples: Sequence[Example]) -> int:
    """Count the tokens whose states are compared: all but the first of each row."""
    return sum(example.length - 1 for example in examples)


def layers_of(model: Any) -> Any:
    """Return a causal LM's decoder layers, whatever its family calls them."""
    decoder = body(model)
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def catch_output(layer: Any, at: int, into: dict[int, torch.Tensor]) -> Any:
    """Put every output of a layer under ``at`` into a dictionary; return the hook, to be removed."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        into[at] = output[0] if isinstance(output, tuple) else output

    return layer.register_forward_hook(hook)


def token_counts(batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Count how often each position of a batch stands in its rows: 0 for padding, 1 for a token; [rows or 1, positions].

    A shared prefix stands in a flat batch once and counts as often as there are rows, as it would in a padded one.
    """
    if isinstance(batch, PaddedBatch):
        return batch.attention_mask.float()
    counts = torch.ones(batch.position_ids.shape, device=batch.position_ids.device)
    counts[:, : batch.layout.prefix] *= len(batch.layout.counts)
    counts[:, counts.shape[1] - batch.layout.tail :] = 0
    return counts


def state_weights(batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Weigh each position of a batch: its count, and 0 for the first tokens of the rows."""
    return token_counts(batch) * (batch.position_ids > 0)
