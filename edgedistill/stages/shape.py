"""shape: cut layers, hidden dimensions, neurons of the FFNs and rows of the vocabulary out of the student.

In: base checkpoint, what to keep; rows of the task, which tell what widths and vocabulary must hold. Out: ``model/``, a
checkpoint that transformers and the converter load, and ``basis.safetensors`` where the hidden size was cut. Without layers
it is useless until it is healed; with a smaller hidden size or narrower FFNs it is worse; with a smaller vocabulary the kept
tokens have the logits that they had, on the rows that chose them.

Where several are cut, each is chosen on what the ones before it leave: the layers by the whole model; the directions of the
residual stream by the states of these layers; the neurons of their FFNs by the states that run in it; the vocabulary last, by
the text alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Shape(Stage):
    """Keep ``layers`` of the blocks, ``hidden`` dimensions of the residual stream and ``ffn`` neurons of each FFN (None: all),
    chosen by ``rows``, and ``vocabulary`` tokens (None: all), those of ``taught`` among them.
    """

    name: ClassVar[str] = "shape"
    version: ClassVar[int] = 2  # 2: layer by layer, each on what the cut ones before it leave
    model: Key
    layers: tuple[int, ...]
    ffn: int | None
    rows_digest: str
    hidden: int | None = None
    vocabulary: int | None = None
    taught_digest: str = ""
    rows: tuple[Row, ...] = unkeyed()
    taught: tuple[Row, ...] = unkeyed(default=())

    def fields(self) -> dict[str, Any]:
        """Return the keyed fields; ``hidden`` came later, and without it a student is what it was."""
        found = super().fields()
        if self.hidden is None:
            del found["hidden"]
        return found

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prune and save."""
        from edgedistill.training.recipe import copy_tokenizer, encode_rows, load_model
        from edgedistill.training.shaping import prune_depth

        source = ctx.path(self.model, "model")
        ctx.progress(0, 1, "pruning")
        tokens = self._tokens(source)  # before what takes minutes: a vocabulary may turn out too small for the rows
        model = load_model(source)
        facts: dict[str, Any] = {"params_before": sum(p.numel() for p in model.parameters())}
        layers, found = self.choose(model, source)
        facts |= found
        if self.hidden is not None:
            from edgedistill.training.residual import choose_basis, narrow_residual, write_basis

            ctx.progress(0, 1, "choosing the directions")
            examples = encode_rows(self.rows, source)
            basis, facts["hidden_error"] = choose_basis(_to_run(model), examples, self.hidden, layers=layers)
            write_basis(basis, ctx.out)
            model = narrow_residual(model, basis)
        if self.ffn is not None:
            from edgedistill.training.ffn import prune_ffn

            examples = encode_rows(self.rows, source)
            facts["ffn_error"] = prune_ffn(
                model, examples, self.ffn, layers=layers, run=_to_run(model), progress=ctx.progress
            )
        pruned = prune_depth(model, layers)
        if tokens is None:
            pruned.save_pretrained(ctx.out / "model")
            copy_tokenizer(source, ctx.out / "model")
        else:
            from edgedistill.training.vocabulary import trim_vocabulary, write_trimmed_tokenizer

            used, kept = tokens
            trim_vocabulary(pruned, kept)
            facts |= {"tokens_used": used, "tokens": len(kept)}
            pruned.save_pretrained(ctx.out / "model")
            write_trimmed_tokenizer(source, ctx.out / "model", kept)
        return {**facts, "params": sum(p.numel() for p in pruned.parameters())}

    def _tokens(self, source: Path) -> tuple[int, Any] | None:
        """Return how many tokens the taught rows use, and the ids to keep, ascending; None for all. Raises UsageError if they
        need more than that.
        """
        if self.vocabulary is None:
            return None
        from edgedistill.training.recipe import encode_rows
        from edgedistill.training.vocabulary import choose_tokens

        examples = encode_rows(self.taught, source)
        used = {token for example in examples for token in (*example.prompt_ids, *example.completion_ids)}
        return len(used), choose_tokens(source, used, self.vocabulary)

    def choose(self, model: Any, source: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the layers to keep, and what was found on the way."""
        return self.layers, {}


def _to_run(model: Any) -> Any:
    """Copy a model to where, and in what type, this machine runs it."""
    from edgedistill.training.precision import pick_device, torch_dtype

    device = pick_device()
    return copy.deepcopy(model).to(device, torch_dtype("auto", device))


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
