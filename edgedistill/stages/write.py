"""write: the artifact that ships answers prompts, for its draft to learn from.

In: a quantized GGUF, prompts. Out: ``kept.jsonl``, as `filter` writes it. A draft is right where it says what this file says, so
that is what it is taught: greedy, by the runtime that ships, right or wrong. Answers that did not end are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Write(Stage):
    """Answer every row once."""

    name: ClassVar[str] = "write"
    model: Key
    rows_digest: str
    max_new_tokens: int
    build: str
    isa: str
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Answer, keep what ended."""
        from edgedistill.evals.runners.gguf import GgufRunner

        with GgufRunner(ctx.path(self.model, "model.gguf"), threads=ctx.threads) as runner:
            answers = runner.answer(self.rows, max_new_tokens=self.max_new_tokens, progress=ctx.progress)
        kept = [(row, answer) for row, answer in zip(self.rows, answers, strict=True) if answer.finish == "stop"]
        if not kept:
            raise StepFailed(
                f"none of {len(answers)} answers of the quantized student ended within {self.max_new_tokens} tokens",
                "raise generate.max_new_tokens, or look at the student's answers first: it is not ready for a draft",
            )
        with (ctx.out / "kept.jsonl").open("w") as file:
            for row, answer in kept:
                line = {"id": row.id, "messages": list(row.messages), "text": answer.text, "reference": None}
                line |= {"tools": list(row.tools)} if row.tools else {}
                line |= {"trace": row.trace} if row.trace else {}
                file.write(json.dumps({**line, "source": "student", "row": ""}, ensure_ascii=False) + "\n")
        return {"rows": len(answers), "kept": len(kept), "tokens": sum(answer.tokens for _, answer in kept)}
