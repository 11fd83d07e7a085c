"""Answer through an OpenAI-compatible server: what a teacher without weights here is proved by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from edgedistill.asked import asked, stored_answer
from edgedistill.chat import Chat
from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Answer, Finish, Progress
from edgedistill.rows import Answered, Question, RowStore
from edgedistill.served import Server

if TYPE_CHECKING:
    from edgedistill.teachers.protocol import Answer as Written


class ServedRunner:
    """Answer prompts by a server. It writes and nothing else: its tokens are its own, and their probabilities are not compared.

    Answers are kept in ``rows`` as they arrive, as those of ``teacher`` (a digest of its identity), and looked up there: an
    evaluation that was cut off, or done again, asks for the rest alone. ``weights`` are those that a server is started on; ``chat``
    makes text of its calls.
    """

    def __init__(
        self,
        server: Server,
        rows: RowStore,
        *,
        teacher: str,
        weights: Path | None = None,
        chat: Chat | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        from edgedistill.teachers.openai import OpenAITeacher

        self.chat, self.rows, self.digest = chat, rows, teacher
        self.server, self.teacher = server, OpenAITeacher(server, rows=rows.path, weights=weights, note=note)

    def describe(self) -> dict[str, Any]:
        """Name the engine and the model; where the server is, changes nothing."""
        return {"engine": "openai", **self.server.identity}

    def answer(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        grammar: str | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer every row greedily, in the order of ``rows``. Raises UsageError for a grammar: no two servers take it alike."""
        from edgedistill.teachers.protocol import Sampling

        if grammar is not None:
            raise UsageError("a server is given no grammar here", "leave suites.….grammar out")
        started = time.monotonic()
        questions = [self._question(row, max_new_tokens) for row in rows]
        stored = self.rows.get({question.key for question in questions})
        left = list({question.key: at for at, question in enumerate(questions) if question.key not in stored}.values())
        before = len(stored)

        def keep(answers: list[Written]) -> None:
            found = [(questions[left[one.index]], one) for one in answers]
            lines = [(question, stored_answer(one, question.key)) for question, one in found]
            self.rows.add(lines)
            stored.update((answer.key, answer) for _, answer in lines)
            if progress is not None:
                progress(len(rows) - len(left) + len(stored) - before, len(rows), "answers")

        if left:  # else there is no need of a server
            with self.rows.held():
                arriving = self.teacher.generate(
                    [list(rows[at].messages) for at in left],
                    sampling=Sampling(max_new_tokens=max_new_tokens),
                    row_ids=[rows[at].id for at in left],
                    tools=[rows[at].tools for at in left],
                    on_ask=lambda at: self.rows.asking([questions[left[at]]]),
                    on_batch=keep,
                )
                for _ in arriving:  # all are stored as they arrive
                    pass
        share = (time.monotonic() - started) / max(1, len(rows))
        found = [stored[question.key] for question in questions]
        return [
            Answer(id=row.id, text=self._text(row, one), token_ids=(), seconds=share, finish=_finish(one))
            for row, one in zip(rows, found, strict=True)
        ]

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        """Do nothing: no answer depends on those before it."""

    def _question(self, row: Row, max_new_tokens: int) -> Question:
        """Return what is asked, as the row store keys it."""
        sampling = (("max_new_tokens", max_new_tokens), ("temperature", 0.0), ("manner", self.server.manner))
        return Question(teacher=self.digest, messages=asked(replace(row, guidance=None)), sampling=sampling, seed=0)

    def _text(self, row: Row, answer: Answered) -> str:
        """Return what was written, its calls as the student writes them."""
        from edgedistill.teachers.calls import write_calls

        if not answer.calls or self.chat is None:
            return answer.text
        return write_calls(row.messages, row.tools, answer.text, answer.calls, self.chat.render)[0]

    def encode(self, row: Row) -> list[int]:
        """Refuse: the server's tokens are its own."""
        _refuse()

    def encode_text(self, text: str) -> list[int]:
        """Refuse: the server's tokens are its own."""
        _refuse()

    def end_token(self) -> int:
        """Refuse: the server's tokens are its own."""
        _refuse()

    def pieces(self) -> list[str]:
        """Refuse: the server's tokens are its own."""
        _refuse()

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Refuse: a server gives no whole distribution."""
        _refuse()

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Refuse: the server's tokens are its own."""
        _refuse()

    def close(self) -> None:
        """Close the connections. May be called twice."""
        self.teacher.close()


def _finish(answer: Answered) -> Finish:
    return "stop" if answer.finish == "stop" else "length"


def _refuse() -> NoReturn:
    raise UsageError("a served teacher's tokens are not known here", "compare the texts of its answers")
