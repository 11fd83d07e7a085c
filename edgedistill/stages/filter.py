"""filter: keep the answers worth learning from, and say what happened to the rest.

In: the view of ``generate``, the prompts. Out: ``kept.jsonl`` (id, messages, text, source), ``rejected.jsonl`` with
the reason, ``yields.json``. Where no answer of a prompt passed, ``otherwise = "gold"`` keeps the reference, so that
hard prompts stay, and ``"hedge"`` teaches to say that one does not know. Wrong answers may be shown with the right one, as
lessons in correcting them. In a round few of the answers to a prompt are kept, and rows that were taught before may stand
beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from edgedistill.data.corrections import objection, wrong_answers
from edgedistill.data.filters import (
    COPIED_WORDS,
    SHARE,
    SIMILARITY,
    Contamination,
    Seen,
    agreeing,
    asked_in,
    malformed,
    personal,
    refuses,
    schema_validator,
)
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import AFTER, COLLAPSED, LEAST_WORDS, asking_why, share_of_empty, split
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.metrics import AFTER_THINKING, find_metric
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, unkeyed
from edgedistill.teachers.calls import NO_CALL


def best(found: list[dict[str, Any]], keep: int = 1, by: str = "likelihood") -> list[dict[str, Any]]:
    """Return ``keep`` of the answers to one prompt whose texts differ: the likeliest as a whole, the shortest, or, ``drawn``, the
    first, which is a fair draw.
    """
    first: dict[str, dict[str, Any]] = {}
    for answer in found:
        first.setdefault(answer["text"], answer)
    order = {"likelihood": lambda a: -a["logprob"], "shortest": lambda a: len(a["text"]), "drawn": lambda a: 0}
    return sorted(first.values(), key=order[by])[:keep]


UNWANTED = ("duplicates", "decontaminate", "pii")
"""Filters whose rejected rows are not taught by their reference or a hedge either: there is nothing wrong with the teacher."""
Judge = Callable[[Row, list[dict[str, Any]]], list[tuple[dict[str, Any], str]]]
"""(row, answers to it) -> each answer with why it does not pass, "" where it does, in the order in which they are kept."""


def _first(good: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    return [(answer, "") for answer in good] + [(answer, "best") for answer in found if answer not in good]


def _as_in(kind: str, where: str) -> str:
    return f"{kind}: as in {where}" if where else ""


def _because(kind: str, why: str) -> str:
    return f"{kind}: {why}" if why else ""


@dataclass(frozen=True, kw_only=True)
class Filter(Stage):
    """Apply the recipe's filters in order."""

    name: ClassVar[str] = "filter"
    answers: Key
    rows_digest: str
    filters: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...] = unkeyed()
    suites: Mapping[str, tuple[Row, ...]] = unkeyed(default_factory=dict)  # filters have their digests

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Filter, fall back, count."""
        rows = {row.id: row for row in self.rows}
        lines = [json.loads(line) for line in ctx.path(self.answers, "rows.jsonl").read_text().splitlines()]
        answers: dict[str, list[dict[str, Any]]] = {row_id: [] for row_id in rows}
        for line in lines:
            answers[line["id"]].append(line)
        yields: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        gold = {row_id for row_id in rows if answers[row_id] and any(f["otherwise"] == "gold" for f in self.filters)}
        hedge = next((f["hedge"] for f in self.filters if f["otherwise"] == "hedge"), None)
        alive = {row_id: [a for a in found if self.flaw(a) is None] for row_id, found in answers.items()}
        for found in answers.values():
            rejected += [{**a, "why": flaw} for a in found if (flaw := self.flaw(a)) is not None]
        kept = sum(map(len, alive.values()))
        yields.append({"filter": "ended", "in": len(lines), "out": kept})
        watched = self.watch([a["text"] for found in answers.values() for a in found if a["finish"] == "stop"])
        out: set[str] = set()  # prompts that are not to be taught, by whatever text
        for spec in self.filters:
            before, judge = sum(map(len, alive.values())), self.judge(spec)
            for row_id, found in alive.items():
                judged = judge(rows[row_id], found)
                rejected += [{**a, "why": why} for a, why in judged if why]
                alive[row_id] = [a for a, why in judged if not why]
                if found and not alive[row_id] and spec["kind"] in UNWANTED:
                    out.add(row_id)
            yields.append({"filter": spec["kind"], "in": before, "out": sum(map(len, alive.values()))})
        written = from_gold = hedged = corrected = 0
        most = max((spec.get("corrections", 0) for spec in self.filters), default=0)
        wrong = wrong_answers(rejected, most, self.shown)
        carried = self.carried(ctx)
        with (ctx.out / "kept.jsonl").open("w") as file:
            for one in carried:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
            for row in self.rows:
                texts = [(a["text"], self.writer(), a["row"]) for a in self.chosen(alive[row.id])]
                if not texts and row.id in gold and row.reference and row.id not in out:
                    texts = [(row.reference, "gold", "")]
                if not texts and hedge is not None and answers[row.id] and row.id not in out:
                    texts = [(hedge, "hedge", "")]
                for number, (text, source, key) in enumerate(dict.fromkeys(texts)):
                    from_gold, hedged = from_gold + (source == "gold"), hedged + (source == "hedge")
                    written += source not in ("gold", "hedge")
                    line = {
                        "id": row.id if number == 0 else f"{row.id}#{number}",
                        "messages": list(row.messages),
                        "text": text,
                        "reference": row.reference,
                        "source": source,
                        "row": key,
                        **({} if row.evolution is None else {"evolution": row.evolution}),
                    }
                    line |= {"tools": list(row.tools)} if row.tools else {}
                    line |= {"trace": row.trace} if row.trace else {}
                    lessons = self.lessons(line)
                    if number == 0:
                        corrections = self.corrections(lessons[0], wrong.get(row.id, []))
                        corrected += len(corrections)
                        lessons += corrections
                    for one in lessons:
                        file.write(json.dumps(one, ensure_ascii=False) + "\n")
        (ctx.out / "rejected.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
        (ctx.out / "yields.json").write_text(json.dumps(yields, indent=1))
        if not written and not from_gold and not carried:
            raise StepFailed(*self.nothing(len(lines)))
        kept_rows = {"kept": written + from_gold + hedged, self.writer(): written, "gold": from_gold}
        kept_rows |= {"hedged": hedged} if hedge is not None else {}
        kept_rows |= {"corrections": corrected} if corrected else {}
        return {"yields": yields, **kept_rows, **watched, **self.counted(answers, alive, carried)}

    def writer(self) -> str:
        """Return who wrote the answers."""
        return "teacher"

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return which of the answers to one prompt that passed are kept."""
        return passed

    def carried(self, ctx: Context) -> list[dict[str, Any]]:
        """Return rows that are kept beside the answers."""
        return []

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that nothing is left to learn from, and what to do."""
        return f"no answer of {answers} passed the filters", 'look at a weaker filter, or set otherwise = "gold"'

    def counted(
        self, answers: Mapping[str, list[Any]], passed: Mapping[str, list[Any]], carried: list[Any]
    ) -> dict[str, Any]:
        """Return further figures of what came in and what passed, by prompt."""
        return {}

    def flaw(self, answer: Mapping[str, Any]) -> str | None:
        """Say why something is no answer at all, before any filter; None where it is one."""
        return {"stop": None, NO_CALL: NO_CALL}.get(answer["finish"], "did not end")

    def judge(self, spec: Mapping[str, Any]) -> Judge:
        """Return what judges the answers to one prompt by one filter."""
        kind = spec["kind"]
        if kind == "best":
            chosen = {key: spec[key] for key in ("keep", "by") if key in spec}
            return lambda row, found: _first(best(found, **chosen), found)
        if kind == "agreement":
            same, share, asked = self.same(spec), spec.get("share", SHARE), spec["samples"]

            def believed(found: list[dict[str, Any]]) -> list[bool]:
                return agreeing([self.shown(a["text"]) for a in found], same, share, asked)

            return lambda row, found: [
                (a, "" if good else kind) for a, good in zip(found, believed(found), strict=True)
            ]
        if kind == "duplicates":
            seen = Seen(spec.get("similarity", SIMILARITY))
            return lambda row, found: [(a, kind if seen.before("\n".join(self.taught(row, a))) else "") for a in found]
        if kind == "decontaminate":
            suites = Contamination(self.suites, spec.get("words", COPIED_WORDS))
            return lambda row, found: [(a, _as_in(kind, suites.found_in(self.taught(row, a)))) for a in found]
        judge = self.single(spec)
        return lambda row, found: [(a, judge(row, a["text"])) for a in found]

    def taught(self, row: Row, answer: Mapping[str, Any]) -> list[str]:
        """Return what users say in a row, and the answer that they see."""
        return [*asked_in(row), self.shown(answer["text"])]

    def single(self, spec: Mapping[str, Any]) -> Callable[[Row, str], str]:
        """Return what says why one answer does not pass a filter that looks at nothing else."""
        kind = spec["kind"]
        if kind == "format":
            form: dict[str, Any] = {key: spec[key] for key in ("min_chars", "max_chars", "pattern") if key in spec}
            if "json_schema" in spec:
                form["validator"] = schema_validator(json.loads(spec["json_schema"]))
            return lambda row, text: _because(kind, malformed(self.shown(text), **form))
        if kind == "refusals":
            return lambda row, text: kind if refuses(self.shown(text)) else ""
        if kind == "pii":
            return lambda row, text: _because(kind, personal(text))
        why = f"reference ({spec['metric']})" if kind == "reference" else kind
        return lambda row, text: "" if self.passes(spec, text, row.reference or "", row.reasoning_gym) else why

    def same(self, spec: Mapping[str, Any]) -> Callable[[str, str], bool]:
        """Return what tells whether two answers say the same."""
        metric = find_metric(spec["metric"])

        def alike(one: str, other: str) -> bool:
            if one.strip() == other.strip():
                return True
            try:
                return metric(one, other, None).value == 1.0
            except UsageError:  # the other is no reference: no JSON, say
                return False

        return alike

    def passes(
        self, spec: Mapping[str, Any], text: str, reference: str, problem: Mapping[str, Any] | None = None
    ) -> bool:
        """Tell whether one answer is right."""
        return find_metric(spec["metric"])(text, reference, problem).value == 1.0

    def lessons(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the student learns from one kept answer."""
        return [line]

    def shown(self, text: str) -> str:
        """Return what a user sees of an answer."""
        return text

    def corrections(self, right: dict[str, Any], wrong: list[str]) -> list[dict[str, Any]]:
        """Return a lesson for each wrong answer: it stands in the conversation, the user objects, and the right one is learnt."""
        return [
            {
                **right,
                "id": f"{right['id']}+fix{number}",
                "messages": objection(right["messages"], shown),
                "task": "correction",
            }
            for number, shown in enumerate(wrong, 1)
        ]

    def watch(self, texts: list[str]) -> dict[str, Any]:
        """Look at all answers that ended; raises StepFailed where going on would teach nothing."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ThinkingFilter(Filter):
    """Filter answers that think first: by what stands after the block, and by the block."""

    style: str

    def flaw(self, answer: Mapping[str, Any]) -> str | None:
        """Say why something is no answer at all: it did not end, or its block did not."""
        place = "before" if self.style in AFTER else "after"
        return super().flaw(answer) or (None if split(answer["text"]).answer else f"no answer {place} the block")

    def shown(self, text: str) -> str:
        """Return the answer without its block: what a user sees of it."""
        return split(text).answer

    def passes(
        self, spec: Mapping[str, Any], text: str, reference: str, problem: Mapping[str, Any] | None = None
    ) -> bool:
        """Tell whether one answer passes one filter."""
        if spec["kind"] == "thinking":
            words, most = split(text).words, spec.get("max_words")
            return words >= spec.get("min_words", LEAST_WORDS) and (most is None or words <= most)
        return find_metric(AFTER_THINKING + spec["metric"])(text, reference, problem).value == 1.0

    def lessons(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the text whole, or in the style ``rationale`` the answer, and the rationale as a task of its own."""
        if self.style != "rationale":
            return [line]
        own, gold = split(line["text"]), split(line["reference"] or "")
        answer = {**line, "text": own.answer, "reference": gold.answer or None}
        if own.empty:
            return [answer]
        why = {
            **line,
            "id": f"{line['id']}+why",
            "messages": asking_why(line["messages"]),
            "text": own.thinking,
            "reference": None if gold.empty else gold.thinking,
            "task": "rationale",
        }
        return [answer, why]

    def watch(self, texts: list[str]) -> dict[str, Any]:
        """Measure how much is thought. Thinking that has collapsed in the teacher's answers cannot be taught."""
        empty = share_of_empty(texts)
        if empty > COLLAPSED:
            raise StepFailed(
                f"thinking has collapsed: {empty:.0%} of the {self.writer()}'s {len(texts)} answers have an empty block, or none",
                'give adapt.files rows with a "rationale", allow more generate.max_new_tokens, or set generate.style = "answer"'
                if self.writer() == "teacher"
                else "weigh thinking up (distill.think_weight), or lower the round's temperature",
            )
        return {
            "thinking": {
                "n": len(texts),
                "empty": empty,
                "median_words": median([split(t).words for t in texts] or [0]),
            }
        }


