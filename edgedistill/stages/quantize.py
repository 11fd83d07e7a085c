"""quantize: one converted (GGUF) or merged (ONNX) model to the types a target asks for.

In: the f16 GGUF, the importance matrix and the text it was measured on, for type "auto" the types that ``allocate`` chose; or
the merged checkpoint for ONNX, with kept rows or plain text where codes are rounded on it. Out:
``model.gguf``, or ``onnx/``. Gate on the hop: the file is complete, loads, and says nearly what the one says that it was made from;
an ONNX builder's exit code proves nothing, so its model is run beside transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, later, unkeyed

_TEXTS = 32  # that the KLD of a file with types of its own is measured on


@dataclass(frozen=True, kw_only=True)
class Quantize(Stage):
    """Quantize one model. Two targets that ask for the same types share the entry."""

    name: ClassVar[str] = "quantize"
    model: Key
    calibration: Key | None
    format: str
    type: str
    embedding_type: str | None
    output_type: str | None
    rounding: str
    tool: str
    types: Key | None = later(None)
    sensitivity: Key | None = later(None)
    block: int = later(32)
    symmetric: bool = later(True)
    accuracy: int = later(4)
    kept: Key | None = later(None)
    text: tuple[str, ...] = later(())
    calibrated: int = later(0)
    imported: bool = later(False)  # F16 of a file that convert did not write: it may be in any full precision
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Quantize, check, say what fell back."""
        if self.format == "onnx":
            return self._onnx(ctx)
        from edgedistill.formats.gguf.quantize import named_after, quantize
        from edgedistill.formats.gguf.quantize_check import compare_quantized

        source, out = ctx.path(self.model, "model.gguf"), ctx.out / "model.gguf"
        if self.type == "F16" and not self.imported:  # what convert wrote already
            os.link(source, out)
            return {"size": out.stat().st_size, "type": "F16"}
        types = json.loads(ctx.path(self.types, "types.json").read_text()) if self.types else None
        imatrix = ctx.path(self.calibration, "imatrix.gguf") if self.calibration else None
        if self.sensitivity:
            imatrix = ctx.path(self.sensitivity, "imatrix.gguf")
        feedback = None
        if self.rounding == "gptq" and self.calibration:
            feedback = json.loads(ctx.path(self.calibration, "tokens.json").read_text())
        report = quantize(
            source,
            out,
            named_after(types) if types else self.type,
            imatrix=imatrix,
            embedding_type=self.embedding_type,
            output_type=self.output_type,
            types=types,
            feedback=feedback,
            store=ctx.store,
            threads=ctx.threads,
            progress=ctx.progress,
        )
        facts = {
            "quantize": report.to_json(),
            "size": out.stat().st_size,
            "type": self.type,
            "reused": report.reused > 0,
        }
        if self.rows:
            hop = compare_quantized(source, out, self.rows, store=ctx.store, threads=ctx.threads, progress=ctx.progress)
            facts["hop"] = hop.to_json()
        return facts | ({"measured": self._measured(ctx, source, out)} if self.sensitivity else {})

    def _measured(self, ctx: Context, source: Path, out: Path) -> dict[str, Any]:
        """Return the KLD of the file from the one that it was made from, beside the one that was predicted: on text that types were
        chosen by, so that it tells whether predictions hold, and not what other text will show.
        """
        from edgedistill.evals.likelihood import text_divergence
        from edgedistill.evals.runners.gguf import GgufRunner
        from edgedistill.evals.runners.kept import KeptRunner

        assert self.sensitivity is not None and self.types is not None
        texts = json.loads(ctx.path(self.sensitivity, "text.json").read_text())
        texts = [(row, start) for row, start in texts[:: max(1, len(texts) // _TEXTS)]]
        reference = KeptRunner(source, root=ctx.store, threads=ctx.threads)
        with reference as whole, GgufRunner(out, threads=ctx.threads) as other:
            kld, tokens = text_divergence(other, whole, texts, progress=ctx.progress)
        predicted = ctx.facts(self.types)["allocate"]["predicted_kld"]
        return {"kld": kld.to_json(), "tokens": tokens, "predicted": predicted}

    def _onnx(self, ctx: Context) -> Mapping[str, Any]:
        from edgedistill.formats.onnx.build import build
        from edgedistill.formats.onnx.check import compare

        source, out = ctx.path(self.model, "model"), ctx.out / "onnx"
        auto, gptq = self.types is not None, self.rounding == "gptq"
        report = build(
            source,
            out,
            "int4" if auto else self.type,
            block=self.block,
            symmetric=self.symmetric
            or gptq,  # zero points are put in with the codes, into an embedding that is shared too
            accuracy=self.accuracy,
            progress=ctx.progress,
        )
        rounded = {"rounding": self._round(ctx, source, out)} if auto or gptq else {}
        ctx.progress(1, 1, "comparing with transformers")
        hop = compare(source, out, [[dict(message) for message in row.messages] for row in self.rows[:4]])
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return {"build": report.to_json(), "hop": hop.to_json(), "size": size, "type": self.type} | rounded

    def _round(self, ctx: Context, source: Path, out: Path) -> dict[str, Any]:
        """Choose the codes of a built folder anew: in the kinds that ``allocate`` chose, or in the one that was asked for."""
        from edgedistill.evals.calibration_text import encode_for_checkpoint
        from edgedistill.formats.onnx.rounding import round_folder, task_rows
        from edgedistill.formats.onnx.types import KINDS, Kind

        if self.types is not None and self.sensitivity is not None:
            names = json.loads(ctx.path(self.types, "types.json").read_text())
            kinds = {matrix: KINDS[name] for matrix, name in names.items()}
            rows = [(row, start) for row, start in json.loads(ctx.path(self.sensitivity, "text.json").read_text())]
        else:
            kinds = Kind(bits=4, block=self.block, zeros=not self.symmetric)
            kept = ctx.path(self.kept, "kept.jsonl") if self.kept else None
            rows = task_rows(source, *encode_for_checkpoint(source, kept, self.calibrated, self.text))
        return round_folder(out, source, rows, kinds, threads=ctx.threads, progress=ctx.progress).to_json()
