"""Several teachers with one tokenizer as one: at every place their distributions are mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from edgedistill.errors import UsageError
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.data import Example


class MixedTeacher(TransformersTeacher):
    """Score text by a mixture of checkpoints: p = sum of w_k p_k. ``average``: the weights are even; ``confidence``: each teacher's
    is its greatest probability at the place, over the sum of all. All are in memory at once. Raises UsageError where tokens differ.
    """

    def __init__(self, models: Sequence[Path], *, combine: Literal["average", "confidence"]) -> None:
        super().__init__(models[0])
        self.combine, self.others = combine, [TransformersTeacher(one) for one in models[1:]]
        for one in self.others:
            if one.tokenizer_hash != self.tokenizer_hash:
                raise UsageError(
                    f"{one.model_dir} and {self.model_dir} have different tokenizers: their distributions cannot be mixed",
                    "leave score.combine out",
                )
        self.vocab_size = min(one.vocab_size for one in (self, *self.others))
        for one in self.others:
            one.vocab_size = self.vocab_size
        self.context = min(one.context for one in (self, *self.others))

    def completion_logits(self, part: Sequence[Example]) -> tuple[int, Callable[[int, int], torch.Tensor]]:
        """Run all teachers forward; their logits are the logarithm of the mixture, float32."""
        every = [super().completion_logits(part), *(one.completion_logits(part) for one in self.others)]

        def logits(low: int, high: int) -> torch.Tensor:
            logp = torch.stack([torch.log_softmax(of(low, high).float(), dim=-1) for _, of in every])
            sure = logp.amax(dim=-1) if self.combine == "confidence" else torch.zeros(logp.shape[:2])
            weights = torch.log_softmax(sure.to(logp.device), dim=0)
            return torch.logsumexp(logp + weights[..., None], dim=0)

        return every[0][0], logits
