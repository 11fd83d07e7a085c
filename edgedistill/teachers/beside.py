"""A served teacher beside the student: what the student writes is sent to the server, which scores it.

Rows that were scored before keep their stored targets: only what is new in a step is asked, each text once. What comes back are the
best tokens and the tail as one bucket, as ``score.kind = "top-k"`` stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.training.data import Example
from edgedistill.training.losses import BatchTargets, batch_targets
from edgedistill.training.targets import SparseTargets
from edgedistill.training.vocabulary import Origin


class ServedTeacher:
    """Give the targets of any rows: stored ones by their tokens, else the server's ``n`` best.

    ``origin`` has the whole tokenizer's numbers of the tokens of a student whose vocabulary was trimmed.
    """

    reads_along: ClassVar[bool] = False
    teacher: Any = None

    def __init__(
        self,
        server: OpenAITeacher,
        examples: Sequence[Example],
        targets: Sequence[SparseTargets],
        *,
        n: int,
        origin: Origin | None = None,
    ) -> None:
        self.server, self.n, self.origin = server, n, origin
        self.known = {one.token_hash: soft for one, soft in zip(examples, targets, strict=True)}

    def to(self, device: Any, dtype: torch.dtype) -> None:
        """Do nothing: there are no weights here."""

    def targets(self, batch: Any, rows: Sequence[int], examples: Sequence[Example]) -> BatchTargets:
        """Return the targets of the examples of a batch, in their order."""
        new = [*{one.token_hash: one for one in examples if one.token_hash not in self.known}.values()]
        read = [one if self.origin is None else self.origin.example(one) for one in new]
        scored = dict(self.server.score(read, kind="top-k", n=self.n)) if read else {}
        asked = {
            one.token_hash: scored[at] if self.origin is None else self.origin.targets(scored[at], read[at])
            for at, one in enumerate(new)
        }
        return batch_targets([self.known.get(one.token_hash) or asked[one.token_hash] for one in examples], 1.0)
