"""generate, where the answers are labels and the teacher's weights are here: it writes nothing, each label has a probability.

In: teacher (a checkpoint or a GGUF file), prompts. Out: ``rows.jsonl``, as of any teacher: one line a prompt, whose text is a JSON
object of the labels' probabilities. Nothing of it is drawn, so that there is nothing to keep in the row store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgedistill.data.prompts import guided
from edgedistill.stages.generate import Generate
from edgedistill.step import Context


@dataclass(frozen=True, kw_only=True)
class LabelLikelihoods(Generate):
    """Take the probability of each of ``labels`` as a whole answer, over the sum of all."""

    labels: tuple[str, ...]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prove the teacher, read each prompt once."""
        from edgedistill.evals.labels import DIGITS, label_probabilities
        from edgedistill.evals.runners import open_runner

        self._prove(ctx)
        rows = [replace(row, messages=tuple(guided(row.messages, row.guidance))) for row in self.to_ask(ctx)]
        if self.pilot is not None:
            self._tell(ctx, len(rows))
        file = self._file(ctx)
        runner = open_runner(file if file.is_file() else ctx.path(self.teacher, "model"), threads=ctx.threads)
        try:
            found = label_probabilities(runner, rows, self.labels, progress=ctx.progress)
        finally:
            runner.close()
        with (ctx.out / "rows.jsonl").open("w") as out:
            for row, shares in zip(rows, found.tolist(), strict=True):
                said = {name: round(share, DIGITS) for name, share in zip(self.labels, shares, strict=True)}
                text = json.dumps(said, ensure_ascii=False)
                line = {"id": row.id, "row": "", "sample": 0, "text": text, "finish": "stop", "logprob": 0.0}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        return {"rows": len(rows), "asked": len(rows), "from_store": 0, "tokens": 0}
