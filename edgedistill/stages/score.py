"""score: the teacher's distribution over the next token, at every kept token.

In: teacher checkpoint, kept rows. Out: ``targets/*.parquet``: per position n random draws with counts and log-
probability (RS-KD, "Sparse Logit Sampling", ACL 2025), or the top n and the tail as one bucket. A hedge is not the teacher's:
there every token is certain, and the divergence is cross-entropy. Another student,
filter order or loss weight asks the teacher nothing anew. Shards are fixed from the list sorted by length; a killed
run keeps those that it finished."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.served import Server
from edgedistill.step import Context, Stage, later, unkeyed

if TYPE_CHECKING:
    from edgedistill.teachers.llama_cpp import LlamaCppTeacher
    from edgedistill.teachers.openai import OpenAITeacher
    from edgedistill.teachers.transformers import TransformersTeacher

SHARD_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Draw soft targets of the kept text from the teacher."""

    name: ClassVar[str] = "score"
    deterministic: ClassVar[bool] = False
    teacher: Key
    kept: Key
    kind: Literal["sampled", "top-k", "top-sampled"]
    n: int
    temperature: float
    seed: int
    guided: bool = later(False)  # the teacher reads what it alone is told

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run the teacher forward over the kept rows, shard by shard."""
        from edgedistill.teachers.transformers import TransformersTeacher
        from edgedistill.training.draws import stored_temperatures

        model = ctx.path(self.teacher, "model")
        return self.write(ctx, model, TransformersTeacher(model), stored_temperatures(self.temperature))

    def write(
        self,
        ctx: Context,
        model: Path,
        teacher: TransformersTeacher | OpenAITeacher | LlamaCppTeacher,
        temperatures: tuple[float, ...],
    ) -> Mapping[str, Any]:
        """Write what ``teacher`` gives along the kept rows in the tokens of ``model``; ``temperatures`` have normalisers."""
        return self.finish(ctx, *self.draw(ctx, model, teacher, temperatures))

    def draw(
        self,
        ctx: Context,
        model: Path,
        teacher: TransformersTeacher | OpenAITeacher | LlamaCppTeacher,
        temperatures: tuple[float, ...],
        *,
        by: Callable[[str], bool] = lambda source: True,
        prefix: str = "",
    ) -> tuple[int, int]:
        """Write what ``teacher`` gives along the kept rows whose source is wanted (``by``), to shards whose names begin with
        ``prefix``; return the number of rows and of their tokens.
        """
        from edgedistill.training.recipe import load_kept
        from edgedistill.training.targets import TargetsHeader, TargetsWriter, certain

        sources = {
            line["id"]: line["source"] for line in map(json.loads, json_lines(ctx.path(self.kept, "kept.jsonl")))
        }
        examples, _ = load_kept(ctx.path(self.kept, "kept.jsonl"), model)
        examples = [one for one in examples if by(sources.get(one.id, ""))]
        hedged = {name for name, source in sources.items() if source == "hedge"}
        header = TargetsHeader(
            kind=self.kind,
            n=self.n,
            temperature=self.temperature,
            temperatures=temperatures,
            vocab_size=teacher.vocab_size,
            tokenizer=teacher.tokenizer_hash,
            teacher=ctx.entries[self.teacher].digest,
            seed=self.seed,
        )
        examples.sort(key=lambda example: (example.length, example.id))
        read = {example.id: example for example in examples}  # by the teacher
        if self.guided:
            given, _ = load_kept(ctx.path(self.kept, "kept.jsonl"), model, guide=True)
            read = {example.id: example for example in given}
        tokens = 0
        for start in range(0, len(examples), SHARD_ROWS):
            part = examples[start : start + SHARD_ROWS]
            tokens += sum(len(example.completion_ids) for example in part)
            path = ctx.work / f"{prefix}{start // SHARD_ROWS:05d}.parquet"
            if path.exists():
                continue
            with TargetsWriter(path, header) as writer:
                scored = teacher.score(
                    [read[example.id] for example in part],
                    kind=header.kind,
                    n=self.n,
                    temperature=self.temperature,
                    seed=self.seed,
                    progress=lambda done, total, note, start=start: ctx.progress(start + done, len(examples), note),
                )
                for index, targets in scored:
                    writer.write(part[index], certain(part[index], header) if part[index].id in hedged else targets)
        return len(examples), tokens

    def finish(self, ctx: Context, rows: int, tokens: int) -> dict[str, Any]:
        """Move the shards into the entry; return what they are."""
        shutil.copytree(ctx.work, ctx.out / "targets")
        size = sum(path.stat().st_size for path in (ctx.out / "targets").iterdir())
        return {
            "rows": rows,
            "tokens": tokens,
            "bytes": size,
            "bytes_per_token": round(size / max(1, tokens), 2),
        }


@dataclass(frozen=True, kw_only=True)
class ScoreSeveral(Score):
    """Draw soft targets of each text from the teacher that wrote it (``writers``: name and checkpoint), of all others from
    ``teacher``.
    """

    writers: tuple[tuple[str, Key], ...]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run one teacher after the other forward over its rows."""
        from edgedistill.teachers.transformers import TransformersTeacher
        from edgedistill.training.draws import stored_temperatures

        apart, temperatures = {name for name, _ in self.writers}, stored_temperatures(self.temperature)
        kept = json_lines(ctx.path(self.kept, "kept.jsonl"))
        counts = Counter(
            "" if source not in apart else source for source in (json.loads(line)["source"] for line in kept)
        )
        rows = tokens = 0
        for name, key in (("", self.teacher), *self.writers):
            if not counts[name]:
                continue
            model = ctx.path(key, "model")
            more, their = self.draw(
                ctx,
                model,
                TransformersTeacher(model),
                temperatures,
                by=lambda source, name=name: source == name if name else source not in apart,
                prefix=name and f"{name}-",
            )
            rows, tokens = rows + more, tokens + their
        return {**self.finish(ctx, rows, tokens), "by": {name or "teacher": count for name, count in counts.items()}}


