"""distill: train the student on the kept text and the teacher's distributions.

In: the student checkpoint, kept rows, soft targets or the teacher itself. Out: ``adapter/`` (LoRA) or ``model/`` (full),
``log/train.jsonl``. Before the first step the losses prove themselves: student = teacher gives 0, sparse agrees with
dense, shift and mask are right."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.served import Server
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Distill(Stage):
    """Train one student. Without ``targets`` this is plain fine-tuning (kd must be 0)."""

    name: ClassVar[str] = "distill"
    deterministic: ClassVar[bool] = False
    student: Key
    kept: Key
    text: str  # "text": what the filters kept; "reference": gold only
    targets: Key | None
    training: Mapping[str, Any]
    loss: Mapping[str, Any]
    seed: int
    general: tuple[Row, ...] = unkeyed(default=())  # training["keep"] has their digest

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Check the losses, train, save."""
        from edgedistill.teachers.writer import student_writer
        from edgedistill.training.dense import DenseTeacher
        from edgedistill.training.features import Features
        from edgedistill.training.objectives import WHOLE
        from edgedistill.training.other_tokens import other_teacher
        from edgedistill.training.recipe import (
            encode_rows,
            kept_texts,
            load_kept,
            load_model,
            load_targets,
            take_results,
            train_settings,
        )
        from edgedistill.training.selfcheck import selfcheck
        from edgedistill.training.targets import tokenizer_hash
        from edgedistill.training.trainer import train
        from edgedistill.training.vocabulary import origin_towards

        source, kept_rows = ctx.path(self.student, "model"), ctx.path(self.kept, "kept.jsonl")
        examples, tokenizer = load_kept(
            kept_rows, source, text=self.text, think_weight=self.training.get("think_weight", 1.0)
        )
        targets, kept_count = None, len(examples)
        if self.targets is not None:
            examples, targets = load_targets(ctx.path(self.targets, "targets"), examples, tokenizer, source)
        settings = train_settings(self.training, loss=self.loss, seed=self.seed)
        model = load_model(source)
        vocab_size = min(len(tokenizer), model.config.vocab_size)
        guide = teacher = writer = served = None
        if isinstance(self, DistillBeside):
            above = ctx.path(self.teacher, "model")
            origin, whole = origin_towards(source, above), load_model(above)
            tokens = origin.kept.tolist() if origin else None
            if settings.loss.kd and settings.loss.divergence.name in WHOLE:
                own, theirs = load_kept(kept_rows, above, text=self.text)
                teacher = other_teacher(
                    whole,
                    settings.loss.divergence.name,
                    own,
                    examples,
                    kept_texts(kept_rows, text=self.text),
                    (theirs, tokenizer),
                    vocab_size,
                )
            elif self.targets is None:
                teacher = DenseTeacher(whole, vocab_size, tokens=tokens)
            if settings.features:
                guide = Features(whole, model, settings.features, tokens=tokens, seed=self.seed)
            if settings.on_policy:
                writer = student_writer(model, tokenizer, vocab_size)
        if isinstance(self, DistillCached):
            examples, targets, guide = self.guided(ctx, examples, targets, model, settings, tokenizer_hash(tokenizer))
        ctx.progress(0, 1, "checking the losses")
        checks = selfcheck(model, examples, targets, terms=settings.loss, vocab_size=vocab_size, guide=guide)
        if isinstance(self, DistillServed):
            served = self.beside(ctx, examples, targets)
            teacher, targets, writer = served, None, student_writer(model, tokenizer, vocab_size)
        with contextlib.closing(served.server) if served else contextlib.nullcontext():
            result = train(
                model,
                examples,
                targets,
                settings=settings,
                out=ctx.work,
                vocab_size=vocab_size,
                guide=guide,
                teacher=teacher,
                writer=writer,
                general=encode_rows(self.general, source) if self.general else (),
                progress=ctx.progress,
            )
        watched = self.watch(ctx, result)
        take_results(result, ctx.work, ctx.out, source=source)
        return {
            "train": result.to_json(),
            "selfcheck": checks.to_json(),
            "left_out": kept_count - len(examples),
            **watched,
        }

    def watch(self, ctx: Context, result: Any) -> Mapping[str, Any]:
        """Look at the trained student; raises StepFailed where it has stopped thinking."""
        from edgedistill.training.thinking import watch_thinking

        source, kept_rows = ctx.path(self.student, "model"), ctx.path(self.kept, "kept.jsonl")
        return watch_thinking(kept_rows, source, result, text=self.text, progress=ctx.progress)


@dataclass(frozen=True, kw_only=True)
class DistillBeside(Distill):
    """Train one student with ``teacher`` beside it: for its whole distributions where there are no ``targets``, for its hidden
    states where ``training["features"]`` asks.
    """

    teacher: Key


@dataclass(frozen=True, kw_only=True)
class DistillCached(Distill):
    """Train one student towards hidden states of its teacher that are stored, at ``pairs`` (teacher's layer, student's)."""

    states: Key
    pairs: tuple[tuple[int, int], ...]

    def guided(
        self,
        ctx: Context,
        examples: list[Any],
        targets: list[Any] | None,
        model: Any,
        settings: Any,
        tokenizer: str,
    ) -> tuple[list[Any], list[Any] | None, Any]:
        """Return the examples whose states are stored, with their targets, and what compares the states."""
        from edgedistill.training.cached_states import CachedFeatures, CachedStates, teachers_hashes

        states = CachedStates(ctx.path(self.states, "states"))
        keys = teachers_hashes(examples, ctx.path(self.student, "model"), states, tokenizer=tokenizer)
        known = [at for at, one in enumerate(examples) if one.token_hash in keys]
        guide = CachedFeatures(states, keys, model, settings.features, self.pairs, seed=self.seed)
        return [examples[at] for at in known], targets and [targets[at] for at in known], guide


@dataclass(frozen=True, kw_only=True)
class DistillServed(Distill):
    """Train one student whose teacher scores, behind a server, what the student writes: ``n`` best tokens at each place.

    ``teacher`` says who it is, ``tokens`` is a model with its tokenizer (the student, before its vocabulary was trimmed).
    """

    teacher: Key
    tokens: Key
    n: int
    server: Server = unkeyed()

    def beside(self, ctx: Context, examples: list[Any], targets: list[Any] | None) -> Any:
        """Return the teacher, which knows the ``targets`` of the ``examples``."""
        from transformers import AutoTokenizer

        from edgedistill.teachers.beside import ServedTeacher
        from edgedistill.teachers.openai import OpenAITeacher
        from edgedistill.training.vocabulary import read_origin

        tokenizer = AutoTokenizer.from_pretrained(ctx.path(self.tokens, "model"))
        origin = read_origin(ctx.path(self.student, "model"))
        asked = OpenAITeacher(self.server, rows=ctx.rows.path, tokenizer=tokenizer)
        return ServedTeacher(asked, examples, targets or [], n=self.n, origin=origin)


@dataclass(frozen=True, kw_only=True)
class DistillDraft(DistillBeside):
    """Train a draft: what it writes by itself nobody reads."""

    def watch(self, ctx: Context, result: Any) -> Mapping[str, Any]:
        """Look at nothing."""
        return {}
