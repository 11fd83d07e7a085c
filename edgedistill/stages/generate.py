"""generate: the teacher answers the prompts.

In: teacher (a checkpoint, a GGUF file or a server), prompts. Out: ``rows.jsonl``, a view of the row store: one line a (prompt,
sample) with the row's key. Answers go to the row store as they arrive, keyed by what was asked of whom, so a killed run loses the
batch in flight only and no other recipe asks again. Shards are fixed from the sorted list of questions before the
first is put. The batch size is not in the key: batches change the last bit of a bf16 logit, and that is not worth
buying every answer again. In an online round only the prompts that the student fails are put; to be told of its mistakes, the
teacher is put those that it failed itself."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgedistill.asked import asked, conversation, stored_answer
from edgedistill.chat import Chat
from edgedistill.data.prompts import Row, appended
from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import Key
from edgedistill.jsonl import Lines, each_line, whole
from edgedistill.rows import PIECE, Answered, Question, Questions
from edgedistill.sequences import Aside, Made
from edgedistill.served import Server
from edgedistill.step import Context, Stage, later, rows_given, unkeyed

if TYPE_CHECKING:
    from edgedistill.teachers.claims import Put
    from edgedistill.teachers.llama_cpp import LlamaCppTeacher
    from edgedistill.teachers.openai import OpenAITeacher
    from edgedistill.teachers.protocol import Answer


@dataclass(frozen=True, kw_only=True)
class Generate(Stage):
    """Ask the teacher every prompt ``samples`` times; ``scores`` is its evaluation, which must reach ``min_score``."""

    name: ClassVar[str] = "generate"
    deterministic: ClassVar[bool] = False
    teacher: Key
    rows_digest: str
    style: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    json_schema: str = later("")  # nothing but JSON that it allows can be written
    manner: str = later("")  # the server's, where it runs these very weights
    only: tuple[str, ...] = later(())  # tags: the prompts that have one of them are put
    leave: tuple[str, ...] = later(())  # tags: the prompts that have one of them are another teacher's
    prompts: Key | None = later(None)  # the entry of an augmenter that holds the rows
    ask: str = later("")  # the end of each prompt, that asks for something else than its answer
    # (ask, json_schema) of the samples after the first, where they are asked otherwise
    turned: tuple[tuple[str, str], ...] = later(())
    template: str = later("")  # digest of that which makes text of a server's calls; the row store has the calls
    rows: tuple[Row, ...] = unkeyed()
    batch_size: int = unkeyed()
    scores: Key | None = unkeyed()
    pilot: tuple[Key, Key] | None = unkeyed(default=None)  # answers to a share, and what the filters kept of them
    min_score: Mapping[str, float] = unkeyed()
    server: Server | None = unkeyed(default=None)  # the teacher's, where its weights are not here
    chat: Chat | None = unkeyed(default=None)  # what ``template`` is the digest of

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prove the teacher, ask what is not stored yet, write the view."""
        self._prove(ctx)
        rows = self.to_ask(ctx)
        if self.pilot is not None:
            self._tell(ctx, len(rows))
        every = range(len(rows) * self.samples)

        def put(at: int) -> tuple[tuple[tuple[Any, ...], ...], int]:
            number, sample = divmod(at, self.samples)
            return self._put(rows[number], sample), sample

        questions = self._questions(ctx, Made(every, put))
        found = self._ask_missing(ctx, questions, Made(every, lambda at: rows[at // self.samples].id))
        tokens, stored = 0, dict[str, Answered]()
        with (ctx.out / "rows.jsonl").open("w", encoding="utf-8") as file, ctx.rows.held():
            for index, key in enumerate(questions.keys()):
                if index % PIECE == 0:  # all at once would take as much memory as all tokens, many times over
                    stored.clear()
                    stored = ctx.rows.get(questions.keys()[index : index + PIECE])
                answer = stored[key]
                tokens += answer.count
                text, finish = self.shown(questions[index], answer) if answer.calls else (answer.text, answer.finish)
                line = {
                    "id": rows[index // self.samples].id,
                    "row": key,
                    "sample": index % self.samples,
                    "text": text,
                    "finish": finish,
                    "logprob": round(answer.logprob, 4),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        asked, waited = found.count, {"waited": round(found.waited, 1)} if found.waited else {}
        return {"rows": len(questions), "asked": asked, "from_store": len(questions) - asked, "tokens": tokens} | waited

    def _questions(self, ctx: Context, asks: Sequence[tuple[tuple[tuple[Any, ...], ...], int]]) -> Questions:
        """Return what is asked, (messages, number of the sample), as the row store keys it."""
        ways = [
            (
                ("max_new_tokens", self.max_new_tokens),
                ("style", self.style),
                ("temperature", self.temperature),
                ("top_p", self.top_p),
                *((name, value) for name, value in (("json_schema", schema), ("manner", self.manner)) if value),
            )
            for _, schema in self._ways()
        ]
        teacher = ctx.entries[self.teacher].digest

        def make(at: int) -> Question:
            messages, sample = asks[at]
            how = ways[sample % len(ways)]
            return Question(teacher=teacher, messages=messages, sampling=how, seed=self.seed, sample=sample)

        return Questions(Made(range(len(asks)), make))

    def _ways(self) -> tuple[tuple[str, str], ...]:
        """Return what the samples of a prompt are asked in turn, and what they can write."""
        return ((self.ask, self.json_schema), *self.turned)

    def _put(self, row: Row, sample: int) -> tuple[tuple[Any, ...], ...]:
        """Return a row as it is put for one sample, as the row store keys it."""
        ways = self._ways()
        ask, _ = ways[sample % len(ways)]
        return asked(replace(row, messages=tuple(appended(row.messages, ask))) if ask else row)

    def _ask_missing(self, ctx: Context, questions: Questions, ids: Sequence[str]) -> Put:
        """Put the questions that the row store has no answer to and no other build puts, and wait for those. ``ids`` are the rows'
        that they are about, for messages: teachers know them by their keys.
        """
        from edgedistill.teachers.claims import Put, ask_once

        missing = ctx.rows.missing(questions.keys())
        if not missing:
            return Put()
        here = self.server is None and not self._file(ctx).is_file()
        put, total, rest = self._ask if here else self._ask_as_they_end, len(questions), questions.some(missing)

        def ask(numbers: Sequence[int], others: int = 0) -> None:
            own = rest if len(numbers) == len(rest) else rest.some(numbers)
            put(ctx, own, total - len(own) - others, total)

        def wait(others: int) -> None:
            ctx.progress(total - others, total, f"answers, {others:,} asked by another build")

        try:
            if self.server is not None and self.server.batch is not None:  # batches look after themselves
                ask(range(len(rest)))
                return Put(count=len(rest))
            return ask_once(ctx.rows.path, rest.keys(), ask, note=ctx.note, waiting=wait)
        except (UsageError, StepFailed) as error:
            kind = StepFailed if isinstance(error, StepFailed) else UsageError
            for key, row_id in zip(questions.keys(), ids, strict=True):
                if key in error.message:
                    raise kind(error.message.replace(key, row_id), error.hint) from None
            raise

    def shown(self, question: Question, answer: Answered) -> tuple[str, str]:
        """Return the text of an answer that has calls, with them as the student is to write them, and why it ended."""
        if self.chat is None:
            return answer.text, answer.finish
        from edgedistill.teachers.calls import NO_CALL, write_calls

        text, good = write_calls(*conversation(question.messages), answer.text, answer.calls, self.chat.render)
        return whole(text), answer.finish if good or answer.finish != "stop" else NO_CALL

    def to_ask(self, ctx: Context) -> Sequence[Row]:
        """Return the rows whose prompts are put."""
        own, others, rows = set(self.only), set(self.leave), rows_given(ctx, self.prompts, self.rows)
        return tuple(row for row in rows if not others & set(row.tags) and (not own or own & set(row.tags)))

    def _tell(self, ctx: Context, prompts: int) -> None:
        """Say what the pilot tells of all prompts: rows that will be kept, tokens, the time (loading a model counts in
        it, so it is rather too long), and money where tokens have a price.
        """
        from edgedistill.data.stats import answered

        assert self.pilot is not None
        answers, filtered = self.pilot
        facts = ctx.facts(answers)
        asked = {json.loads(line)["id"] for line in each_line(ctx.path(answers, "rows.jsonl"))}
        kept = len(answered(map(json.loads, each_line(ctx.path(filtered, "kept.jsonl"))), asked))
        few = max(1, len(asked))
        tokens = facts["tokens"] * prompts / few
        told = f"pilot: {kept} of {few} prompts have an answer that passes; of all {prompts} about {round(kept * prompts / few):,}"
        told += f", {round(tokens):,} tokens of answers"
        if facts["asked"]:  # of what the row store had, no time is known
            seconds = ctx.entries[answers].seconds - facts.get("waited", 0.0)
            told += f", about {seconds / facts['asked'] * prompts * self.samples / 60:.1f} min"
        price = self.server.batch_budget.output if self.server else 0.0
        ctx.note(told + (f", {tokens * price / 1e6:.3g} money for them at the price" if price else ""))

    def _prove(self, ctx: Context) -> None:
        if self.scores is None:
            return
        suites = ctx.facts(self.scores)["suites"]
        for suite, least in self.min_score.items():
            score = suites[suite]["score"]
            if score["value"] < least:
                raise StepFailed(
                    f"the teacher scores {score['value']:.3f} on {suite} (n = {score['n']}), under "
                    f"teacher.min_score.{suite} = {least}: nothing is generated",
                    "train the teacher longer ([adapt]), take a better one, or lower teacher.min_score",
                )

    def _ask(self, ctx: Context, questions: Questions, found: int, total: int) -> None:
        """Put the questions in fixed shards; each shard is stored before the next is asked."""
        from edgedistill.teachers.protocol import Sampling
        from edgedistill.teachers.transformers import TransformersTeacher

        teacher = TransformersTeacher(ctx.path(self.teacher, "model"))
        prompts, lengths = Aside(ctx.work), array("I")
        for start in range(0, len(questions), PIECE):
            keys = questions.keys()[start : start + PIECE]
            shown = [conversation(question.messages) for question in questions[start : start + PIECE]]
            encoded = teacher.encode([messages for messages, _ in shown], keys, tools=[tools for _, tools in shown])
            teacher.refuse_long(encoded, keys, self.max_new_tokens)  # the longest are put last, hours later
            for ids in encoded:
                prompts.add(array("I", ids).tobytes())
                lengths.append(len(ids))
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
        order = sorted(range(len(questions)), key=lambda i: (lengths[i], questions.key(i)))
        shards = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        done = found
        for shard in shards:
            put = [questions[i] for i in shard]
            ctx.rows.asking(put)
            # The row id is the question's key, which holds the number of the sample: so each question is one sample.
            answers = teacher.generate(
                [array("I", prompts[i]) for i in shard],
                sampling=sampling,
                row_ids=[question.key for question in put],
                batch_size=self.batch_size,
            )
            ctx.rows.add((put[answer.index], stored_answer(answer, answer.row_id)) for answer in answers)
            done += len(shard)
            ctx.progress(done, total, "answers")

    def _file(self, ctx: Context) -> Path:
        """Return where the teacher's GGUF file is, if llama.cpp runs it."""
        return ctx.path(self.teacher, "model.gguf")

    def _ask_as_they_end(self, ctx: Context, questions: Questions, found: int, total: int) -> None:
        """Put the questions to a server or to llama.cpp, some at a time; each answer is stored when it is there."""
        from edgedistill.teachers.protocol import Sampling

        sampling = Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
        done = found

        def store(answers: list[Answer]) -> None:
            nonlocal done
            ctx.rows.add((questions[answer.index], stored_answer(answer, answer.row_id)) for answer in answers)
            done += len(answers)
            ctx.progress(done, total, "answers")

        def far(done: int, _: int, text: str) -> None:  # a batch is stored when it has ended
            ctx.progress(found + done, total, text)

        every = range(len(questions))
        with ctx.rows.held(), self._open(ctx) as teacher:
            answers = teacher.generate(
                Made(every, lambda at: conversation(questions[at].messages)[0]),
                sampling=sampling,
                row_ids=questions.keys(),
                tools=Made(every, lambda at: conversation(questions[at].messages)[1]),
                json_schemas=Made(every, lambda at: str(dict(questions[at].sampling).get("json_schema", ""))),
                on_ask=lambda at: ctx.rows.asking([questions[at]]),
                on_batch=store,
                progress=far if self.server is not None and self.server.batch is not None else None,
            )
            for _ in answers:  # all are stored as they arrive
                pass

    def _open(self, ctx: Context) -> OpenAITeacher | LlamaCppTeacher:
        if self.server is None:
            from edgedistill.teachers.llama_cpp import LlamaCppTeacher

            return LlamaCppTeacher(self._file(ctx), threads=ctx.threads)
        from edgedistill.teachers.openai import OpenAITeacher

        weights = ctx.path(self.teacher, "model")
        return OpenAITeacher(
            self.server,
            rows=ctx.rows.path,
            style=self.style,
            weights=weights,
            batched=True,
            note=ctx.note,
            on_others=lambda found: ctx.rows.add_by_key(
                ctx.entries[self.teacher].digest, (stored_answer(one, one.row_id) for one in found)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class GenerateAnalyses(Generate):
    """Tell the teacher of up to ``corrections`` wrong answers of its own to each prompt, as ``filtered`` rejected them."""

    filtered: Key
    corrections: int

    def to_ask(self, ctx: Context) -> tuple[Row, ...]:
        """Return the conversations with the objection; there may be none."""
        from edgedistill.data.corrections import to_analyse

        rejected = each_line(ctx.path(self.filtered, "rejected.jsonl"))
        return tuple(to_analyse(super().to_ask(ctx), map(json.loads, rejected), self.corrections))


@dataclass(frozen=True, kw_only=True)
class GenerateRecovery(Generate):
    """Ask another teacher, from scratch, the prompts of which ``filtered`` kept no teacher's answer; not those that are not to be
    taught by anybody's.
    """

    filtered: Key

    def to_ask(self, ctx: Context) -> tuple[Row, ...]:
        """Return the rows that the teachers before failed; there may be none."""
        from edgedistill.data.recovery import failed_prompts

        kept, rejected = (
            map(json.loads, each_line(ctx.path(self.filtered, name))) for name in ("kept.jsonl", "rejected.jsonl")
        )
        rows = super().to_ask(ctx)
        failed = failed_prompts((row.id for row in rows), kept, rejected)
        return tuple(row for row in rows if row.id in failed)


@dataclass(frozen=True, kw_only=True)
class Judge(Generate):
    """Ask a judge what each of the ``answers`` is worth by a ``rubric``: a score of 1 to 5, or, ``against`` the reference, which of
    the two is better, once in each order. Its verdicts are rows like any answer; ``grades.jsonl`` is what is read in them.
    """

    name: ClassVar[str] = "grade"
    answers: Key
    rubric: str
    against: str
    apart: bool = later(False)  # prompts that are the same have several references: entries of before took them for one

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Ask what was not asked before, and read the verdicts."""
        from edgedistill.data.grades import histogram, write_grades
        from edgedistill.data.judging import ORDERS, grades

        asked = super().run(ctx)
        found: dict[str, float | None] = {}
        count = self.samples * (len(ORDERS) if self.against else 1)  # on each answer
        verdicts = map(json.loads, each_line(ctx.out / "rows.jsonl"))  # in the order of the answers that they are on
        for answer in map(json.loads, each_line(ctx.path(self.answers, "rows.jsonl"))):
            if answer["finish"] == "stop":
                own = {one["id"]: one["text"] for one in islice(verdicts, count)}
                found |= grades([answer], own, against=bool(self.against))
        write_grades(ctx.out / "grades.jsonl", found)
        return {**asked, "grades": {"kind": "judge", "n": len(found), "histogram": histogram(found)}}

    def to_ask(self, ctx: Context) -> Sequence[Row]:
        """Return what the judge is asked."""
        from edgedistill.data.judging import to_judge

        answers = Lines(ctx.path(self.answers, "rows.jsonl"))
        return to_judge(super().to_ask(ctx), answers, self.rubric, against=bool(self.against))


@dataclass(frozen=True, kw_only=True)
class GenerateFailed(Generate):
    """Ask only what the student gets wrong: the rows whose answers in ``student``, its evaluation on them as the suite
    ``suite``, miss the reference or do not end.
    """

    student: Key
    suite: str

    def to_ask(self, ctx: Context) -> tuple[Row, ...]:
        """Return the rows that the student fails; there may be none."""
        from edgedistill.evals.suites import load_answers

        answers = load_answers(ctx.path(self.student, "answers") / f"{self.suite}.jsonl")
        failed = {answer.id for answer in answers if answer.score < 1 or answer.finish != "stop"}
        return tuple(row for row in super().to_ask(ctx) if row.id in failed)
