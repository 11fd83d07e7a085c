"""Conversations that a model writes itself, user and all: general text for calibration, where nobody has any.

Weights that are rounded by what they give on one task's text alone give up the rest: SmolLM2-135M in Q4_0, rounded with feedback
by 6,800 tokens of requests and calls, had 0.17 of llama.cpp's KLD on such requests and 0.69 of it on ordinary chat; with 64
conversations of its own beside them, 0.24 and 0.45 (one model, 48 rows of each). A model that is shown the beginning of a user's
turn and nothing else writes what it takes for one (Magpie, Xu et al. 2024, arXiv:2406.08464), and its own text calibrates about as
well as real text does (Williams et al. 2024, arXiv:2410.17170). It is drawn at a low temperature: at 1 a small model drifts off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedistill.evals.runners.base import Progress

if TYPE_CHECKING:
    from edgedistill.evals.runners.gguf import GgufRunner, Pick

FILE = "general.json"
"""What a step keeps them in: token ids of each, and how many of them are the prompt's."""
TEMPERATURE = 0.8
USER, ANSWER = 48, 96
"""Tokens of a turn, at most. A user's turn that does not end by then is closed there."""


def own_conversations(
    runner: GgufRunner, count: int, *, seed: int = 0, progress: Progress | None = None
) -> tuple[list[list[int]], list[int]]:
    """Return the token ids of ``count`` conversations of one turn each, and how many of them are the prompt's. Empty ones are left
    out. A model without a chat template writes plain text.
    """
    start, rest = runner.around_user()
    users = _written(runner, [start] * count, USER, [seed, 0], progress)
    prompts = [[*start, *tokens, *rest] for tokens, _ in users if tokens]
    answers = _written(runner, prompts, ANSWER, [seed, 1], progress)
    end = runner.end_token()
    rows = [
        [*prompt, *tokens, *([end] if ended else [])] for prompt, (tokens, ended) in zip(prompts, answers, strict=True)
    ]
    return rows, [len(prompt) for prompt in prompts]


def read_conversations(path: Path | None) -> tuple[list[list[int]], list[int]]:
    """Return what a step kept in ``FILE``, as ``own_conversations`` does; none of no path."""
    if path is None:
        return [], []
    found = json.loads(path.read_text())
    return found["tokens"], found["starts"]


def _written(
    runner: GgufRunner, prompts: Sequence[Sequence[int]], most: int, seed: list[int], progress: Progress | None
) -> list[tuple[list[int], bool]]:
    """Continue each prompt by draws; return the tokens, and whether the model ended there."""
    found: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    done = 0

    def take(index: int, tokens: Sequence[int], finish: str) -> None:
        nonlocal done
        found[index], done = (list(tokens), finish == "stop"), done + 1
        if progress is not None:
            progress(done, len(prompts), "conversations")

    runner.write(prompts, max_new_tokens=most, on_end=take, pick=_draw(seed))
    return found


def _draw(seed: list[int]) -> Pick:
    """Return a way to choose tokens: each by a random number of its own place, whatever is beside it in the batch."""

    def pick(places: Sequence[tuple[int, int]], logits: np.ndarray) -> list[int]:
        chosen = []
        for (index, written), row in zip(places, logits, strict=True):
            sums = np.exp((row - row.max()) / TEMPERATURE, dtype=np.float64).cumsum()
            uniform = np.random.default_rng([*seed, index, written]).random()
            chosen.append(int(np.searchsorted(sums, uniform * sums[-1], side="right")))
        return chosen

    return pick
