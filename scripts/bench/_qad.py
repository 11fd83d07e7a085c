"""What the benches of quantization-aware distillation share: text that a model writes itself, and a file that is trained by it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.norms import replace_norms
from edgedistill.formats.gguf.repack import replace_codes
from edgedistill.recipe_tune import Tune
from edgedistill.training.quantized import TunedWeights, read_trained, tune_weights
from edgedistill.training.recipe import encode_rows, train_settings


def own_chat(path: Path, count: int, *, seed: int = 0, question: int = 48, answer: int = 96) -> list[Row]:
    """Let a chat model write ``count`` questions and its answers to them: other text than a task's, of its own distribution.

    After the head of a user's turn it writes what users ask (Magpie, Xu et al. 2024, arXiv:2406.08464). Drawn at temperature 1.
    """
    with GgufRunner(path) as runner:
        heads = [runner.encode(Row(id="", messages=({"role": "user", "content": text},))) for text in ("Apple", "Why")]
        same = next(at for at, (one, other) in enumerate(zip(*heads, strict=False)) if one != other)
        asked = _drawn(runner, [heads[0][:same]] * count, question, (seed, 0))
        texts = [runner.text(tokens).strip() for tokens in asked]
        rows = [
            Row(id=f"own-{n}", messages=({"role": "user", "content": text},)) for n, text in enumerate(texts) if text
        ]
        replies = _drawn(runner, [runner.encode(row) for row in rows], answer, (seed, 1))
        pairs = zip(rows, (runner.text(tokens).strip() for tokens in replies), strict=True)
        return [Row(id=row.id, messages=row.messages, reference=text) for row, text in pairs if text]


def _drawn(runner: GgufRunner, prompts: Sequence[list[int]], most: int, key: tuple[int, int]) -> list[Sequence[int]]:
    """Continue prompts by tokens drawn at temperature 1; what is drawn does not depend on what runs beside it."""

    def pick(places: Sequence[tuple[int, int]], logits: np.ndarray) -> np.ndarray:
        draws = np.stack([np.random.default_rng((*key, *place)).gumbel(size=logits.shape[1]) for place in places])
        return (logits + draws).argmax(axis=1)

    found: dict[int, Sequence[int]] = {}

    def end(index: int, tokens: Sequence[int], _finish: Any) -> None:
        found[index] = tokens

    runner.write(prompts, max_new_tokens=most, on_end=end, pick=pick)
    return [found[at] for at in range(len(prompts))]


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
