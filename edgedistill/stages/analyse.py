"""analyse: put what the teacher said of its own mistakes beside what was kept.

In: kept rows, the teacher's new answers to the objection that it was wrong. Out: ``kept.jsonl`` with a lesson for each of them that
says something of the mistake and then is right, ``rejected.jsonl``, ``yields.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.corrections import to_analyse
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.evals.metrics import AFTER_THINKING, find_metric, judging, shown_name
from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.step import Context, Stage, later, rows_given, unkeyed


@dataclass(frozen=True, kw_only=True)
class Analyse(Stage):
    """Judge the analyses by ``metric``, and by whether there is one."""

    name: ClassVar[str] = "analyse"
    kept: Key
    analyses: Key
    rows_digest: str
    corrections: int
    metric: str
    prompts: Key | None = later(None)
    rows: tuple[Row, ...] = unkeyed()
    folder: Path = unkeyed(default=Path())  # the recipe's, where the file of a metric lies

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Judge, and write kept rows and lessons."""
        rejected = map(json.loads, json_lines(ctx.path(self.kept, "rejected.jsonl")))
        asked = {
            row.id: row for row in to_analyse(rows_given(ctx, self.prompts, self.rows), rejected, self.corrections)
        }
        answers = [json.loads(line) for line in json_lines(ctx.path(self.analyses, "rows.jsonl"))]
        metric, lessons, left = find_metric(AFTER_THINKING + self.metric, self.folder), [], []
        for answer in answers:
            row, why = asked[answer["id"]], ""
            if answer["finish"] != "stop" or not split(answer["text"]).answer:
                why = "did not end"
            elif split(answer["text"]).empty:
                why = "no analysis"
            else:
                with judging(row.id):
                    score = metric(answer["text"], row.reference or "", row.problem)
                why = "" if score.value == 1 else f"reference ({shown_name(self.metric)})"
            if why:
                left.append({**answer, "why": why})
                continue
            lessons.append(
                {
                    "id": row.id,
                    "messages": list(row.messages),
                    "text": answer["text"],
                    "reference": row.reference,
                    "source": "teacher",
                    "row": answer["row"],
                    **({} if row.evolution is None else {"evolution": row.evolution}),
                    **({"guidance": row.guidance} if row.guidance else {}),
                    "task": "correction",
                }
            )
        kept = ctx.path(self.kept, "kept.jsonl").read_text()
        (ctx.out / "kept.jsonl").write_text(kept + _lines(lessons))
        (ctx.out / "rejected.jsonl").write_text(_lines(left))
        yields = [{"filter": "analysis", "in": len(answers), "out": len(lessons)}]
        (ctx.out / "yields.json").write_text(json.dumps(yields, indent=1))
        return {"yields": yields, "corrections": len(lessons)}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
