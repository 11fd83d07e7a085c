"""Prove the hop from a full-precision GGUF file to a quantized one: what the one says of some text, the other says nearly.

That a file loads and computes proves little: a type that is too coarse for a model, or feedback that went wrong, makes a file
that runs and babbles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.evals.likelihood import LOST, kl_divergence, lost_kld
from edgedistill.evals.runners.base import Progress
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.runners.kept import KeptRunner

ROWS = 4
MOST_TOKENS = 48  # of each text, its last ones: the user's words, and the answer where there is one


@dataclass(frozen=True, kw_only=True)
class QuantizedHop:
    """Hold how far a quantized file is from the one that it was made from: KLD in nats a token, share of equal first choices.

    ``limit`` is the KLD above which it is refused.
    """

    texts: int
    tokens: int
    kld: float
    kld_max: float
    top1: float
    limit: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def told(self) -> str:
        """Return it as a line."""
        return (
            f"KLD {self.kld:.3g} nats a token from the file that it was made from, first choices alike {self.top1:.0%} "
            f"(n = {self.tokens} tokens of {self.texts} texts)"
        )


def compare_quantized(
    source: Path, quantized: Path, rows: Sequence[Row], *, store: Path, threads: int, progress: Progress
) -> QuantizedHop:
    """Compare two files on the first few of ``rows``; what ``source`` says is kept in the ``store``'s folder for the next target.

    Raises StepFailed where the quantized file has lost the text.
    """
    with KeptRunner(source, root=store, threads=threads) as whole, GgufRunner(quantized, threads=threads) as other:
        texts = [_tokens(whole, row) for row in rows[:ROWS]]
        positions = [range(max(0, len(ids) - 1 - MOST_TOKENS), len(ids) - 1) for ids in texts]
        every: list[np.ndarray] = []
        klds: list[np.ndarray] = []
        same: list[np.ndarray] = []
        pairs = zip(whole.logprobs(texts, positions), other.logprobs(texts, positions), strict=True)
        for done, (p, q) in enumerate(pairs, 1):
            kld, alike = kl_divergence(p, q)
            every.append(p)
            klds.append(kld)
            same.append(alike)
            progress(done, len(texts), "comparing with full precision")
    together = np.concatenate(klds)
    hop = QuantizedHop(
        texts=len(texts),
        tokens=int(together.size),
        kld=float(together.mean()),
        kld_max=float(together.max()),
        top1=float(np.concatenate(same).mean()),
        limit=LOST * lost_kld(np.concatenate(every)),
    )
    if not hop.kld <= hop.limit:  # nor where it is no number
        raise StepFailed(
            f"{quantized.name}: {hop.kld:.3g} nats a token away from full precision (n = {hop.tokens} tokens, limit "
            f"{hop.limit:.3g}): this is another model",
            "take a type with more bits, or give text to calibrate on; if Q8_0 fails, too, look at the full-precision file",
        )
    return hop


def _tokens(runner: GgufRunner, row: Row) -> list[int]:
    """Return a row as the model reads it: under its chat template where it has one, with the answer where there is one."""
    if runner.has_template():
        ids = runner.encode(row)
    else:
        before, behind = runner.around_user()
        ids = [*before, *runner.encode_text("\n".join(str(one.get("content") or "") for one in row.messages)), *behind]
    ids += runner.encode_text(row.reference) if row.reference else []
    return ids[: runner.context_limit]
