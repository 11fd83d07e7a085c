"""convert: put a full-precision checkpoint into a GGUF container, and prove that llama.cpp reads the same model.

In: an HF checkpoint. Out: ``model.gguf`` (f16). Gate on the hop: token ids on the user's own text, greedy tokens and
logits through llama.cpp agree with transformers', and the configuration reads back the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Convert(Stage):
    """Convert one checkpoint to one GGUF file."""

    name: ClassVar[str] = "convert"
    model: Key
    dtype: str
    tool: str
    title: str  # general.name and general.license of the file
    licence: str
    rows: tuple[Row, ...] = unkeyed()  # the user's own text that the hop is checked on

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Convert, then compare."""
        from edgedistill.formats.gguf.check import compare_logits
        from edgedistill.formats.gguf.convert import convert

        source, gguf = ctx.path(self.model, "model"), ctx.out / "model.gguf"
        licence = "" if self.licence == "not stated" else self.licence
        report = convert(
            source, gguf, dtype=self.dtype, name=self.title, license=licence, threads=ctx.threads, progress=ctx.progress
        )
        ctx.progress(1, 1, "comparing with transformers")
        texts = [str(message.get("content")) for row in self.rows for message in row.messages]
        texts += [row.reference for row in self.rows if row.reference]
        prompts = [[dict(message) for message in row.messages] for row in self.rows[:3]]
        hop = compare_logits(source, gguf, prompts, texts=texts, threads=ctx.threads)
        return {"convert": report.to_json(), "hop": hop.to_json()}
