"""converse: the model that is to be quantized writes conversations, the general share of what it is calibrated on.

In: a full-precision GGUF. Out: ``general.json``: token ids of each conversation, and how many of them are the prompt's. Shared by
every target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Converse(Stage):
    """Let the model write ``count`` conversations, by draws."""

    name: ClassVar[str] = "converse"
    deterministic: ClassVar[bool] = False
    model: Key
    count: int
    tool: str

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Write the user's turns, then the answers."""
        from edgedistill.evals.own_text import FILE, own_conversations
        from edgedistill.evals.runners.gguf import GgufRunner

        with GgufRunner(ctx.path(self.model, "model.gguf"), threads=ctx.threads) as runner:
            rows, starts = own_conversations(runner, self.count, progress=ctx.progress)
        if not rows:
            raise StepFailed(
                "the model writes no conversation of its own: it ends before the first word",
                "set calibrate.general = 0, or leave --general out",
            )
        (ctx.out / FILE).write_text(json.dumps({"tokens": rows, "starts": starts}))
        return {"conversations": len(rows), "tokens": sum(map(len, rows))}
