"""A teacher behind an OpenAI-compatible server: it writes by chat completions, and scores given tokens where the server can.

Scoring is vLLM's ``prompt_logprobs``: token ids go in, and at each of them the best tokens come out with their log-probability
at temperature 1. What is beyond the best is one bucket (``top-k``): no server gives a whole distribution, and so none can be drawn
from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.thinking import AFTER, BLOCKS
from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import digest
from edgedistill.sequences import Made
from edgedistill.served import SCORED, Server
from edgedistill.teachers.batch_book import Book
from edgedistill.teachers.batches import Batches
from edgedistill.teachers.calls import as_sent, read_reply, tools_sent
from edgedistill.teachers.protocol import Answer, Messages, Progress, Sampling
from edgedistill.teachers.requests import Requests
from edgedistill.teachers.vllm import Servers
from edgedistill.training.data import Example
from edgedistill.training.targets import Kind, SparseTargets, tokenizer_hash

BROKEN = "\ufffd"  # part of a character, by itself
ENDED = ("stop", "tool_calls")
THOUGHTS = ("reasoning_content", "reasoning")  # where servers put what was thought; vLLM has had both names


class OpenAITeacher:
    """Ask a server. ``tokenizer`` is the student's, for scoring; ``style`` that of the answers: one that thinks first keeps what
    the server parts from the answer. ``rows`` is the row store's file, which has the account of what is asked. Where the server
    is still to be started, ``weights`` is the checkpoint's folder; what it says goes beside the rows. ``batched``: prompts go in
    batches where the server is to be asked so; ``on_others`` gets what a batch of an earlier build brings that is not asked now,
    by the names that it had there.
    """

    def __init__(
        self,
        server: Server,
        *,
        rows: Path | None,
        tokenizer: Any = None,
        style: str = "answer",
        weights: Path | None = None,
        batched: bool = False,
        note: Callable[[str], None] = lambda text: None,
        on_others: Callable[[list[Answer]], None] = lambda answers: None,
    ) -> None:
        self.on_others = on_others
        self.launched: Servers | None = None
        if server.launch is not None and not server.urls:
            assert weights is not None and rows is not None
            self.launched = Servers(weights, server.launch, logs=rows.parent / "logs", note=note)
            server = replace(server, urls=self.launched.urls)
        self.server, self.tokenizer, self.style = server, tokenizer, style
        try:
            self.requests = Requests(server, None if rows is None else server.ledger(rows))
        except BaseException:  # a key that can be none
            if self.launched is not None:
                self.launched.close()
            raise
        self.batches: Batches | None = None
        if batched and server.batch is not None:
            assert rows is not None
            self.batches = Batches(server, Book(rows, server.account, server.batch_budget), note=note)
        self.vocab_size = 0 if tokenizer is None else len(tokenizer)

    def close(self) -> None:
        """Close the connections, and stop what was started."""
        self.requests.close()
        if self.batches is not None:
            self.batches.close()
        if self.launched is not None:
            self.launched.close()

    def __enter__(self) -> OpenAITeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, for the header of a file of targets."""
        return tokenizer_hash(self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        sampling: Sampling,
        row_ids: Sequence[str] | None = None,
        tools: Sequence[Sequence[dict[str, Any]]] | None = None,
        json_schemas: Sequence[str] | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[list[Answer]], None] | None = None,
        on_ask: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Answer]:
        """Yield the answers once all are there, in the order of ``prompts``; ``on_ask`` gets the index of a prompt before it is
        put. With ``on_batch``, which gets each answer as it arrives, none is kept, and none yielded. What another build had in a
        batch meanwhile is in the row store, and not here.

        What is given by prompt is looked at when its turn comes, and not held: it may be made then (`Made`). With ``json_schemas``,
        one for each prompt, the server lets the model write nothing else. ``batch_size`` says nothing here: how many are asked at
        a time is the server's ``concurrency``. Raises StepFailed as `Requests.post`.
        """
        names = row_ids if row_ids is not None else Made(range(len(prompts)), str)
        samples = sampling.samples if sampling.temperature > 0 else 1
        jobs = range(len(prompts) * samples)
        found: dict[int, Answer] = {}
        started, arrived = time.monotonic(), 0

        def asking(job: int) -> None:
            if on_ask is not None:
                on_ask(job // samples)

        def read(job: int, reply: dict[str, Any]) -> Answer:
            nonlocal arrived
            at, sample = divmod(job, samples)
            answer = self._answer(reply, at, names[at], sample)
            arrived += 1
            if on_batch is None:
                found[job] = answer
            return answer

        def take(job: int, reply: dict[str, Any]) -> None:
            answer = read(job, reply)
            if on_batch is not None:
                on_batch([answer])
            if progress is not None:
                progress(arrived, len(jobs), f"{arrived / (time.monotonic() - started):.1f} rows/s")

        def take_many(replies: list[tuple[int, dict[str, Any]]]) -> list[int]:
            answers, unread = list[Answer](), list[int]()
            for job, reply in replies:
                try:
                    answers.append(read(job, reply))
                except StepFailed:
                    unread.append(job)
            if on_batch is not None and answers:
                on_batch(answers)
            return unread

        def take_others(replies: list[tuple[str, dict[str, Any]]]) -> None:
            answers = list[Answer]()
            for name, reply in replies:
                with suppress(StepFailed):
                    answers.append(self._answer(reply, -1, name, 0))
            if answers:
                self.on_others(answers)

        guide = cache(_guide)

        def body(job: int) -> dict[str, Any]:
            at, sample = divmod(job, samples)
            form = guide(json_schemas[at] if json_schemas is not None else "")
            return self._question(prompts[at], tools[at] if tools else (), names[at], sample, sampling, form)

        path = "/chat/completions"

        def singly(which: Sequence[int]) -> None:
            self.requests.post(
                path,
                Made(which, body),
                lambda one, reply: take(which[one], reply),
                on_ask=lambda one: asking(which[one]),
                names=Made(which, lambda job: names[job // samples]),
            )

        if self.batches is None:
            singly(jobs)
        else:
            self.batches.post(
                path,
                [names[job] if samples == 1 else f"{names[job // samples]}/{job % samples}" for job in jobs],
                Made(jobs, body),
                take_many,
                singly,
                on_ask=asking,
                on_others=take_others,
                on_count=lambda done, text: progress(done, len(jobs), text) if progress is not None else None,
            )
        yield from (found[job] for job in jobs if job in found)

    def _question(
        self,
        messages: Messages,
        tools: Sequence[dict[str, Any]],
        name: str,
        sample: int,
        sampling: Sampling,
        guide: dict[str, Any],
    ) -> dict[str, Any]:
        drawn: dict[str, Any] = {}
        if sampling.temperature > 0:
            number = int(digest([sampling.seed, name, sample])[:8], 16) % 2**31  # a draw of its own for every sample
            drawn = {"top_p": sampling.top_p, "seed": number}
        return {
            "model": self.server.model,
            "messages": as_sent(messages),
            **({"tools": tools_sent(tools)} if tools else {}),
            **self.server.limit(sampling.max_new_tokens),
            "temperature": sampling.temperature,
            **drawn,
            **({"logprobs": True} if self.server.abilities.logprobs else {}),
            **guide,
            **self.server.body,
        }

    def _answer(self, reply: dict[str, Any], at: int, name: str, sample: int) -> Answer:
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            text, calls = message.get("content") or "", read_reply(message)
            thought = next((message[field] for field in THOUGHTS if message.get(field)), "")
            if other := next((one for one in (text, thought) if not isinstance(one, str)), None):
                raise TypeError(f"its content is no text but a {type(other).__name__}")
            tokens = [float(one["logprob"]) for one in ((choice.get("logprobs") or {}).get("content") or ())]
            count = int((reply.get("usage") or {}).get("completion_tokens") or len(tokens))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise StepFailed(
                f"{self.server.url}: an answer of another form than OpenAI's ({type(error).__name__}: {error})",
                "is teacher.server an OpenAI-compatible one?",
            ) from None
        if thought and self.style in BLOCKS and self.style not in AFTER:  # what was thought before says nothing after
            start, end = BLOCKS[self.style]
            text = f"{start}\n{thought.strip()}\n{end}\n{text.lstrip()}"
        return Answer(
            index=at,
            row_id=name,
            sample=sample,
            text=text,
            token_ids=(),
            finish_reason="stop" if choice.get("finish_reason") in ENDED else "length",
            logprob=float(sum(tokens)),
            tokens=count,
            calls=calls,
        )

    def score(
        self,
        examples: Sequence[Example],
        *,
        kind: Kind,
        n: int,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, SparseTargets]]:
        """Yield (index, the n best tokens at each completion token) in the order of ``examples``, once all are there.

        Raises UsageError for what a server cannot give, StepFailed where it has another tokenizer or gives something else.
        """
        if kind != "top-k" or temperature != 1.0:
            raise UsageError(f"a server gives the best tokens at temperature 1, and no {kind} at {temperature:g}")
        found: list[SparseTargets | None] = [None] * len(examples)
        started, arrived = time.monotonic(), 0

        def take(at: int, reply: dict[str, Any]) -> None:
            nonlocal arrived
            found[at], arrived = self._targets(examples[at], reply, n), arrived + 1
            if progress is not None:
                progress(arrived, len(examples), f"{arrived / (time.monotonic() - started):.1f} rows/s")

        bodies = [
            {
                "model": self.server.model,
                "prompt": [*one.prompt_ids, *one.completion_ids],
                "max_tokens": 1,
                "temperature": 0.0,
                SCORED: n,
            }
            for one in examples
        ]
        self.requests.post("/completions", bodies, take)
        yield from ((at, one) for at, one in enumerate(found) if one is not None)

    def _targets(self, example: Example, reply: dict[str, Any], n: int) -> SparseTargets:
        """Read what the server says of the tokens of one example's completion."""
        tokens = (*example.prompt_ids, *example.completion_ids)
        places = None
        try:
            places = reply["choices"][0][SCORED]
            if len(places) != len(tokens):
                raise StepFailed(
                    f"{self.server.url}: row {example.id!r} has {len(tokens)} tokens, and the server read {len(places)}",
                    "serve the teacher without special tokens of its own, or distil on its text (score.kind = 'none')",
                )
            offsets, ids, logps = [0], list[int](), list[float]()
            for token, place in zip(example.completion_ids, places[len(example.prompt_ids) :], strict=True):
                self._same(token, place[str(token)].get("decoded_token"), example)
                best = sorted(((float(one["logprob"]), -int(name)) for name, one in place.items()), reverse=True)[:n]
                ids += [-name for _, name in best]
                logps += [logp for logp, _ in best]
                offsets.append(len(ids))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise StepFailed(
                f"{self.server.url}: row {example.id!r}: the server does not score given tokens as vLLM does "
                f"({type(error).__name__}: {error})",
                "serve the teacher by vLLM, or distil on its text: score.kind = 'none', distill.loss.kd = 0",
            ) from None
        if ids and max(ids) >= self.vocab_size:
            raise StepFailed(*self._differ(example, f"token {max(ids)}, and it has {self.vocab_size}"))
        return SparseTargets(
            kind="top-k",
            n=n,
            temperature=1.0,
            temperatures=(),
            offsets=np.asarray(offsets, dtype=np.int64),
            ids=np.asarray(ids, dtype=np.int32),
            counts=np.zeros(0, dtype=np.float32),
            logp=np.asarray(logps, dtype=np.float32),
            normalisers=np.zeros((len(example.completion_ids), 0), dtype=np.float32),
        )

    def _same(self, token: int, theirs: str | None, example: Example) -> None:
        """Refuse a server that has another token of this number. Spaces are not compared: servers write them in several ways."""
        own = self.tokenizer.decode([token])
        if theirs is None or BROKEN in theirs or BROKEN in own:
            return
        if theirs.replace("\u2581", " ").strip() != own.strip():
            raise StepFailed(*self._differ(example, f"{theirs!r} as token {token}, and to it that is {own!r}"))

    def _differ(self, example: Example, what: str) -> tuple[str, str]:
        return (
            f"row {example.id!r}: the teacher has another tokenizer than the student: {what}",
            "distributions need one tokenizer: take a student of the teacher's family, or set score.kind = 'none' and "
            "distill.loss.kd = 0",
        )


def _guide(schema: str) -> dict[str, Any]:
    """Return what a request says so that nothing but JSON by a schema is written; nothing where there is none."""
    if not schema:
        return {}
    named = {"name": "answer", "schema": json.loads(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": named}}
