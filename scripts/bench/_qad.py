"""What the benches of quantization-aware distillation share: text that a model writes itself, and a file that is trained by it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Row
from edgedistill.evals.own_text import own_conversations
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.norms import replace_norms
from edgedistill.formats.gguf.repack import replace_codes
from edgedistill.recipe_tune import Tune
from edgedistill.training.quantized import TunedWeights, read_trained, tune_weights
from edgedistill.training.recipe import encode_rows, train_settings


def own_chat(path: Path, count: int, *, seed: int = 0) -> list[Row]:
    """Let a chat model write ``count`` questions and its answers to them, as rows: other text than a task's, in its own words."""
    with GgufRunner(path) as runner:
        before, behind = runner.around_user()
        rows = []
        for number, (tokens, begun) in enumerate(zip(*own_conversations(runner, count, seed=seed), strict=True)):
            asked, told = (
                runner.text(part).strip() for part in (tokens[len(before) : begun - len(behind)], tokens[begun:])
            )
            if asked and told:
                rows.append(Row(id=f"own-{number}", messages=({"role": "user", "content": asked},), reference=told))
    return rows


def distil(
    start: Path,
    checkpoint: Path,
    out: Path,
    rows: Sequence[Row],
    other: Sequence[Row],
    folder: Path,
    *,
    seed: int = 0,
    **changes: Any,
) -> TunedWeights:
    """Train the blocks of ``start`` towards ``checkpoint`` and write ``out``, as the tune step does; ``changes`` are to ``[tune]``.

    What did not help is written too, as it started.
    """
    given = {"targets": ["bench"], "files": ["-"], "parts": "weights", "general": {"files": ["-"]}, "epochs": 2.0}
    table = Tune.model_validate({**given, **changes})
    gguf_to_hf(start, folder / "dequantized")
    tuned = tune_weights(
        start,
        folder / "dequantized",
        checkpoint,
        encode_rows(rows, checkpoint),
        encode_rows(other, checkpoint),
        settings=train_settings(table.keyed("targets", "files", "rows", "skip", "general"), seed=seed),
        worse=1.0,
        work=folder / "training",
    )
    shutil.copyfile(start, out)
    if tuned.helped:
        matrices, norms = read_trained(tuned.folder)
        replace_codes(out, matrices)
        replace_norms(out, norms)
    for name in ("dequantized", "training"):
        shutil.rmtree(folder / name)
    return tuned
