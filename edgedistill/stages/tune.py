"""tune: train the norms of a quantized student towards the student that it was made from.

In: the quantized GGUF, the merged student, rows that neither was taught. Out: ``model.gguf``, the same file with other
norms, or the very same where rows held out say that tuning did not help; ``log/train.jsonl``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Tune(Stage):
    """Tune one file. Two targets that want the same file share it."""

    name: ClassVar[str] = "tune"
    deterministic: ClassVar[bool] = False
    quantized: Key
    student: Key
    rows_digest: str
    training: Mapping[str, Any]
    seed: int
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Dequantize, train, write the norms back."""
        from edgedistill.formats.gguf.dequantize import gguf_to_hf
        from edgedistill.formats.gguf.norms import replace_norms
        from edgedistill.training.norms import tune_norms
        from edgedistill.training.recipe import encode_rows, train_settings

        source, out = ctx.path(self.quantized, "model.gguf"), ctx.out / "model.gguf"
        student, dequantized = ctx.path(self.student, "model"), ctx.work / "dequantized"
        if not dequantized.exists():
            gguf_to_hf(source, dequantized)
        tuned = tune_norms(
            dequantized,
            student,
            encode_rows(self.rows, student),
            settings=train_settings(self.training, seed=self.seed),
            work=ctx.work / "training",
            progress=ctx.progress,
        )
        if tuned.helped:
            shutil.copyfile(source, out)
            replace_norms(out, {name: value.numpy() for name, value in tuned.norms.items()})
        else:
            os.link(source, out)
        (ctx.out / "log").mkdir()
        shutil.copyfile(ctx.work / "training" / "log.jsonl", ctx.out / "log" / "train.jsonl")
        return {"train": tuned.result.to_json(), "tune": tuned.to_json(), "size": out.stat().st_size}
