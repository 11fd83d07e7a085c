"""heal: train a pruned student in full, before an adapter is put on it.

In: the shaped checkpoint; kept rows, or rows with references; the teacher, where its hidden states are matched. Out:
``model/``, ``log/train.jsonl``. A low-rank adapter on an unhealed pruned model learns slowly (0.57 against 0.995 exact
match on the quickstart's task), so this comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Heal(Stage):
    """Train all weights (embeddings may be frozen) on ``kept`` text or on the references of ``rows``.

    With ``training["hidden"]`` the hidden states of ``teacher``, of which the student kept ``layers``, are matched too.
    """

    name: ClassVar[str] = "heal"
    deterministic: ClassVar[bool] = False
    student: Key
    kept: Key | None
    rows_digest: str
    teacher: Key | None
    layers: tuple[int, ...]
    training: Mapping[str, Any]
    seed: int
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Train, save."""
        from edgedistill.training.hidden import HiddenStates
        from edgedistill.training.recipe import (
            encode_rows,
            load_kept,
            load_model,
            real_vocabulary,
            take_results,
            train_settings,
        )
        from edgedistill.training.residual import read_basis
        from edgedistill.training.trainer import train
        from edgedistill.training.vocabulary import origin_towards

        source = ctx.path(self.student, "model")
        if self.kept is not None:
            examples, _ = load_kept(ctx.path(self.kept, "kept.jsonl"), source)
        else:
            examples = encode_rows(self.rows, source)
        guide = None
        if self.teacher is not None:
            above = ctx.path(self.teacher, "model")
            origin, teacher = origin_towards(source, above), load_model(above)
            layers = self.layers or ctx.facts(self.student)["layers"]  # measured by the shape step
            tokens, basis = origin.kept.tolist() if origin else None, read_basis(ctx.path(self.student))
            guide = HiddenStates(teacher, layers, tokens=tokens, basis=basis)
        settings = train_settings(self.training, seed=self.seed)
        model = load_model(source)
        result = train(
            model,
            examples,
            None,
            settings=settings,
            out=ctx.work,
            vocab_size=real_vocabulary(source, model),
            guide=guide,
            progress=ctx.progress,
        )
        take_results(result, ctx.work, ctx.out, source=source)
        return {"train": result.to_json()}
