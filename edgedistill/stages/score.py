"""score: the teacher's distribution over the next token, at every kept token.

In: teacher checkpoint, kept rows. Out: ``targets.parquet``: per position n random draws with counts and log-probability (RS-KD,
"Sparse Logit Sampling", ACL 2025), or the top n and the tail as one bucket. Another student, filter order or loss weight asks the
teacher nothing anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Draw soft targets of the kept text from the teacher."""

    name: ClassVar[str] = "score"
    deterministic: ClassVar[bool] = False
    teacher: Key
    kept: Key
    kind: str
    n: int
    temperature: float
    seed: int

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run the teacher forward over the kept rows, shard by shard."""
        from edgedistill.training.data import load_kept
        from edgedistill.training.score import score_to_parquet

        examples, tokenizer = load_kept(ctx.path(self.kept, "kept.jsonl"), ctx.path(self.teacher, "model"))
        return score_to_parquet(
            ctx.path(self.teacher, "model"),
            examples,
            tokenizer,
            out=ctx.out / "targets.parquet",
            work=ctx.work,
            revision=ctx.entries[self.teacher].digest,
            kind=self.kind,
            n=self.n,
            temperature=self.temperature,
            seed=self.seed,
            threads=ctx.threads,
            progress=ctx.progress,
        )
