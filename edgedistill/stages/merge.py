"""merge: fold the adapter into the full-precision student, and prove that nothing moved.

In: the student checkpoint that the adapter was trained on, the adapter. Out: ``model/``. The base is loaded in fp32,
merged with ``safe_merge``, saved, loaded again and compared with base + adapter (LoRA on a tied embedding merges
wrong: ``plan`` refuses it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Merge(Stage):
    """Merge one adapter."""

    name: ClassVar[str] = "merge"
    student: Key
    adapter: Key
    kept: Key  # the rows that adapter and merged model are compared on

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Merge and compare."""
        from edgedistill.training.lora import merge
        from edgedistill.training.recipe import copy_tokenizer, load_kept

        source = ctx.path(self.student, "model")
        examples, _ = load_kept(ctx.path(self.kept, "kept.jsonl"), source, limit=4)
        ctx.progress(0, 1, "merging")
        report = merge(
            source,
            ctx.path(self.adapter, "adapter"),
            ctx.out / "model",
            rows=[[*example.prompt_ids, *example.completion_ids] for example in examples],
        )
        copy_tokenizer(source, ctx.out / "model")
        return {"merge": report.to_json()}
