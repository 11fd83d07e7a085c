"""speculate: what a draft model brings beside the artifact that it serves, on this machine.

In: the artifact, the quantized draft, prompts of a suite. Out: ``drafting.json``: acceptance, tokens a check, and the speed of
whole answers and of decoding with the draft over that without, turn by turn in one session. Both must say the same, token by
token. Cached as `measure` is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.kv_cache import F16, Pair, types_of
from edgedistill.step import Context, Stage, later, unkeyed


@dataclass(frozen=True, kw_only=True)
class Speculate(Stage):
    """Answer prompts with a draft of up to ``tokens`` tokens a time, and without."""

    name: ClassVar[str] = "speculate"
    deterministic: ClassVar[bool] = False
    model: Key
    draft: Key
    tokens: int
    min_probability: float
    max_new_tokens: int
    threads: int
    context: int
    device: str  # digest of the host's fingerprint
    build: str
    prompts_digest: str
    kv: Pair | Key = later(F16)  # types of the model's KV cache, or the step that chose them
    prompts: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Measure; once more where the machine was noisy."""
        from edgedistill.devices.drafting import measure_draft
        from edgedistill.devices.protocol import Settings, again_if_noisy

        found = again_if_noisy(
            lambda: measure_draft(
                ctx.path(self.model, "model.gguf"),
                ctx.path(self.draft, "model.gguf"),
                Settings(
                    threads=self.threads,
                    context=self.context,
                    answer_tokens=self.max_new_tokens,
                    kv=types_of(ctx, self.kv),
                ),
                prompts=[[dict(message) for message in row.messages] for row in self.prompts],
                tokens=self.tokens,
                min_probability=self.min_probability,
                progress=ctx.progress,
            ),
            ctx.note,
        )
        facts = found.to_json()
        (ctx.out / "drafting.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
        return {"drafting": facts, "tokens": self.tokens, "min_probability": self.min_probability}
