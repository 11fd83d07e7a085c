"""grade: what a model thinks of the teacher's answers, one number each, for a filter to choose by.

In: the view of ``generate``, a model. Out: ``grades.jsonl``, by the answers' keys in the row store. What passes is the filter's
matter: its thresholds are not in the key, and another one grades nothing anew. Batches are fixed from the list sorted by length; a
killed run keeps those that it finished. A judge that is asked in words is a step of ``generate`` (``Judge``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from edgedistill.data.grades import line, read_grades, told, write_grades
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.step import Context, Stage, later, rows_given, unkeyed


@dataclass(frozen=True, kw_only=True)
class Grade(Stage):
    """Grade the answers that ended: by their perplexity under ``model``, or by the score that it gives as a reward model.

    Perplexity is that of the whole text, since all of it is taught. A reward model sees what a user sees: with ``shown`` the answer
    without its block.
    """

    name: ClassVar[str] = "grade"
    deterministic: ClassVar[bool] = False
    kind: Literal["perplexity", "reward"]
    model: Key
    answers: Key
    rows_digest: str
    label: str | None = later(None)
    shown: bool = later(False)
    prompts: Key | None = later(None)  # the entry of an augmenter that holds the rows
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Grade what is not graded yet; equal answers to a prompt once."""
        from edgedistill.evals.grading import Asked, Perplexity, Reward, batches

        rows = {row.id: row for row in rows_given(ctx, self.prompts, self.rows)}
        same: dict[tuple[str, str], list[str]] = {}
        for text in json_lines(ctx.path(self.answers, "rows.jsonl")):
            answer = json.loads(text)
            if answer["finish"] == "stop":
                said = split(answer["text"]).answer if self.shown else answer["text"]
                same.setdefault((answer["id"], said), []).append(answer["row"])
        asked = [
            Asked(key=keys[0], messages=rows[row_id].messages, tools=rows[row_id].tools, answer=said)
            for (row_id, said), keys in same.items()
        ]
        partial = ctx.work / "grades.jsonl"
        done = read_grades(partial, partial=True) if partial.is_file() else {}
        with partial.open("w") as file:
            file.writelines(line(key, grade) for key, grade in done.items())
            if any(one.key not in done for one in asked):
                folder = ctx.path(self.model, "model")
                model: Any = Perplexity(folder) if self.kind == "perplexity" else Reward(folder, self.label)
                encoded = [model.encode(one) for one in asked]
                fit = [at for at, one in enumerate(encoded) if one is not None]
                done |= {asked[at].key: None for at, one in enumerate(encoded) if one is None}
                for batch in batches([_length(encoded[at]) for at in fit]):
                    numbers = [fit[at] for at in batch]
                    if all(asked[at].key in done for at in numbers):
                        continue
                    found = model.grade([encoded[at] for at in numbers])
                    for at, grade in zip(numbers, found, strict=True):
                        done[asked[at].key] = grade
                        file.write(line(asked[at].key, grade))
                    file.flush()
                    ctx.progress(len(done), len(asked), "answers")
        grades = {key: done[keys[0]] for keys in same.values() for key in keys}
        write_grades(ctx.out / "grades.jsonl", grades)
        return {"grades": {"kind": self.kind, **told(grades)}}


def _length(encoded: Any) -> int:
    return len(encoded["input_ids"]) if isinstance(encoded, Mapping) else encoded.length
