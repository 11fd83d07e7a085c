"""filter: keep the answers worth learning from, and say what happened to the rest.

In: the view of ``generate``, the prompts. Out: ``kept.jsonl`` (id, messages, text, source), ``rejected.jsonl`` with
the reason, ``yields.json``, and where people's verdicts are a filter ``shown.jsonl``: all that they could have judged.
Where no answer of a prompt passed, ``otherwise = "gold"`` keeps the reference, so that hard prompts stay, and ``"hedge"``
teaches to say that one does not know. Wrong answers may be shown with the right one, as lessons in correcting them. In a
round few of the answers to a prompt are kept, and rows that were taught before may stand beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

from edgedistill.data.augmenters import REFUSING
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
    supports,
)
from edgedistill.data.grades import judged, read_grades
from edgedistill.data.language import other_language
from edgedistill.data.prompts import Row
from edgedistill.data.recovery import UNWANTED
from edgedistill.data.thinking import AFTER, COLLAPSED, LEAST_WORDS, asking_why, share_of_empty, split
from edgedistill.data.verdicts import Verdict, remaining, shown_key
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.execution import MEMORY_MIB, TIMEOUT_S, at_once, verdict
from edgedistill.evals.metrics import AFTER_THINKING, find_metric, judging, shown_name
from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.step import Context, Progress, Stage, later, rows_given, unkeyed
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


Judge = Callable[[Row, list[dict[str, Any]]], list[tuple[dict[str, Any], str]]]
"""(row, answers to it) -> each answer with why it does not pass, "" where it does, in the order in which they are kept."""


Place = Callable[[Key, str], Path]
"""(step, file) -> where that file of its entry is."""


class Sifted(NamedTuple):
    """What the filters left. ``alive``: answers that passed, by row. ``out``: prompts that are not to be taught, by whatever text.
    ``shown``: the keys of answers that a first filter of verdicts met, each with its row's tag.
    """

    alive: dict[str, list[dict[str, Any]]]
    rejected: list[dict[str, Any]]
    yields: list[dict[str, Any]]
    out: set[str]
    shown: dict[str, str]


def _first(good: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    return [(answer, "") for answer in good] + [(answer, "best") for answer in found if answer not in good]


def _as_in(kind: str, where: str) -> str:
    return f"{kind}: as in {where}" if where else ""


def _because(kind: str, why: str) -> str:
    return f"{kind}: {why}" if why else ""


def _with_grades(place: Place, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a filter with the grades themselves in the place of the step that made them."""
    if "grades" not in spec:
        return spec
    steps = [spec["grades"]] if isinstance(spec["grades"], Key) else spec["grades"]
    return {
        **spec,
        "grades": {row: grade for key in steps for row, grade in read_grades(place(key, "grades.jsonl")).items()},
    }


