"""What a quantized KV cache costs at the context length that a target promises: distributions at the end of rows as long as that.

Errors of cached keys and values add up over the tokens that attend to them, so short prompts show little of them (KIVI,
arXiv:2402.02750). Both caches read the same rows, on the same file. A file of quantized weights rounds its activations too, and
then any two ways of computing part a little: how much is measured beside it, as f16 without flash attention against f16 with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.kv_cache import F16, Pair, told

LAST = 128
"""Tokens at the end of each row that count."""
READ = 16384
"""Tokens that all rows are to have together: at 2,048 tokens 8 rows. Never less than MIN_ROWS: their spread is the interval."""
MIN_ROWS, MAX_ROWS = 4, 16


def rows_for(context: int) -> int:
    """Return how many rows of ``context`` tokens are read."""
    return max(MIN_ROWS, min(MAX_ROWS, READ // context))


def long_rows(texts: Sequence[Sequence[int]], length: int, count: int) -> list[list[int]]:
    """Put ``count`` rows of ``length`` tokens together from shorter texts, each beginning with another text. Texts come again where
    there are too few. Raises UsageError where there are none.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError("no text to fill the context with", "give prompts, or --calibration FILE")
    rows = []
    for number in range(count):
        row: list[int] = []
        at = number * len(texts) // count
        while len(row) < length:
            row += texts[at % len(texts)]
            at += 1
        rows.append(row[:length])
    return rows


def compare_caches(
    path: Path,
    texts: Sequence[Sequence[int]],
    context: int,
    kv: Pair,
    *,
    threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Return KL(f16 || ``kv``) in nats a token and the share of equal first choices, over the last tokens of rows that fill the
    context, or the model's own where that is shorter; and the KLD that rounding alone makes there.

    ``texts`` are token ids. Raises StepFailed where a distribution is not finite.
    """
    import numpy as np

    from edgedistill.evals.likelihood import kl_divergence
    from edgedistill.evals.runners.gguf import GgufRunner
    from edgedistill.evals.statistics import clustered_mean, clustered_proportion

    with GgufRunner(path, threads=threads) as runner:
        length = min(context, runner.context_limit)
        rows, count = long_rows(texts, length, rows_for(length)), min(LAST, length // 2)
        sums: dict[str, list[float]] = {"kld": [], "rounding": []}
        agree: list[float] = []
        ways = {"f16": (F16, True), "kld": (kv, True), "rounding": (F16, False)}
        found = (runner.last_logprobs(rows, count, kv=types, flash=flash) for types, flash in ways.values())
        for done, (whole, ours, unflashed) in enumerate(zip(*found, strict=True), 1):
            for name, other in (("kld", ours), ("rounding", unflashed)):
                each, same = kl_divergence(whole, other)
                if not np.all(np.isfinite(each)):
                    raise StepFailed(
                        f"{path}: with a KV cache in {told(kv)} a distribution is not finite",
                        'set runtime.kv_cache = "f16"',
                    )
                sums[name].append(float(each.sum()))
                if name == "kld":
                    agree.append(float(same.sum()))
            if progress is not None:
                progress(done, len(rows), f"KV cache in {told(kv)}, {length} tokens")
    counts = [count] * len(rows)
    kld, error = clustered_mean(sums["kld"], counts)
    return {
        "context": length,
        "rows": len(rows),
        "tokens": sum(counts),
        "text": min(sum(map(len, texts)), length * len(rows)),  # fewer than the rows have: texts came again
        "kld": kld.to_json(),
        "standard_error": error,
        "top1": clustered_proportion(agree, counts).to_json(),
        "rounding": clustered_mean(sums["rounding"], counts)[0].to_json(),
    }
