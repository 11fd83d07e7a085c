"""The row store: every answer of a teacher, kept for good and never paid twice.

One SQLite file (write-ahead log, so that a killed build loses at most the batch in flight and two builds may write at
once). A row is keyed by *what was asked of whom*: the teacher's content digest, the messages, the sampling settings,
the seed and the number of the sample. ``asks`` records every question before it is put, so that a test, or a bill,
can tell what was asked more than once.
``singly`` holds what builds are about to put one by one (``teachers/batch_book.py``), until the answer is stored.
"""

from __future__ import annotations

import json
import sqlite3
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import digest
from edgedistill.jsonl import whole
from edgedistill.sequences import Made

SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    key     TEXT PRIMARY KEY,
    teacher TEXT NOT NULL,
    asked   TEXT NOT NULL,
    answer  TEXT NOT NULL,
    at      REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asks (key TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS asks_key ON asks (key);
CREATE TABLE IF NOT EXISTS singly (
    name  TEXT PRIMARY KEY,
    asker TEXT NOT NULL
) WITHOUT ROWID;
"""

KEY = 32  # bytes of a row's key
UNDER_WAY = 512  # questions that are kept a while, as they are looked at several times until they are answered
PIECE = 100  # keys that are looked up at once, and so the answers that are in memory


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a teacher. ``messages`` are (role, content) and what else a message holds (``generate.asked``);
    ``sampling`` holds all that changes the answer (temperature, top_p, max_new_tokens).
    """

    teacher: str
    messages: tuple[tuple[Any, ...], ...]
    sampling: tuple[tuple[str, float | int | str], ...]
    seed: int
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """The row's key: 64 hexadecimal digits."""
        return digest(self)


class Questions(Made[Question]):
    """Questions that are made when they are looked at: of each its key stays in memory, 32 bytes."""

    def __init__(self, asks: Sequence[Question], keys: Iterable[str] | None = None) -> None:
        @lru_cache(UNDER_WAY)
        def again(at: int) -> Question:
            question = asks[at]
            question.__dict__["key"] = self.key(at)  # the cached one: a digest takes longer than all else here
            return question

        super().__init__(range(len(asks)), again)
        self._asks, self._raw = asks, bytearray()
        for key in keys if keys is not None else (question.key for question in asks):
            self._raw += bytes.fromhex(key)

    def key(self, at: int) -> str:
        """Return the key of a question."""
        return self._raw[KEY * at : KEY * at + KEY].hex()

    def keys(self) -> Sequence[str]:
        """Return the keys of all."""
        return Made(range(len(self)), self.key)

    def some(self, numbers: Sequence[int]) -> Questions:
        """Return those with these numbers."""
        return Questions(Made(numbers, self._asks.__getitem__), map(self.key, numbers))


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A stored answer: the text, the token ids the teacher emitted, why it stopped, its log-probability in nats. A server gives
    no ids: there ``tokens`` is their number, and ``calls`` are those of tools, name and arguments as it wrote them.
    """

    key: str
    text: str
    token_ids: tuple[int, ...]
    finish: str
    logprob: float
    tokens: int | None = None
    calls: tuple[dict[str, str], ...] = ()

    @property
    def count(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids) if self.tokens is None else self.tokens


class RowStore:
    """Append-only answers in ``rows.sqlite``. Safe for several processes; a second write of a key changes nothing."""

    def __init__(self, root: Path) -> None:
        self.path = root / "rows.sqlite"
        self._held: sqlite3.Connection | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open during the ``with`` block, for many small reads and writes."""
        with self._errors(), closing(self._connect()) as self._held:
            try:
                yield
            finally:
                self._held = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute("PRAGMA journal_mode=WAL")
        # A killed process loses nothing that was committed; a cut of the power may lose the last commits, and no more.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(SCHEMA)
        return connection

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        if self._held is not None:
            with self._errors(), self._held:
                yield self._held
        else:
            with self._errors(), closing(self._connect()) as connection, connection:
                yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # the disk is full, or the file is held or may not be written
            raise StepFailed(f"{self.path}: {error}", "free some disk space; stored rows are kept") from error
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{self.path}: not a readable row store ({error})", f"move it away and build again: mv {self.path} /tmp"
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, Answered]:
        """Return those of ``keys`` that are stored."""
        return {key: _answered(key, answer) for key, answer in self._select("key, answer", keys)}

    def known(self, keys: Iterable[str]) -> set[str]:
        """Return which of ``keys`` are stored."""
        return {key for (key,) in self._select("key", keys)}

    def missing(self, keys: Iterable[str]) -> Sequence[int]:
        """Return the numbers of those of ``keys`` that are not stored, in their order; of one that stands there twice the first."""
        import numpy as np

        numbers, raw, rest, start = array("I"), bytearray(), iter(keys), 0
        with self.held():
            while part := list(islice(rest, PIECE)):
                stored = self.known(part)
                for at, key in enumerate(part, start):
                    if key not in stored:
                        numbers.append(at)
                        raw += bytes.fromhex(key)
                start += len(part)
        first = np.unique(np.frombuffer(raw, dtype=f"S{KEY}"), return_index=True)[1]
        return array("I", np.asarray(numbers, dtype=np.uint32)[np.sort(first)].tobytes())

    def _select(self, columns: str, keys: Iterable[str]) -> Iterator[tuple[str, ...]]:
        rest = iter(keys)
        if not self.path.exists():
            return
        with self._open() as db:
            while part := list(islice(rest, PIECE)):
                marks = ",".join("?" * len(part))
                yield from db.execute(f"SELECT {columns} FROM rows WHERE key IN ({marks})", part)

    def asking(self, questions: Iterable[Question]) -> None:
        """Record that these questions are about to be put."""
        now = time.time()
        with self._open() as db:
            db.executemany("INSERT INTO asks VALUES (?, ?)", [(question.key, now) for question in questions])

    def add(self, answers: Iterable[tuple[Question, Answered]]) -> None:
        """Store answers in one transaction."""
        self._add(
            (one.key, one.teacher, json.dumps({"messages": one.messages, "sampling": one.sampling}), answer)
            for one, answer in answers
        )

    def add_by_key(self, teacher: str, answers: Iterable[Answered]) -> None:
        """Store answers of a teacher to questions of an earlier build, of which nothing is known here but their keys."""
        self._add((answer.key, teacher, "{}", answer) for answer in answers)

    def _add(self, answers: Iterable[tuple[str, str, str, Answered]]) -> None:
        now = time.time()
        lines = [(key, teacher, asked, _body(answer), now) for key, teacher, asked, answer in answers]
        with self._open() as db:
            db.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?)", lines)
            db.executemany("DELETE FROM singly WHERE name = ?", [line[:1] for line in lines])

    def counts(self) -> dict[str, int]:
        """Return how many rows are stored, and how many questions were ever put."""
        if not self.path.exists():
            return {"rows": 0, "asks": 0}
        with self._open() as db:
            return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("rows", "asks")}

    def asked_again(self) -> list[str]:
        """Return the keys of questions that were put more than once."""
        with self._open() as db:
            return [row[0] for row in db.execute("SELECT key FROM asks GROUP BY key HAVING count(*) > 1")]

    def delete_all(self) -> int:
        """Delete every row (``store gc --rows``: the user said so). Returns how many there were. What they did cost stays, with the
        batches that are under way (``spending.py``, ``batch_book.py``): a budget is that of all builds.
        """
        count = self.counts()["rows"]
        if self.path.exists():
            with self._errors(), closing(self._connect()) as db:
                with db:
                    db.execute("DELETE FROM rows")
                    db.execute("DELETE FROM asks")
                db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count


def _body(answer: Answered) -> str:
    """Return what is stored of an answer beside its key, as JSON."""
    return json.dumps(
        {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish": answer.finish,
            "logprob": answer.logprob,
            **({} if answer.tokens is None else {"tokens": answer.tokens}),
            **({"calls": answer.calls} if answer.calls else {}),
        }
    )


def _answered(key: str, raw: str) -> Answered:
    body: dict[str, Any] = json.loads(raw)
    return Answered(
        key=key,
        text=whole(body["text"]),
        token_ids=tuple(body["token_ids"]),
        finish=body["finish"],
        logprob=body["logprob"],
        tokens=body.get("tokens"),
        calls=tuple(body.get("calls", ())),
    )
