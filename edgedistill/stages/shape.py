"""shape: cut layers, neurons of the FFNs and rows of the vocabulary out of the student.

In: base checkpoint, what to keep; rows of the task, which tell what width and vocabulary must hold. Out: ``model/``, a
checkpoint that transformers and the converter load. Without layers it is useless until it is healed; with narrower FFNs
it is a little worse; with a smaller vocabulary the kept tokens have the logits that they had, on the rows that chose
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Shape(Stage):
    """Keep ``layers`` of the blocks, ``ffn`` neurons of each FFN (None: all), chosen by ``rows``, and ``vocabulary`` tokens
    (None: all), those of ``taught`` among them.
    """

    name: ClassVar[str] = "shape"
    version: ClassVar[int] = 2  # 2: layer by layer, each on what the cut ones before it leave
    model: Key
    layers: tuple[int, ...]
    ffn: int | None
    rows_digest: str
    vocabulary: int | None = None
    taught_digest: str = ""
    rows: tuple[Row, ...] = unkeyed()
    taught: tuple[Row, ...] = unkeyed(default=())

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prune and save."""
        from edgedistill.training.recipe import copy_tokenizer, encode_rows, load_model
        from edgedistill.training.shaping import prune_depth

        source = ctx.path(self.model, "model")
        ctx.progress(0, 1, "pruning")
        model = load_model(source)
        facts: dict[str, Any] = {"params_before": sum(p.numel() for p in model.parameters())}
        layers, found = self.choose(model, source)
        facts |= found
        if self.ffn is not None:
            from edgedistill.training.ffn import prune_ffn
            from edgedistill.training.precision import pick_device, torch_dtype

            device = pick_device()
            run = load_model(source).to(device, torch_dtype("auto", device))
            facts["ffn_error"] = prune_ffn(
                model, encode_rows(self.rows, source), self.ffn, layers=layers, run=run, progress=ctx.progress
            )
        pruned = prune_depth(model, layers)
        if self.vocabulary is not None:
            from edgedistill.training.vocabulary import choose_tokens, trim_vocabulary, write_trimmed_tokenizer

            examples = encode_rows(self.taught, source)
            used = {token for example in examples for token in (*example.prompt_ids, *example.completion_ids)}
            tokens = choose_tokens(source, used, self.vocabulary)
            trim_vocabulary(pruned, tokens)
            facts |= {"tokens_used": len(used), "tokens": len(tokens)}
        pruned.save_pretrained(ctx.out / "model")
        if self.vocabulary is None:
            copy_tokenizer(source, ctx.out / "model")
        else:
            write_trimmed_tokenizer(source, ctx.out / "model", tokens)
        return {**facts, "params": sum(p.numel() for p in pruned.parameters())}

    def choose(self, model: Any, source: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the layers to keep, and what was found on the way."""
        return self.layers, {}


@dataclass(frozen=True, kw_only=True)
class MeasuredShape(Shape):
    """Keep the ``keep`` layers that turn the states of ``rows`` most; ``layers`` is empty until they are measured."""

    keep: int

    def choose(self, model: Any, source: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Measure every layer's influence."""
        from edgedistill.training.recipe import encode_rows
        from edgedistill.training.shaping import block_influence, most_important

        influence = block_influence(model, encode_rows(self.rows, source))
        layers = tuple(most_important(influence, self.keep))
        return layers, {"layers": list(layers), "influence": [round(one, 5) for one in influence]}
