"""measure: how fast one artifact runs on this machine, beside the teacher's f16 in the same session.

In: an artifact, the baseline, settings, the device's fingerprint. Out: ``measurement.json``. Speed is cached per
device; a ratio is always taken in one session, interleaved. A noisy run, of either, is repeated; what stays noisy is stored
as noisy and shown so (``--remeasure`` takes it again)."""

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
class Measure(Stage):
    """Measure pp512, tg128, TTFT, memory and the decode ratio to the baseline."""

    name: ClassVar[str] = "measure"
    deterministic: ClassVar[bool] = False
    model: Key
    file: str
    baseline: Key | None
    threads: int
    context: int
    device: str  # digest of the host's fingerprint
    build: str
    prompts_digest: str
    kv: Pair | Key = later(F16)  # types of the KV cache, or the step that chose them
    prompts: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Measure; then measure the ratio."""
        from edgedistill.devices.local import Settings, measure, measure_ratio
        from edgedistill.devices.protocol import again_if_noisy

        settings = Settings(threads=self.threads, context=self.context, kv=types_of(ctx, self.kv))
        artifact = ctx.path(self.model, self.file)
        prompts = [[dict(message) for message in row.messages] for row in self.prompts]
        speed = again_if_noisy(lambda: measure(artifact, settings, prompts=prompts, progress=ctx.progress), ctx.note)
        facts: dict[str, Any] = {"measurement": speed.to_json()}
        if self.baseline is not None:
            beside = ctx.path(self.baseline, "model.gguf")
            facts["ratio"] = again_if_noisy(lambda: measure_ratio(artifact, beside, settings), ctx.note).to_json()
        (ctx.out / "measurement.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
        return facts
