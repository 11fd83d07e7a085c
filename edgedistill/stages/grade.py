"""grade: what a model thinks of the teacher's answers, one number each, for a filter to choose by.

In: the view of ``generate``, a model. Out: ``grades.jsonl``, by the answers' keys in the row store. What passes is the filter's
matter: its thresholds are not in the key, and another one grades nothing anew. Batches are fixed from the list sorted by length; a
killed run keeps those that it finished. In memory are keys and grades, and texts while they are read. A judge that is asked in
words is a step of ``generate`` (``Judge``)."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from edgedistill.data.answers import short
from edgedistill.data.grades import line, read_grades, told, write_grades
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.fingerprint import Key
from edgedistill.jsonl import Lines
from edgedistill.sequences import Aside, Made
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
        answers, first = Lines(ctx.path(self.answers, "rows.jsonl")), array("I")
        same: dict[int, list[str]] = {}  # the keys of equal answers to a prompt
        for number, answer in enumerate(answers):
            if answer["finish"] == "stop":
                said = short(json.dumps([answer["id"], self._said(answer)]))
                if said not in same:
                    first.append(number)
                same.setdefault(said, []).append(answer["row"])

        def ask(number: int) -> Asked:
            answer = answers[number]
            row = rows[answer["id"]]
            return Asked(key=answer["row"], messages=row.messages, tools=row.tools, answer=self._said(answer))

        asked, keys = Made(first, ask), [own[0] for own in same.values()]
        partial = ctx.work / "grades.jsonl"
        done = read_grades(partial, partial=True) if partial.is_file() else {}
        with partial.open("w") as file:
            file.writelines(line(key, grade) for key, grade in done.items())
            if any(key not in done for key in keys):
                folder = ctx.path(self.model, "model")
                model: Any = Perplexity(folder) if self.kind == "perplexity" else Reward(folder, self.label)
                encoded, fit, lengths = Aside(ctx.work), list[str](), array("I")
                for key, one in zip(keys, map(model.encode, asked), strict=True):
                    if one is None:
                        done[key] = None
                        continue
                    encoded.add(json.dumps(one).encode())
                    fit.append(key)
                    lengths.append(model.length(one))
                for batch in batches(lengths):
                    own = [fit[at] for at in batch]
                    if all(key in done for key in own):
                        continue
                    found = model.grade([json.loads(encoded[at]) for at in batch], own)
                    for key, grade in zip(own, found, strict=True):
                        done[key] = grade
                        file.write(line(key, grade))
                    file.flush()
                    ctx.progress(len(done), len(keys), "answers")
        grades = {key: done[own[0]] for own in same.values() for key in own}
        write_grades(ctx.out / "grades.jsonl", grades)
        return {"grades": {"kind": self.kind, **told(grades)}}

    def _said(self, answer: Mapping[str, Any]) -> str:
        """Return what is graded of an answer."""
        return split(answer["text"]).answer if self.shown else answer["text"]
