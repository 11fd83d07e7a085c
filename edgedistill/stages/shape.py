"""shape: cut layers, and neurons of the FFNs, out of the student.

In: base checkpoint, the layers and the width to keep; rows of the task, which tell what the width must hold. Out:
``model/``, a checkpoint that transformers and the converter load. Without layers it is useless until it is healed; with
narrower FFNs it is a little worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Shape(Stage):
    """Keep ``layers`` of the blocks and ``ffn`` neurons of each FFN (None: all), chosen by ``rows``."""

    name: ClassVar[str] = "shape"
    version: ClassVar[int] = 2  # 2: layer by layer, each on what the cut ones before it leave
    model: Key
    layers: tuple[int, ...]
    ffn: int | None
    rows_digest: str
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prune and save."""
        from edgedistill.training.recipe import copy_tokenizer, encode_rows, load_model
        from edgedistill.training.shaping import prune_depth

        source = ctx.path(self.model, "model")
        ctx.progress(0, 1, "pruning")
        model = load_model(source)
        facts: dict[str, Any] = {"params_before": sum(p.numel() for p in model.parameters())}
        if self.ffn is not None:
            from edgedistill.training.ffn import prune_ffn
            from edgedistill.training.precision import pick_device, torch_dtype

            device = pick_device()
            run = load_model(source).to(device, torch_dtype("auto", device))
            facts["ffn_error"] = prune_ffn(
                model, encode_rows(self.rows, source), self.ffn, layers=self.layers, run=run, progress=ctx.progress
            )
        pruned = prune_depth(model, self.layers)
        pruned.save_pretrained(ctx.out / "model")
        copy_tokenizer(source, ctx.out / "model")
        return {**facts, "params": sum(p.numel() for p in pruned.parameters())}
