"""Answer through an OpenAI-compatible server: what a teacher without weights here is proved by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from edgedistill.chat import Chat
from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Answer, Progress
from edgedistill.served import Server

if TYPE_CHECKING:
    from edgedistill.teachers.protocol import Answer as Written


class ServedRunner:
    """Answer prompts by a server. It writes and nothing else: its tokens are its own, and their probabilities are not compared.
    ``rows`` is the row store's file, which has the account of what is asked; ``weights`` are those that a server is started on;
    ``chat`` makes text of its calls.
    """

    def __init__(
        self,
        server: Server,
        rows: Path | None,
        *,
        weights: Path | None = None,
        chat: Chat | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        from edgedistill.teachers.openai import OpenAITeacher

        self.chat = chat
        self.server, self.teacher = server, OpenAITeacher(server, rows=rows, weights=weights, note=note)

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
        found = list(
            self.teacher.generate(
                [list(row.messages) for row in rows],
                sampling=Sampling(max_new_tokens=max_new_tokens),
                row_ids=[row.id for row in rows],
                tools=[row.tools for row in rows],
                progress=progress,
            )
        )
        share = (time.monotonic() - started) / max(1, len(found))
        return [
            Answer(id=one.row_id, text=self._text(row, one), token_ids=(), seconds=share, finish=one.finish_reason)
            for row, one in zip(rows, found, strict=True)
        ]

    def _text(self, row: Row, answer: Written) -> str:
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


def _refuse() -> NoReturn:
    raise UsageError("a served teacher's tokens are not known here", "compare the texts of its answers")
