"""Features and relations: the student's hidden states are drawn to the teacher's, layer by layer, and the rows of a batch are to
lie to each other as they do in the teacher.

Features. The state of a student's layer, where the widths differ through a matrix in training, is compared with that of the
teacher's layer, at every token of prompt and completion but the first (FitNets, Romero et al. 2015, arXiv:1412.6550; TinyBERT,
Jiao et al. 2020, arXiv:1909.10351). The matrix turns the student's states into the teacher's space, not the other way round:
the target stays what the teacher says. A target in training could be met by shrinking it.

Relations (RKD, Park et al. 2019, arXiv:1904.05068). A row's representation is the mean of a layer's states where its completion
is predicted, in the last pair of layers. Compared are the distances of every two rows, over their mean, and the angles of every
three: neither depends on how the teacher's space is turned, shifted or scaled, nor on its width. *Rows are those of a
micro-batch*: what is computed apart is never compared. A step's value is the mean over its rows of their micro-batches'
values, so how a step is cut changes which rows are compared, not the size of the term; a row that is computed alone has no
relations, and adds 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgedistill.training.data import Example, PaddedBatch, counter_rng
from edgedistill.training.hidden import Guide, layers_of, relative_error, state_weights
from edgedistill.training.objectives import FeatureTerms, even_pairs
from edgedistill.training.packing import PackedBatch

TINY = 1e-12
"""Of a squared distance: two rows with the same text have none, and its root no gradient."""


class Features(Guide):
    """Compare the states of ``student`` with those of ``teacher`` as ``terms`` say. ``seed`` is that of the matrices' start.

    A matrix between equal widths begins as the identity, any other with random entries of variance 1 / width.
    """

    def __init__(
        self, teacher: Any, student: Any, terms: FeatureTerms, *, tokens: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        pairs = terms.pairs or even_pairs(len(layers_of(teacher)), len(layers_of(student)))
        super().__init__(teacher, pairs, tokens=tokens)
        self.terms, self.projections = terms, self._matrices(terms, teacher.config.hidden_size, student, seed)

    def _matrices(self, terms: FeatureTerms, above: int, student: Any, seed: int) -> list[torch.nn.Parameter]:
        """Make the matrix of each pair of layers, from the student's width to ``above``, as far as they are needed."""
        below = student.config.hidden_size
        needed = terms.weight and (above != below or terms.project)
        return [_start(above, below, seed, at) for at in range(len(self.pairs))] if needed else []

    def to(self, device: Any, dtype: torch.dtype) -> None:
        super().to(device, dtype)
        self.projections = [torch.nn.Parameter(matrix.data.to(device)) for matrix in self.projections]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"projection.{at}": matrix for at, matrix in enumerate(self.projections)}

    def sums(
        self, batch: PackedBatch | PaddedBatch, examples: Sequence[Example], *, read: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return the sums of ``features`` over tokens (the mean of the pairs of layers), and of ``distances`` and ``angles`` over
        rows (of the last pair), as far as they are used.
        """
        if read:
            self.read(batch)
        states = [(self._students[at], self._teachers[of_teacher]) for of_teacher, at in self.pairs]
        return self._sums(batch, examples, states, self.projections)

    def of_itself(self, batch: PackedBatch | PaddedBatch, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the same sums for a student that is its own teacher: all of them have to be 0."""
        return self._sums(batch, examples, [(self._students[at], self._students[at]) for _, at in self.pairs], [])

    def _sums(
        self,
        batch: PackedBatch | PaddedBatch,
        examples: Sequence[Example],
        states: Sequence[tuple[torch.Tensor, torch.Tensor]],
        projections: Sequence[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        if self.terms.weight:
            weights = state_weights(batch).to(states[0][0].device)
            total = torch.zeros((), device=weights.device)
            for at, (student, teacher) in enumerate(states):
                turned = student.float() @ projections[at].T if projections else student.float()
                total = total + (state_errors(turned, teacher.float(), self.terms.distance) * weights).sum()
            found["features"] = total / len(states)
        if self.terms.distances or self.terms.angles:
            sizes = [len(one.completion_ids) for one in examples]
            student, teacher = (row_means(batch.select(one).float(), sizes) for one in states[-1])
            related = relations(student, teacher)
            found |= {name: related[name] * len(sizes) for name in self.terms.weights if name in related}
        return found


def _start(above: int, below: int, seed: int, at: int) -> torch.nn.Parameter:
    """Make the matrix [above, below] of a pair of layers as it is before the first step, float32."""
    if above == below:
        return torch.nn.Parameter(torch.eye(above))
    drawn = counter_rng("projection", seed, at).standard_normal((above, below), dtype="float32")
    return torch.nn.Parameter(torch.from_numpy(drawn) / below**0.5)


def state_errors(student: torch.Tensor, teacher: torch.Tensor, distance: str) -> torch.Tensor:
    """Return how far states [..., H] are from the teacher's, each: ``mse`` over the teacher's mean square, or 1 - cosine."""
    if distance == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
    return relative_error(student, teacher)


def row_means(states: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the mean of each row's states [sum of sizes, H]: [rows, H]."""
    counts = torch.tensor(sizes, device=states.device)
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=states.device), counts)
    return states.new_zeros(len(sizes), states.shape[1]).index_add(0, rows, states) / counts[:, None]


def relations(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the Huber losses of relative distances and of angles between the rows of [rows, H], whose widths may differ: means
    over all pairs and triples of rows; 0 where there are none.
    """
    found = {name: student.new_zeros(()) for name in ("distances", "angles")}
    count = len(student)
    if count < 2:
        return found
    huber = torch.nn.functional.smooth_l1_loss
    apart = ~torch.eye(count, dtype=torch.bool, device=student.device)
    (far, between), (want, want_between) = _differences(student, apart), _differences(teacher, apart)
    found["distances"] = huber(far[apart] / far[apart].mean(), want[apart] / want[apart].mean())
    if count > 2:
        triples = apart[:, :, None] & apart[:, None, :] & apart[None, :, :]  # corner, and the rows that it looks at
        angles, want_angles = (torch.einsum("jid,jkd->jik", one, one)[triples] for one in (between, want_between))
        found["angles"] = huber(angles, want_angles)
    return found


def _differences(rows: torch.Tensor, apart: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances between rows [rows, rows], and the unit vectors from each to each [rows, rows, H]."""
    between = rows[None, :, :] - rows[:, None, :]
    far = between.square().sum(-1).clamp_min(TINY).sqrt()
    return far, between / far[:, :, None]
