"""temper: fit one temperature to rows that nobody was taught, and fold it into the student's final norm.

In: the merged student, rows with references. Out: ``model/``, whose logits are the student's over T; or the very same where the
rows that T was not fitted on are no more probable with it. The answers of greedy decoding stay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Temper(Stage):
    """Temper one student."""

    name: ClassVar[str] = "temper"
    deterministic: ClassVar[bool] = False
    student: Key
    rows_digest: str
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Fit, fold, compare."""
        from edgedistill.training.recipe import copy_tokenizer, encode_rows, load_model, real_vocabulary
        from edgedistill.training.temperature import check_folded, fit, fold

        source, out = ctx.path(self.student, "model"), ctx.out / "model"
        examples, model = encode_rows(self.rows, source), load_model(source)
        fitted = fit(model, examples, vocab_size=real_vocabulary(source, model), progress=ctx.progress)
        if not fitted.helped:
            out.mkdir()
            for file in source.iterdir():
                os.link(file, out / file.name)
            return {"temper": fitted.to_json()}
        before = _logits(model, examples[:4])
        fold(model, fitted.temperature)
        model.cpu().save_pretrained(out)
        copy_tokenizer(source, out)
        moved = check_folded(before, _logits(load_model(out), examples[:4]), fitted.temperature)
        return {"temper": {**fitted.to_json(), "max_logit_difference": moved}}


def _logits(model: Any, examples: list[Any]) -> Any:
    """Return the logits at every completion token, float32 [tokens, vocabulary], on the CPU."""
    import torch

    model.cpu().eval()
    with torch.no_grad():
        rows = [torch.tensor([[*one.prompt_ids, *one.completion_ids]]) for one in examples]
        return torch.cat([model(ids).logits[0].float() for ids in rows])
