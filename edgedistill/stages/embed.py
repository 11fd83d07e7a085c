"""embed: a vector of each answer with what was asked, for a filter that tells duplicates by their meaning.

In: the view of ``generate``, a text encoder. Out: ``vectors.f32``, ``vectors.json`` and ``keys.txt`` (`data/near.py`). How near is
too near is the filter's matter: another threshold embeds nothing anew. Answers are read in the view's order, a block at a time, and
a killed run keeps the blocks that it finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.filters import asked_in
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.fingerprint import Key
from edgedistill.jsonl import each_line
from edgedistill.pooling import Pooling
from edgedistill.step import Context, Stage, later, rows_given, unkeyed

BLOCK = 512  # answers whose texts and vectors are in memory at once


@dataclass(frozen=True, kw_only=True)
class Embed(Stage):
    """Embed the answers that ended: what users say in the row, and what they see of the answer (``shown``: without its block)."""

    name: ClassVar[str] = "embed"
    deterministic: ClassVar[bool] = False
    model: Key
    answers: Key
    rows_digest: str
    pooling: Pooling
    shown: bool = False
    prompts: Key | None = later(None)  # the entry of an augmenter that holds the rows
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Embed what is not embedded yet; equal texts of a block once."""
        from edgedistill.evals.embedding import Embedder

        rows = {row.id: row for row in rows_given(ctx, self.prompts, self.rows)}
        view = ctx.path(self.answers, "rows.jsonl")
        model = Embedder(ctx.path(self.model, "model"), self.pooling)
        total = sum(1 for _ in _ended(view))
        partial, width = ctx.work / "vectors.f32", 4 * model.size
        partial.touch()
        done = partial.stat().st_size // (BLOCK * width) * BLOCK
        os.truncate(partial, done * width)
        count, block = 0, list[str]()
        with partial.open("ab") as file, (ctx.out / "keys.txt").open("w") as keys:
            for count, answer in enumerate(_ended(view), 1):
                keys.write(answer["row"] + "\n")
                if count > done:
                    said = split(answer["text"]).answer if self.shown else answer["text"]
                    block.append("\n".join([*asked_in(rows[answer["id"]]), said]))
                if block and (len(block) == BLOCK or count == total):
                    texts = list(dict.fromkeys(block))
                    at = {text: number for number, text in enumerate(texts)}
                    file.write(model.embed(texts)[[at[text] for text in block]].tobytes())
                    file.flush()
                    block = []
                    ctx.progress(count, total, "answers")
        shutil.move(partial, ctx.out / "vectors.f32")
        (ctx.out / "vectors.json").write_text(json.dumps({"size": model.size, "count": count}) + "\n")
        return {"embedded": count, "size": model.size, "pooling": self.pooling}


def _ended(view: Path) -> Iterator[dict[str, Any]]:
    """Yield the answers that ended."""
    return (answer for answer in map(json.loads, each_line(view)) if answer["finish"] == "stop")
