"""Whether a student that was taught to think still does: the first words of a few of its answers tell.

Thinking collapses where the block is cheap to leave empty: the loss of a short empty block is small, and the answer's tokens
may be guessed without it. A gate at the end of training, because a student
that stopped thinking scores like one that never did, and nothing else would say why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.data.thinking import BLOCKS, COLLAPSED, LEAST_WORDS, share_of_empty, split
from edgedistill.errors import StepFailed
from edgedistill.jsonl import json_lines
from edgedistill.training.quiet import quiet

OPENINGS = tuple(opening for opening, _ in BLOCKS.values())
ROWS = 16
TOKENS = 24
"""Enough to see more than LEAST_WORDS words of a block, or that it was closed before."""
assert TOKENS > 4 * LEAST_WORDS


def watch_thinking(
    kept: Path, source: Path, result: Any, *, text: str, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Let the trained student begin its answers to a few of the kept prompts, where these texts think.

    ``source`` is the student before training, ``result`` what ``train`` returned. Returns {} where the texts have no blocks, else
    how many answers began and how many of the blocks are empty. Raises StepFailed where most are, and the texts' are not.
    """
    rows = [json.loads(line) for line in json_lines(kept)]
    rows = [row for row in rows if row[text]]
    taught = [row[text] for row in rows]
    if not taught or share_of_empty(taught) > COLLAPSED or any(split(one).after for one in taught):
        return {}  # nothing to watch, or a block that a short beginning does not reach: evaluations tell
    # Where the chat template opens the block in the prompt, texts only close it: the begun ones do neither.
    opening = "" if any(one.lstrip().startswith(OPENINGS) for one in taught) else OPENINGS[0]
    from edgedistill.teachers.protocol import Sampling
    from edgedistill.teachers.transformers import TransformersTeacher

    count = min(ROWS, len(rows))
    some = [rows[at * len(rows) // count] for at in range(count)]
    progress(0, 1, "watching whether it still thinks")
    student = TransformersTeacher(source, model=_trained(source, result))
    prompts = [row["messages"] for row in some]
    if any("tools" in row for row in some):
        prompts = student.encode(prompts, [row["id"] for row in some], tools=[row.get("tools", ()) for row in some])
    begun = student.generate(prompts, sampling=Sampling(max_new_tokens=TOKENS))
    empty = share_of_empty([opening + answer.text for answer in begun])
    if empty > COLLAPSED:
        raise StepFailed(
            f"thinking has collapsed: {round(empty * count)} of {count} answers of the trained student begin without a thought "
            f"(of the texts that it learnt from: {share_of_empty(taught):.0%})",
            "raise distill.think_weight, take out short traces ([[filter]] kind = 'thinking'), or train longer",
        )
    return {"thinking": {"n": count, "empty": empty}}


def _trained(source: Path, result: Any) -> Any:
    """Load what ``train`` left: a checkpoint of its own, or the student with its adapter merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet():
        if result.path.name == "model":
            return AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
        base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        adapted: Any = PeftModel.from_pretrained(base, str(result.path))
        return adapted.merge_and_unload()