@dataclass(frozen=True, kw_only=True)
class Filter(Stage):
    """Apply the recipe's filters in order: to ``answers`` and those of ``others`` (name, entry of generate). Where a teacher
    recovered what the ones before it failed, its answers stand in the place of theirs, which ``failed``, the filter before the
    last recovery, rejected.
    """

    name: ClassVar[str] = "filter"
    answers: Key
    rows_digest: str
    filters: tuple[Mapping[str, Any], ...]
    others: tuple[tuple[str, Key], ...] = later(())
    recovered: tuple[tuple[str, Key], ...] = later(())
    failed: Key | None = later(None)
    more: bool = later(False)  # another teacher is asked next, so nothing may be left as well
    prompts: Key | None = later(None)  # the entry of an augmenter that holds the rows
    rows: tuple[Row, ...] = unkeyed()
    suites: Mapping[str, tuple[Row, ...]] = unkeyed(default_factory=dict)  # filters have their digests
    folder: Path = unkeyed(default=Path())  # the recipe's, where the files of metrics lie
    reviews: Mapping[str, Mapping[str, Verdict]] = unkeyed(default_factory=dict)  # by the digests that filters have

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Filter, fall back, count."""
        if self.prompts is not None:
            return replace(self, prompts=None, rows=rows_given(ctx, self.prompts, self.rows)).run(ctx)
        answers, failed = self.read(ctx.path)
        gold = {row.id for row in self.rows if answers[row.id] and any(f["otherwise"] == "gold" for f in self.filters)}
        hedge = next((f["hedge"] for f in self.filters if f["otherwise"] == "hedge"), None)
        watched = self.watch([a["text"] for found in answers.values() for a in found if a["finish"] == "stop"])
        sifted = self.sift(answers, ctx.path, ctx.progress)
        alive, rejected, yields, out, _ = sifted
        rejected = [*failed, *rejected]
        from_gold = hedged = edited = corrected = 0
        written = dict.fromkeys((self.writer(), *(name for name, _ in (*self.others, *self.recovered))), 0)
        most = max((spec.get("corrections", 0) for spec in self.filters), default=0)
        wrong = wrong_answers(rejected, most, self.shown)
        carried = self.carried(ctx)
        with (ctx.out / "kept.jsonl").open("w") as file:
            for one in carried:
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
            for row in self.rows:
                chosen = self.chosen(alive[row.id])
                weights = {a["text"]: a["weight"] for a in chosen if "weight" in a}
                texts = [(a["text"], a.get("source") or a.get("by") or self.writer(), a["row"]) for a in chosen]
                first = dict((text, by) for text, by, _ in reversed(texts))  # what several wrote is the first one's
                texts = [one for one in texts if first[one[0]] == one[1]]
                if not texts and row.id in gold and row.reference and row.id not in out:
                    texts = [(row.reference, "gold", "")]
                if not texts and hedge is not None and answers[row.id] and row.id not in out:
                    texts = [(hedge, "hedge", "")]
                for number, (text, source, key) in enumerate(dict.fromkeys(texts)):
                    from_gold, hedged = from_gold + (source == "gold"), hedged + (source == "hedge")
                    edited += source == "review"
                    if source in written:
                        written[source] += 1
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
                    line |= {"guidance": row.guidance} if row.guidance else {}
                    line |= {"prompt": row.id, "weight": weights[text]} if text in weights else {}
                    lessons = self.lessons(line)
                    if number == 0:
                        corrections = self.corrections(lessons[0], wrong.get(row.id, []))
                        corrected += len(corrections)
                        lessons += corrections
                    for one in lessons:
                        file.write(json.dumps(one, ensure_ascii=False) + "\n")
        (ctx.out / "rejected.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected))
        # How many answers were judged is not in the bytes: one more that is accepted changes nothing of what is taught.
        fixed = [{name: value for name, value in one.items() if name != "reviewed"} for one in yields]
        (ctx.out / "yields.json").write_text(json.dumps(fixed, indent=1))
        taught = sum(written.values())
        if not (taught or from_gold or edited or carried or self.more):
            raise StepFailed(*self.nothing(sum(map(len, answers.values()))))
        kept_rows: dict[str, Any] = {"kept": taught + from_gold + hedged + edited, **written, "gold": from_gold}
        kept_rows |= {"hedged": hedged} if hedge is not None else {}
        kept_rows |= {"edited": edited} if edited else {}
        kept_rows |= {"corrections": corrected} if corrected else {}
        if self.recovered:
            kept_rows["recovery"] = {
                name: {
                    "asked": sum(any(a.get("by") == name for a in found) for found in answers.values()),
                    "good": sum(any(a.get("by") == name for a in found) for found in alive.values()),
                }
                for name, _ in self.recovered
            }
        told = self.judged(ctx, sifted)
        return {"yields": yields, **kept_rows, **watched, **told, **self.counted(answers, alive, carried)}

    def sift(
        self,
        answers: Mapping[str, list[dict[str, Any]]],
        place: Place,
        progress: Progress = lambda done, total, what: None,
    ) -> Sifted:
        """Apply the filters in their order; grades are read where ``place`` has them."""
        rows = {row.id: row for row in self.rows}
        alive = {row_id: [a for a in found if self.flaw(a) is None] for row_id, found in answers.items()}
        rejected = [
            {**a, "why": flaw} for found in answers.values() for a in found if (flaw := self.flaw(a)) is not None
        ]
        kept = sum(map(len, alive.values()))
        yields: list[dict[str, Any]] = [{"filter": "ended", "in": sum(map(len, answers.values())), "out": kept}]
        out: set[str] = set()
        shown: dict[str, str] = {}
        for spec in self.filters:
            before, spec = sum(map(len, alive.values())), _with_grades(place, spec)
            judge = self.executed(spec, rows, alive, progress) if spec["kind"] == "execution" else self.judge(spec)
            if spec["kind"] == "review":
                seen = self.reviewable(alive)
                shown = shown or seen
            for row_id, found in alive.items():
                judged = judge(rows[row_id], found)
                rejected += [{**a, "why": why} for a, why in judged if why]
                alive[row_id] = [a for a, why in judged if not why]
                if found and not alive[row_id] and spec["kind"] in UNWANTED:
                    out.add(row_id)
            line: dict[str, Any] = {"filter": spec["kind"], "in": before, "out": sum(map(len, alive.values()))}
            if spec["kind"] == "review":
                line["reviewed"] = len(seen.keys() & self.reviews[spec["file"]].keys())
                line["rejected"] = before - line["out"]
                line["edited"] = sum(a.get("source") == "review" for found in alive.values() for a in found)
            yields.append(line)
        return Sifted(alive, rejected, yields, out, shown)

    def reviewable(self, alive: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
        """Return the keys of answers, as people are shown them, each with the first tag of its row, or ""."""
        return {
            shown_key(row.id, row.messages, row.tools, a["text"]): (row.tags or ("",))[0]
            for row in self.rows
            for a in alive[row.id]
        }

    def judged(self, ctx: Context, sifted: Sifted) -> dict[str, Any]:
        """Say what the verdicts tell of the answers that nobody has judged, and write down which could have been."""
        if not self.reviews:
            return {}
        taught = self.reviewable(sifted.alive).keys()
        shown = [(key, tag, key in taught) for key, tag in sifted.shown.items()]
        verdicts = {key: one for found in self.reviews.values() for key, one in found.items()}
        lines = (json.dumps({"key": key, "tag": tag, "taught": left}) for key, tag, left in shown)
        (ctx.out / "shown.jsonl").write_text("".join(line + "\n" for line in lines))
        if gone := len(verdicts.keys() - sifted.shown.keys()):
            ctx.note(
                f"{gone} verdicts are on answers that are no longer there, or not as they were: they count for nothing"
            )
        return {"review": remaining(shown, verdicts)}

    def read(self, place: Place) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
        """Return the answers to judge by the rows that they answer, those of other teachers with their name as ``by``; and those
        that are rejected already: of prompts that a teacher answered anew.
        """

        def lines(key: Key, name: str, by: str = "") -> list[dict[str, Any]]:
            found = (json.loads(line) for line in json_lines(place(key, name)))
            return [{**line, "by": by} if by else line for line in found]

        answers = lines(self.answers, "rows.jsonl")
        for by, key in self.others:
            answers += lines(key, "rows.jsonl", by)
        anew: list[dict[str, Any]] = []
        for by, key in self.recovered:
            own = lines(key, "rows.jsonl", by)
            asked = {line["id"] for line in own}
            answers = [line for line in answers if line["id"] not in asked]
            anew = [line for line in anew if line["id"] not in asked] + own
        found: dict[str, list[dict[str, Any]]] = {row.id: [] for row in self.rows}
        for line in answers + anew:
            found[line["id"]].append(line)
        if self.failed is None:
            return found, []
        again, judged = {line["id"] for line in anew}, {line["row"] for line in anew}
        known = lines(self.failed, "rejected.jsonl")
        return found, [line for line in known if line["id"] in again and line["row"] not in judged]

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
        if kind == "review":
            verdicts = self.reviews[spec["file"]]
            return lambda row, found: [pair for a in found for pair in self.by_verdict(row, a, verdicts)]
        if kind == "agreement":
            same, share, asked = self.same(spec), spec.get("share", SHARE), spec["samples"]

            def agree(row: Row, found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
                with judging(row.id):
                    good = agreeing([self.shown(a["text"]) for a in found], same, share, max(asked, len(found)))
                return [(a, "" if one else kind) for a, one in zip(found, good, strict=True)]

            return agree
        if kind == "duplicates":
            seen = Seen(spec.get("similarity", SIMILARITY))
            return lambda row, found: [(a, kind if seen.before("\n".join(self.taught(row, a))) else "") for a in found]
        if kind == "decontaminate":
            suites = Contamination(self.suites, spec.get("words", COPIED_WORDS))
            return lambda row, found: [(a, _as_in(kind, suites.found_in(self.taught(row, a)))) for a in found]
        if "grades" in spec:
            return lambda row, found: judged(spec, spec["grades"], found)
        judge = self.single(spec)
        return lambda row, found: [(a, judge(row, a["text"])) for a in found]

    def executed(
        self,
        spec: Mapping[str, Any],
        rows: Mapping[str, Row],
        alive: Mapping[str, list[dict[str, Any]]],
        progress: Progress,
    ) -> Judge:
        """Run the code of all answers with their rows' tests, each text once and several at a time."""
        timeout, memory = spec.get("timeout", TIMEOUT_S), spec.get("memory", MEMORY_MIB)
        cases = list(dict.fromkeys((row_id, self.shown(a["text"])) for row_id, found in alive.items() for a in found))
        found: dict[tuple[str, str], str] = {}
        ran = at_once(lambda case: verdict(case[1], rows[case[0]].tests or "", timeout, memory), cases)
        for number, (case, why) in enumerate(zip(cases, ran, strict=True), 1):
            found[case] = why
            progress(number, len(cases), "programs run")
        return lambda row, answers: [(a, _because("execution", found[row.id, self.shown(a["text"])])) for a in answers]

    def by_verdict(
        self, row: Row, answer: dict[str, Any], verdicts: Mapping[str, Verdict]
    ) -> list[tuple[dict[str, Any], str]]:
        """Return an answer as a person left it; one that was edited is rejected, and the edited one stands beside it."""
        one = verdicts.get(shown_key(row.id, row.messages, row.tools, answer["text"]))
        if one is None or one.verdict == "accept":
            return [(answer, "")]
        if one.verdict == "reject":
            return [(answer, _because("review", one.reason) or "review")]
        edited = {**answer, "text": one.text, "source": "review", "row": ""}
        return [(answer, "review: edited"), (edited, "")]

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
            return lambda row, text: kind if REFUSING not in row.tags and refuses(self.shown(text)) else ""
        if kind == "language":
            languages = spec["languages"]
            return lambda row, text: _because(kind, other_language(self.shown(text), languages))
        if kind == "pii":
            return lambda row, text: _because(kind, personal(text))
        why = f"reference ({shown_name(spec['metric'])})" if kind == "reference" else kind
        none = "" if spec.get("missing") == "pass" else "no reference"

        def told(row: Row, text: str) -> str:
            if kind == "reference" and row.reference is None and not row.problem:
                return none
            with judging(row.id):
                return "" if self.passes(spec, text, row.reference or "", row.problem) else why

        return told

    def same(self, spec: Mapping[str, Any]) -> Callable[[str, str], bool]:
        """Return what tells whether two answers say the same."""
        metric = find_metric(spec["metric"], self.folder)

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
        return find_metric(spec["metric"], self.folder)(text, reference, problem).value == 1.0

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
        return find_metric(AFTER_THINKING + spec["metric"], self.folder)(text, reference, problem).value == 1.0

    def single(self, spec: Mapping[str, Any]) -> Callable[[Row, str], str]:
        """Return what says why one answer does not pass a filter: of thinking, too, that it comes to something else."""
        judge = super().single(spec)
        if not spec.get("supports"):
            return judge
        return lambda row, text: judge(row, text) or ("" if supports(text) else "thinking: does not come to the answer")

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

    def judged(self, ctx: Context, sifted: Sifted) -> dict[str, Any]:
        """Say nothing: other answers were shown. Where one is word for word the same, its verdict counts."""
        return {}

    def carried(self, ctx: Context) -> list[dict[str, Any]]:
        """Return the rows that are taught again, under ids of their own: their prompts may be answered anew."""
        if self.before is None:
            return []
        lines = [json.loads(line) for line in json_lines(ctx.path(self.before, "kept.jsonl"))]
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
