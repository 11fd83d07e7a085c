"""sensitivity of an ONNX target: predict what each kind would cost in each matrix that the builder makes of a model.

In: the merged checkpoint, kept rows or plain text. Out: ``table.json`` (bytes and predicted KLD by matrix and kind, the bytes of
what no kind changes), ``text.json`` (what was run). Shared by every ONNX target.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class SensitivityOnnx(Stage):
    """Take gradients on the answers of the first ``rows`` kept conversations, or on all of ``text`` where there are none."""

    name: ClassVar[str] = "sensitivity-onnx"
    version: ClassVar[int] = 2  # 2: tokens are drawn by what their gradients add
    deterministic: ClassVar[bool] = False
    checkpoint: Key
    kept: Key | None
    text: tuple[str, ...]
    rows: int
    tool: str

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Build in 4 bits, to know the matrices; encode, take gradients, round every matrix to every kind."""
        from edgedistill.evals.calibration_text import encode_for_checkpoint
        from edgedistill.formats.onnx.build import build
        from edgedistill.formats.onnx.rounding import task_rows
        from edgedistill.formats.onnx.sensitivity import measure

        source, built = ctx.path(self.checkpoint, "model"), ctx.work / "onnx"
        kept = ctx.path(self.kept, "kept.jsonl") if self.kept else None
        rows = task_rows(source, *encode_for_checkpoint(source, kept, self.rows, self.text))
        shutil.rmtree(built, ignore_errors=True)
        build(source, built, "int4", progress=ctx.progress)
        report = measure(built, source, rows, ctx.out, threads=ctx.threads, progress=ctx.progress)
        shutil.rmtree(built)
        return {"sensitivity": report.to_json()}
