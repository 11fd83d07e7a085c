"""filter: keep the answers worth learning from, and say what happened to the rest.

In: the view of ``generate``, the prompts. Out: ``kept.jsonl`` (id, messages, text, source), ``rejected.jsonl`` with
the reason, ``yields.json``, and where people's verdicts are a filter ``shown.jsonl``: all that they could have judged.
Where no answer of a prompt passed, ``otherwise = "gold"`` keeps the reference, so that hard prompts stay, and ``"hedge"``
teaches to say that one does not know. Wrong answers may be shown with the right one, as lessons in correcting them.

Prompts go through all filters a few at a time, so that memory does not grow with the answers' text. What grows: where each answer
lies (`Answers`), its grades (`GradeTable`), and what a filter of duplicates keeps of those before (`Seen`, `Vectors`).
``rejected.jsonl`` has the filters in their order, so that of each filter is kept in a nameless file until the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.answers import Answer, Answers, Places, as_line
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
)
from edgedistill.data.grades import GradeTable, judged
from edgedistill.data.language import other_language
from edgedistill.data.near import near_duplicates
from edgedistill.data.prompts import Row
from edgedistill.data.sifting import (
    Block,
    Judge,
    Judged,
    Passed,
    Sieve,
    Sifted,
    Tally,
    best,
    best_first,
    nameless,
    sift,
    taught_line,
)
from edgedistill.data.verdicts import SHOWN, Verdict, remaining, shown_in, shown_key
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.execution import MEMORY_MIB, TIMEOUT_S, at_once, verdict
from edgedistill.evals.metrics import find_metric, judging, shown_name
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Progress, Stage, later, rows_given, unkeyed
from edgedistill.teachers.calls import NO_CALL

Place = Callable[[Key, str], Path]
"""(step, file) -> where that file of its entry is."""


def _as_in(kind: str, where: str) -> str:
    return f"{kind}: as in {where}" if where else ""


def _because(kind: str, why: str) -> str:
    return f"{kind}: {why}" if why else ""


def _with_grades(place: Place, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a filter with the grades themselves in the place of the step that made them."""
    if "grades" not in spec:
        return spec
    steps = [spec["grades"]] if isinstance(spec["grades"], Key) else spec["grades"]
    return {**spec, "grades": GradeTable([place(key, "grades.jsonl") for key in steps])}


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
        with ExitStack() as files:
            answers, failed = self.read(ctx.path)
            files.enter_context(answers)
            files.enter_context(failed)
            watched = self.watch(a["text"] for row in self.rows for a in answers.of(row.id) if a["finish"] == "stop")
            rejected = [files.enter_context(nameless(ctx.out)) for _ in range(1 + len(self.filters) + len(self.last()))]
            yields, sifted = self.sift(
                answers, ctx.path, ctx.progress, lambda at, answer: rejected[at].write(as_line(answer)), ctx.out
            )
            told = self._written(ctx, sifted, failed)
            with (ctx.out / "rejected.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(map(as_line, failed))
                for one in rejected:
                    one.seek(0)
                    shutil.copyfileobj(one, file)
        # How many answers were judged is not in the bytes: one more that is accepted changes nothing of what is taught.
        fixed = [{name: value for name, value in one.items() if name != "reviewed"} for one in yields]
        (ctx.out / "yields.json").write_text(json.dumps(fixed, indent=1))
        tally = told.pop("tally")
        if not (told["kept"] - told.get("hedged", 0) or tally.carried or self.more):
            raise StepFailed(*self.nothing(tally.answers))
        review = self.judged(ctx)
        return {"yields": yields, **told, **watched, **review, **self.counted(tally)}

    def _written(self, ctx: Context, sifted: Iterable[Sifted], failed: Answers) -> dict[str, Any]:
        """Write what is taught, prompt by prompt; return the figures."""
        gold = any(spec["otherwise"] == "gold" for spec in self.filters)
        hedge = next((spec["hedge"] for spec in self.filters if spec["otherwise"] == "hedge"), None)
        most = max((spec.get("corrections", 0) for spec in self.filters), default=0)
        written = dict.fromkeys((self.writer(), *(name for name, _ in (*self.others, *self.recovered))), 0)
        recovery = {name: {"asked": 0, "good": 0} for name, _ in self.recovered}
        from_gold = hedged = edited = smoothed = corrected = carried = prompts = good = asked = 0
        passed = self.tallying()
        with ExitStack() as files:
            file = files.enter_context((ctx.out / "kept.jsonl").open("w", encoding="utf-8"))
            shown = files.enter_context((ctx.out / SHOWN).open("w", encoding="utf-8")) if self.estimates else None
            for one in self.carried(ctx):
                file.write(as_line(one))
                carried += 1
            for one in sifted:
                row = one.row
                asked, prompts, good = asked + len(one.found), prompts + bool(one.found), good + bool(one.alive)
                for name, count in recovery.items():
                    count["asked"] += any(a.get("by") == name for a in one.found)
                    count["good"] += any(a.get("by") == name for a in one.alive)
                if shown is not None:
                    shown.writelines(self._shown(one))
                if passed is not None:
                    passed.add(one.alive)
                chosen = self.chosen(one.alive)
                weights = {a["text"]: a["weight"] for a in chosen if "weight" in a}
                texts = [(a["text"], a.get("source") or a.get("by") or self.writer(), a["row"]) for a in chosen]
                first = dict((text, by) for text, by, _ in reversed(texts))  # what several wrote is the first one's
                texts = [found for found in texts if first[found[0]] == found[1]]
                if not texts and one.found and gold and row.reference and not one.out:
                    texts = [(row.reference, "gold", "")]
                if not texts and one.found and hedge is not None and not one.out:
                    texts = [(hedge, "hedge", "")]
                for number, (text, source, key) in enumerate(dict.fromkeys(texts)):
                    from_gold, hedged = from_gold + (source == "gold"), hedged + (source == "hedge")
                    smoothed += source == "smoothing"
                    edited += source == "review"
                    if source in written:
                        written[source] += 1
                    line = taught_line(row, number, text, source, key)
                    line |= {"prompt": row.id, "weight": weights[text]} if text in weights else {}
                    lessons = self.lessons(line)
                    if number == 0 and most:
                        wrong = wrong_answers([*failed.of(row.id), *one.wrong], most, self.shown)
                        corrections = self.corrections(lessons[0], wrong.get(row.id, []))
                        corrected += len(corrections)
                        lessons += corrections
                    file.writelines(map(as_line, lessons))
        kept: dict[str, Any] = {"kept": sum(written.values()) + from_gold + hedged + edited + smoothed, **written}
        kept |= {"gold": from_gold}
        kept |= {"hedged": hedged} if hedge is not None else {}
        kept |= {"edited": edited} if edited else {}
        kept |= {"smoothing": smoothed} if smoothed else {}
        kept |= {"corrections": corrected} if corrected else {}
        kept |= {"recovery": recovery} if recovery else {}
        return {**kept, "tally": Tally(asked, prompts, good, carried, passed)}

    def sift(
        self,
        answers: Answers,
        place: Place,
        progress: Progress = lambda done, total, what: None,
        reject: Callable[[int, Answer], object] = lambda at, answer: None,
        folder: Path | None = None,
    ) -> tuple[list[dict[str, Any]], Iterator[Sifted]]:
        """Apply the filters in their order (`sift`); grades are read where ``place`` has them. ``reject`` is given what does not
        pass, with the filter's number from 1 on (0: it is no answer at all). What need not be in memory lies in nameless files in
        ``folder``.
        """
        sieves = [Sieve("ended", self.ended)]
        for spec in (_with_grades(place, spec) for spec in self.filters):
            if spec["kind"] == "execution":
                sieves.append(Sieve("execution", at_once=partial(self.executed, spec, progress)))
            elif "vectors" in spec:
                steps = [spec["vectors"]] if isinstance(spec["vectors"], Key) else spec["vectors"]
                near = near_duplicates([place(key, "") for key in steps], spec["similarity"], folder)
                sieves.append(Sieve("duplicates", at_once=near))
            elif spec["kind"] == "review":
                sieves.append(Sieve("review", self.judge(spec), verdicts=self.reviews[spec["file"]]))
            else:
                sieves.append(Sieve(spec["kind"], self.judge(spec, folder)))
        return sift(self.rows, answers, [*sieves, *self.last()], reject, self.reviewable)

    def last(self) -> list[Sieve]:
        """Return what answers go through behind the recipe's filters."""
        return []

    def tallying(self) -> Passed | None:
        """Return what is told of each prompt's answers that passed, for ``counted``."""
        return None

    def ended(self, row: Row, found: list[Answer]) -> Judged:
        """Judge whether something is an answer at all."""
        return [(a, self.flaw(a) or "") for a in found]

    def reviewable(self, row: Row, found: list[Answer]) -> dict[str, str]:
        """Return the keys of answers to a prompt, as people are shown them, each with the first tag of its row, or ""."""
        return {shown_key(row.id, row.messages, row.tools, a["text"]): (row.tags or ("",))[0] for a in found}

    @property
    def estimates(self) -> bool:
        """Tell whether the verdicts say something of the answers that nobody has judged."""
        return bool(self.reviews)

    def _shown(self, one: Sifted) -> Iterator[str]:
        """Yield which of the answers to a prompt could have been judged, as lines."""
        taught = self.reviewable(one.row, one.alive)
        for key, tag in one.shown.items():
            yield json.dumps({"key": key, "tag": tag, "taught": key in taught}) + "\n"

    def judged(self, ctx: Context) -> dict[str, Any]:
        """Say what the verdicts tell of the answers that nobody has judged."""
        if not self.estimates:
            return {}
        verdicts = {key: one for found in self.reviews.values() for key, one in found.items()}
        met = {key for key, _, _ in shown_in(ctx.out) if key in verdicts}
        if gone := len(verdicts.keys() - met):
            ctx.note(
                f"{gone} verdicts are on answers that are no longer there, or not as they were: they count for nothing"
            )
        return {"review": remaining(shown_in(ctx.out), verdicts)}

    def read(self, place: Place) -> tuple[Answers, Answers]:
        """Return the answers to judge by the rows that they answer, those of other teachers with their name as ``by``; and those
        that are rejected already: of prompts that a teacher answered anew.
        """
        answers, failed = Answers(self.rows), Answers(self.rows)
        answers.add(place(self.answers, "rows.jsonl"))
        for by, key in self.others:
            answers.add(place(key, "rows.jsonl"), by)
        for by, key in self.recovered:
            answers.add(place(key, "rows.jsonl"), by, anew=True)
        if self.failed is not None:
            again = (row.id for row in self.rows if answers.anew(row.id))
            known = Places(line["row"] for row_id in again for line in answers.of(row_id))
            failed.add(
                place(self.failed, "rejected.jsonl"),
                wanted=lambda line: answers.anew(line["id"]) and line["row"] not in known,
            )
        return answers, failed

    def writer(self) -> str:
        """Return who wrote the answers."""
        return "teacher"

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return which of the answers to one prompt that passed are kept."""
        return passed

    def carried(self, ctx: Context) -> Iterable[dict[str, Any]]:
        """Return rows that are kept beside the answers."""
        return ()

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that nothing is left to learn from, and what to do."""
        return f"no answer of {answers} passed the filters", 'look at a weaker filter, or set otherwise = "gold"'

    def counted(self, tally: Tally) -> dict[str, Any]:
        """Return further figures of what came in and what passed, by prompt."""
        return {}

    def flaw(self, answer: Mapping[str, Any]) -> str | None:
        """Say why something is no answer at all, before any filter; None where it is one."""
        return {"stop": None, NO_CALL: NO_CALL}.get(answer["finish"], "did not end")

    def judge(self, spec: Mapping[str, Any], folder: Path | None = None) -> Judge:
        """Return what judges the answers to one prompt by one filter; prompts are given in their order, each once."""
        kind = spec["kind"]
        if kind == "best":
            chosen = {key: spec[key] for key in ("keep", "by") if key in spec}
            return lambda row, found: best_first(best(found, **chosen), found)
        if kind == "review":
            verdicts = self.reviews[spec["file"]]
            return lambda row, found: [pair for a in found for pair in self.by_verdict(row, a, verdicts)]
        if kind == "agreement":
            same, share, asked = self.same(spec), spec.get("share", SHARE), spec["samples"]

            def agree(row: Row, found: list[Answer]) -> Judged:
                with judging(row.id):
                    good = agreeing([self.shown(a["text"]) for a in found], same, share, max(asked, len(found)))
                return [(a, "" if one else kind) for a, one in zip(found, good, strict=True)]

            return agree
        if kind == "duplicates":
            seen = Seen(spec.get("similarity", SIMILARITY), folder)
            return lambda row, found: [(a, kind if seen.before("\n".join(self.taught(row, a))) else "") for a in found]
        if kind == "decontaminate":
            suites = Contamination(self.suites, spec.get("words", COPIED_WORDS))
            return lambda row, found: [(a, _as_in(kind, suites.found_in(self.taught(row, a)))) for a in found]
        if "grades" in spec:
            return lambda row, found: judged(spec, spec["grades"], found)
        judge = self.single(spec)
        return lambda row, found: [(a, judge(row, a["text"])) for a in found]

    def executed(self, spec: Mapping[str, Any], progress: Progress, block: Block, left: int) -> Judge:
        """Run the code of the answers to several prompts with their rows' tests, each text once and several at a time; ``left``
        answers come after them.
        """
        timeout, memory = spec.get("timeout", TIMEOUT_S), spec.get("memory", MEMORY_MIB)
        tests = {row.id: row.tests or "" for row, _ in block}
        cases = list(dict.fromkeys((row.id, self.shown(a["text"])) for row, answers in block for a in answers))
        found: dict[tuple[str, str], str] = {}
        ran = at_once(lambda case: verdict(case[1], tests[case[0]], timeout, memory), cases)
        for number, (case, why) in enumerate(zip(cases, ran, strict=True), 1):
            found[case] = why
            progress(number, len(cases) + left, "programs run")
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

    def watch(self, texts: Iterable[str]) -> dict[str, Any]:
        """Look at all answers that ended; raises StepFailed where going on would teach nothing."""
        return {}
