"""states: the teacher's hidden states at some layers, over every token of the kept text.

In: teacher checkpoint, kept rows. Out: ``states/*.safetensors`` (``training/cached_states.py``). Another student, another seed
or one more epoch asks the teacher nothing anew. Shards are fixed from the list sorted by length; a killed run keeps those
that it finished."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.stages.score import SHARD_ROWS
from edgedistill.step import Context, Stage


@dataclass(frozen=True, kw_only=True)
class States(Stage):
    """Store the hidden states behind ``layers`` of the teacher."""

    name: ClassVar[str] = "states"
    deterministic: ClassVar[bool] = False
    teacher: Key
    kept: Key
    layers: tuple[int, ...]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Run the teacher forward over the kept rows, shard by shard."""
        from edgedistill.teachers.transformers import TransformersTeacher
        from edgedistill.training.cached_states import SUFFIX, write_states
        from edgedistill.training.recipe import load_kept

        model = ctx.path(self.teacher, "model")
        examples, _ = load_kept(ctx.path(self.kept, "kept.jsonl"), model)
        examples.sort(key=lambda example: (example.length, example.id))
        teacher = TransformersTeacher(model)
        for start in range(0, len(examples), SHARD_ROWS):
            path = ctx.work / f"{start // SHARD_ROWS:05d}{SUFFIX}"
            if not path.exists():
                write_states(
                    path,
                    teacher.model,
                    examples[start : start + SHARD_ROWS],
                    self.layers,
                    tokenizer=teacher.tokenizer_hash,
                    progress=lambda done, start=start: ctx.progress(start + done, len(examples), "rows"),
                )
        (ctx.out / "states").mkdir()
        for path in sorted(ctx.work.glob(f"*{SUFFIX}")):
            shutil.copy2(path, ctx.out / "states")
        size = sum(path.stat().st_size for path in (ctx.out / "states").iterdir())
        tokens = sum(example.length for example in examples)
        return {"rows": len(examples), "tokens": tokens, "bytes": size, "layers": list(self.layers)}