@dataclass(frozen=True, kw_only=True)
class RoundFilter(Filter):
    """Filter the answers of a round, written by the teacher or the student (``by``): of each prompt the first ``keep`` texts that
    pass and differ stay. Samples are independent draws, so the first is a fair draw from those that pass.

    A share ``replay`` of the rows that were taught ``before``, evenly spaced, stands beside them.
    """

    by: str
    keep: int
    before: Key | None
    replay: float

    def writer(self) -> str:
        """Return who wrote the answers."""
        return self.by

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first ``keep`` of those whose texts differ."""
        return best(passed, self.keep, "drawn")

    def carried(self, ctx: Context) -> list[dict[str, Any]]:
        """Return the rows that are taught again, under ids of their own: their prompts may be answered anew."""
        if self.before is None:
            return []
        lines = [json.loads(line) for line in ctx.path(self.before, "kept.jsonl").read_text().splitlines()]
        count = round(self.replay * len(lines))
        again = [lines[at * len(lines) // count] for at in range(count)]
        return [{**line, "id": f"{line['id']}+before"} for line in again]

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that the round teaches nothing, and what to do."""
        if answers:
            return super().nothing(answers)
        return "the student fails none of the prompts: this round has nothing to teach", "take the [[round]] out"

    def counted(
        self, answers: Mapping[str, list[Any]], passed: Mapping[str, list[Any]], carried: list[Any]
    ) -> dict[str, Any]:
        """Return how many prompts were put, how many of them have an answer that passes, and how many rows were carried over."""
        return {
            "asked": sum(map(len, answers.values())),
            "prompts": sum(map(bool, answers.values())),
            "good": sum(map(bool, passed.values())),
            "replayed": len(carried),
        }


@dataclass(frozen=True, kw_only=True)
class ThinkingRoundFilter(ThinkingFilter, RoundFilter):
    """Filter the answers of a round that think first."""
