"""shape: cut layers out of the student.

In: base checkpoint, the layers to keep. Out: ``model/``, a checkpoint that transformers and the converter load. What
is cut is useless until it is healed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Shape(Stage):
    """Keep ``layers`` of the blocks: a count (evenly spaced, first and last kept) or a list."""

    name: ClassVar[str] = "shape"
    model: Key
    layers: int | tuple[int, ...]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prune and save."""
        from edgedistill.training.recipe import copy_tokenizer, load_model
        from edgedistill.training.shaping import prune_depth

        source = ctx.path(self.model, "model")
        ctx.progress(0, 1, "pruning")
        model = load_model(source)
        before = sum(p.numel() for p in model.parameters())
        pruned = prune_depth(model, self.layers if isinstance(self.layers, int) else list(self.layers))
        pruned.save_pretrained(ctx.out / "model")
        copy_tokenizer(source, ctx.out / "model")
        return {"params_before": before, "params": sum(p.numel() for p in pruned.parameters())}