@dataclass(frozen=True, kw_only=True)
class ScoreMixed(Score):
    """Draw soft targets from the mixture of ``teacher`` and ``others``, whoever wrote the text."""

    others: tuple[Key, ...]
    combine: Literal["average", "confidence"]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run all teachers forward over the kept rows, shard by shard."""
        from edgedistill.teachers.mixture import MixedTeacher
        from edgedistill.training.draws import stored_temperatures

        models = [ctx.path(key, "model") for key in (self.teacher, *self.others)]
        teacher = MixedTeacher(models, combine=self.combine)
        return {**self.write(ctx, models[0], teacher, stored_temperatures(self.temperature)), "mixed": len(models)}


@dataclass(frozen=True, kw_only=True)
class ScoreServed(Score):
    """Ask a server for the best tokens along the kept text, in the tokens of ``student``, which have to be the teacher's, too."""

    student: Key
    manner: str = later("")
    server: Server = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Ask the server over the kept rows, shard by shard."""
        from transformers import AutoTokenizer

        from edgedistill.teachers.openai import OpenAITeacher

        model = ctx.path(self.student, "model")
        tokenizer = AutoTokenizer.from_pretrained(model)
        weights, rows = ctx.path(self.teacher, "model"), ctx.rows.path
        with OpenAITeacher(self.server, rows=rows, tokenizer=tokenizer, weights=weights, note=ctx.note) as teacher:
            return self.write(ctx, model, teacher, ())


@dataclass(frozen=True, kw_only=True)
class ScoreGguf(Score):
    """Draw soft targets from a GGUF file by llama.cpp, in the tokens of ``student``, which have to be the file's, too."""

    student: Key

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run llama.cpp over the kept rows, shard by shard."""
        from transformers import AutoTokenizer

        from edgedistill.teachers.llama_cpp import LlamaCppTeacher
        from edgedistill.training.draws import stored_temperatures

        model = ctx.path(self.student, "model")
        tokenizer = AutoTokenizer.from_pretrained(model)
        with LlamaCppTeacher(ctx.path(self.teacher, "model.gguf"), threads=ctx.threads, tokenizer=tokenizer) as teacher:
            return self.write(ctx, model, teacher, stored_temperatures(self.temperature))
