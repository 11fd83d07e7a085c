"""tune: train the norms of a quantized student, or all its blocks, towards the student that it was made from.

In: the quantized GGUF, the merged student, rows that neither was taught; for blocks, rows of other text too. Out:
``model.gguf``, the same file with other norms, codes and scales, or the very same where rows held out say that tuning did not
help; ``log/train.jsonl``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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
    general: tuple[Row, ...] = unkeyed(default=())  # training["general"] has their digest

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Dequantize, train, write back what was trained."""
        from edgedistill.formats.gguf.dequantize import gguf_to_hf
        from edgedistill.training.recipe import encode_rows, train_settings

        source, out = ctx.path(self.quantized, "model.gguf"), ctx.out / "model.gguf"
        student, dequantized = ctx.path(self.student, "model"), ctx.work / "dequantized"
        if not dequantized.exists():
            gguf_to_hf(source, dequantized)
        rows, settings = encode_rows(self.rows, student), train_settings(self.training, seed=self.seed)
        make: Any = self._weights if self.training.get("parts") == "weights" else self._norms
        tuned, write = make(ctx, source, dequantized, student, rows, settings)
        if tuned.helped:
            shutil.copyfile(source, out)
            write(out)
        else:
            os.link(source, out)
        (ctx.out / "log").mkdir()
        shutil.copyfile(ctx.work / "training" / "log.jsonl", ctx.out / "log" / "train.jsonl")
        return {"train": tuned.result.to_json(), "tune": tuned.to_json(), "size": out.stat().st_size}

    def _norms(
        self, ctx: Context, source: Path, dequantized: Path, student: Path, rows: list[Any], settings: Any
    ) -> tuple[Any, Callable[[Path], Any]]:
        """Train the norms; return what came of it, and what writes them into a file."""
        from edgedistill.formats.gguf.norms import replace_norms
        from edgedistill.training.norms import tune_norms

        work = ctx.work / "training"
        tuned = tune_norms(dequantized, student, rows, settings=settings, work=work, progress=ctx.progress)
        return tuned, lambda out: replace_norms(out, {name: value.numpy() for name, value in tuned.norms.items()})

    def _weights(
        self, ctx: Context, source: Path, dequantized: Path, student: Path, rows: list[Any], settings: Any
    ) -> tuple[Any, Callable[[Path], Any]]:
        """Train the blocks; return what came of it, and what packs them into a file."""
        from edgedistill.formats.gguf.norms import replace_norms
        from edgedistill.formats.gguf.repack import replace_codes
        from edgedistill.training.quantized import read_trained, tune_weights
        from edgedistill.training.recipe import encode_rows

        tuned = tune_weights(
            source,
            dequantized,
            student,
            rows,
            encode_rows(self.general, student),
            settings=settings,
            worse=self.training["general"]["worse"],
            work=ctx.work / "training",
            progress=ctx.progress,
        )

        def write(out: Path) -> None:
            matrices, norms = read_trained(tuned.folder)
            replace_codes(out, matrices)
            replace_norms(out, norms)

        return tuned, write
