"""On-policy distillation: in a share of the rows the student learns from what it writes itself, judged by the teacher.

Offline text shows the student the teacher's mistakes, not its own: at inference it continues sequences that it was never
trained on. Here the answer to a prompt is drawn from the student as it is at that step, and the teacher's whole distribution
along it is the target (GKD, Agarwal et al. 2024, arXiv:2306.13649). There is no cross-entropy on such text: it is nobody's
reference; that of the other rows counts by their share of the step's tokens. Which rows, and every draw, are functions of
(seed, step, row), so a resumed run writes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from edgedistill.training.data import Example, counter_rng
from edgedistill.training.packing import packed_mode


class Written(Protocol):
    """What a decoder returns for a row: the tokens without the one that ended them, and whether one did."""

    tokens: list[int]
    stopped: bool


Decode = Callable[..., Sequence[Written]]
"""decode(model, prompts, *, stop_ids, max_new_tokens, vocab_size, temperature, uniforms), as in ``teachers/decode.py``."""


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """How the student writes: by which decoder, until which tokens. ``end`` is the token that ends a turn."""

    decode: Decode
    stop_ids: tuple[int, ...]
    end: int
    vocab_size: int

    def write(
        self, model: Any, examples: Sequence[Example], *, seed: int, step: int, most: int, temperature: float
    ) -> list[Example]:
        """Return the examples with completions that the model draws for their prompts, in packed mode.

        ``most`` is the largest number of tokens. The model is left in the mode that it was in.
        """
        uniforms = np.stack(
            [counter_rng("on-policy", seed, step, one.id).random(most, dtype=np.float32) for one in examples]
        )
        training = model.training
        model.eval()
        try:
            # A teacher beside it that reads padded batches has left the packed mode off.
            with torch.no_grad(), packed_mode(model):
                written = self.decode(
                    model,
                    [one.prompt_ids for one in examples],
                    stop_ids=self.stop_ids,
                    max_new_tokens=most,
                    vocab_size=self.vocab_size,
                    temperature=temperature,
                    uniforms=uniforms,
                )
        finally:
            model.train(training)
        return [
            Example(one.id, one.prompt_ids, (*new.tokens, *([self.end] if new.stopped else [])), one.weight)
            for one, new in zip(examples, written, strict=True)
        ]


def chosen(share: float, seed: int, step: int, examples: Sequence[Example]) -> list[bool]:
    """Tell for each row of a step whether the student writes it."""
    return [bool(counter_rng("on-policy row", seed, step, one.id).random() < share) for one in examples]
