"""adapt: fine-tune the teacher on gold data, so that a proved capability is distilled.

In: base checkpoint, gold rows. Out: ``model/`` (adapter merged, full precision), ``adapter/``, ``log/train.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Adapt(Stage):
    """Train an adapter (or all weights) of the teacher on references, and merge it."""

    name: ClassVar[str] = "adapt"
    deterministic: ClassVar[bool] = False  # same bytes on one CPU and library build only
    model: Key
    rows_digest: str
    training: Mapping[str, Any]
    seed: int
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Train, merge, compare the merged model with base + adapter."""
        from edgedistill.training.lora import merge
        from edgedistill.training.recipe import (
            copy_tokenizer,
            encode_rows,
            load_model,
            real_vocabulary,
            take_results,
            train_settings,
        )
        from edgedistill.training.trainer import train

        source = ctx.path(self.model, "model")
        examples = encode_rows(self.rows, source)
        settings = train_settings(self.training, seed=self.seed)
        model = load_model(source)
        vocab_size = real_vocabulary(source, model)
        result = train(
            model, examples, None, settings=settings, out=ctx.work, vocab_size=vocab_size, progress=ctx.progress
        )
        del model  # the merge loads the base anew
        if settings.method == "full":
            take_results(result, ctx.work, ctx.out, source=source)
            return {"train": result.to_json()}
        ctx.progress(1, 1, "merging")
        checks = [[*e.prompt_ids, *e.completion_ids] for e in examples[:4]]
        # From where the training left it: whatever stops the merge costs no step of the training.
        report = merge(source, result.path, ctx.out / "model", rows=checks)
        copy_tokenizer(source, ctx.out / "model")
        take_results(result, ctx.work, ctx.out, source=source)
        return {"train": result.to_json(), "merge": report.to_json()}
