"""filter: keep the answers worth learning from, and say what happened to the rest.

In: the view of ``generate``, the prompts. Out: ``kept.jsonl`` (id, messages, text, source), ``rejected.jsonl`` with
the reason, ``yields.json``. Where no answer of a prompt passed, ``otherwise = "gold"`` keeps the reference, so that
hard prompts stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.evals.metrics import find_metric
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class Filter(Stage):
    """Apply the recipe's filters in order."""

    name: ClassVar[str] = "filter"
    answers: Key
    rows_digest: str
    filters: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Filter, fall back, count."""
        rows = {row.id: row for row in self.rows}
        lines = [json.loads(line) for line in ctx.path(self.answers, "rows.jsonl").read_text().splitlines()]
        answers: dict[str, list[dict[str, Any]]] = {row_id: [] for row_id in rows}
        for line in lines:
            answers[line["id"]].append(line)
        yields: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        gold = {row_id for row_id in rows if any(f["otherwise"] == "gold" for f in self.filters)}
        alive = {row_id: [a for a in found if a["finish"] == "stop"] for row_id, found in answers.items()}
        for found in answers.values():
            rejected += [{**a, "why": "did not end"} for a in found if a["finish"] != "stop"]
        kept = sum(map(len, alive.values()))
        yields.append({"filter": "ended", "in": len(lines), "out": kept})
        for spec in self.filters:
            metric = find_metric(spec["metric"])
            before = sum(map(len, alive.values()))
            for row_id, found in alive.items():
                reference = rows[row_id].reference or ""
                good = [a for a in found if metric(a["text"], reference).value == 1.0]
                rejected += [{**a, "why": f"reference ({spec['metric']})"} for a in found if a not in good]
                alive[row_id] = good
            yields.append({"filter": spec["kind"], "in": before, "out": sum(map(len, alive.values()))})
        from_teacher = from_gold = 0
        with (ctx.out / "kept.jsonl").open("w") as file:
            for row in self.rows:
                texts = [(a["text"], "teacher", a["row"]) for a in alive[row.id]]
                if not texts and row.id in gold and row.reference:
                    texts = [(row.reference, "gold", "")]
                for number, (text, source, key) in enumerate(dict.fromkeys(texts)):
                    from_teacher, from_gold = from_teacher + (source == "teacher"), from_gold + (source == "gold")
                    line = {
                        "id": row.id if number == 0 else f"{row.id}#{number}",
                        "messages": list(row.messages),
                        "text": text,
                        "reference": row.reference,
                        "source": source,
                        "row": key,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        (ctx.out / "rejected.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
        (ctx.out / "yields.json").write_text(json.dumps(yields, indent=1))
        if not from_teacher and not from_gold:
            raise StepFailed(
                f"no answer of {len(lines)} passed the filters", 'look at a weaker filter, or set otherwise = "gold"'
            )
        return {"yields": yields, "kept": from_teacher + from_gold, "teacher": from_teacher, "gold": from_gold}
