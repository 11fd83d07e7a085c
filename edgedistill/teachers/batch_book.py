"""What is being asked of servers, batches of requests above all, written down beside the rows before anything is sent.

A batch and what it may cost at most come into the file in one transaction; then its file's name at the server, then its own. So a
build that is killed at any moment leaves a line that says how far it was, and the next one goes on from there.

A batch has an asker: the build that is at it, which is known as the holder of a lease is (``store.py``). What a living asker has in
a batch, or puts one by one, nobody else asks; what a dead one had, the next that wants an answer of it takes over. Both are looked
for and written down in one transaction, so of two builds that come at once one is the first.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from edgedistill import rows
from edgedistill.errors import UsageError
from edgedistill.spending import Ledger, Use
from edgedistill.store import HEARTBEAT_S, called, is_dead, new_holder

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    tag     TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    url     TEXT NOT NULL,
    file    TEXT NOT NULL,
    id      TEXT NOT NULL,
    ended   REAL,
    uses    TEXT NOT NULL,
    at      REAL NOT NULL,
    asker   TEXT NOT NULL DEFAULT '',
    input   REAL,
    output  REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS askers (
    token  TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    beat   REAL NOT NULL
) WITHOUT ROWID;
"""
LATER = {"asker": "TEXT NOT NULL DEFAULT ''", "input": "REAL", "output": "REAL"}
"""Columns of batches that a book of before has not."""
OTHERS_S = 1.0
"""Seconds between two looks at what other builds ask."""
AT_ONCE = 500
"""Names in one question to the file."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch that has not ended. ``tag`` is our name for it, which the server keeps along; ``file`` and ``id`` are the server's
    names of what was sent and of the batch, "" until they are known; ``uses`` is what each of its requests costs at most, by name.
    ``account`` pays for it, at prices (``input``, ``output``) a million tokens; ``heard``: when its asker last gave a sign of life.
    """

    tag: str
    uses: Mapping[str, Use]
    file: str = ""
    id: str = ""
    account: str = ""
    input: float = 0.0
    output: float = 0.0
    heard: float = field(default=0.0, compare=False)

    @property
    def most(self) -> Use:
        """Return what all of it costs at most."""
        return total(self.uses.values())


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A batch as it stands in the book: where it is, whose it is ("" nobody's), and how that one is called if it lives."""

    batch: Batch
    url: str
    asker: str
    living: str


class Book(Ledger):
    """The batches of a store. New ones are put down to one account, whose spending is kept as in any ledger, at the price of
    batches.
    """

    schema: ClassVar[str] = Ledger.schema + rows.SCHEMA + SCHEMA

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asker = ""
        self._uses: dict[str, dict[str, Use]] = {}  # of batches that were read, by tag: they are long

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Be an asker while the block runs: the batches that are opened in it, or taken over, are not anybody else's."""
        me, stop = new_holder(), threading.Event()
        with self._writing() as db:
            for token, living, _ in self._askers(db):
                if not living:
                    self._forget(db, token)
            db.execute("INSERT INTO askers VALUES (?, ?, ?)", (me["token"], json.dumps(me), time.time()))

        def beat() -> None:
            own = Book(self.path, self.account, self.budget)  # a connection is one thread's
            while not stop.wait(HEARTBEAT_S):
                with suppress(UsageError), own._writing() as db:
                    db.execute("UPDATE askers SET beat = ? WHERE token = ?", (time.time(), me["token"]))
            own.close()

        self.asker = me["token"]
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=1)
            with suppress(UsageError), self._writing() as db:
                db.execute("UPDATE askers SET holder = '{}', beat = ? WHERE token = ?", (time.time(), self.asker))
                self._forget(db, self.asker)
            self.asker = ""

    def under_way(self, url: str) -> list[Batch]:
        """Return the account's batches at a server that have not ended, the oldest first."""
        with self._writing() as db:
            return [one.batch for one in self._lines(db) if one.url == url and one.batch.account == self.account]

    def look(self, url: str, names: Collection[str], left: Collection[str] = ()) -> tuple[list[Batch], dict[str, str]]:
        """Return the batches at a server with some of the names that nobody is at (but for those ``left``, by their tags): they are
        taken over. And which of the names living builds ask, each with who it is.
        """
        found, held, wanted = list[Batch](), dict[str, str](), set(names)
        with self._writing() as db:
            for one in self._lines(db):
                if (one.asker and one.asker == self.asker) or not (have := wanted & one.batch.uses.keys()):
                    continue
                if one.living:
                    held.update(dict.fromkeys(have, one.living))
                elif one.url == url and one.batch.tag not in left:
                    self._hand(db, one.batch, self.asker)
                    found.append(one.batch)
            held.update({name: who for name, asker, who in self._singly(db) if name in wanted and asker != self.asker})
        return found, held

    def answered(self, names: Iterable[str]) -> set[str]:
        """Return which of the names have an answer in the row store."""
        with self._writing() as db:
            return self._answered(db, names)

    def unsettled(self, url: str) -> list[Batch]:
        """Return the account's batches at a server that nobody is at and whose questions are all answered: they are taken over. Who
        was at them died before it wrote down what they did cost, or another build asked what these never came to ask.
        """
        found = list[Batch]()
        with self._writing() as db:
            for one in self._lines(db):
                if one.url != url or one.batch.account != self.account or one.living:
                    continue
                if one.asker != self.asker and len(self._answered(db, one.batch.uses)) == len(one.batch.uses):
                    self._hand(db, one.batch, self.asker)
                    found.append(one.batch)
        return found

    def open(self, url: str, uses: Mapping[str, Use], left: Collection[str] = ()) -> Batch | None:
        """Write down a batch of those requests that nobody asks and that are not answered, as many, from the first on, as the
        budget has room for. None where it has none; one of no requests, which is not written down, where others have them all.
        """
        with self._writing() as db:
            asked = {name for name, _, _ in self._singly(db)}
            for one in self._lines(db):
                if one.living or (one.url == url and one.batch.tag not in left):
                    asked.update(one.batch.uses)
            asked |= self._answered(db, uses)
            spent, taken, need = self._spent(db), dict[str, Use](), Use(0, 0)
            for name, use in uses.items():
                if name in asked:
                    continue
                more = Use(need.prompt + use.prompt, need.completion + use.completion)
                if not self._fits(spent, more):
                    if not taken:
                        return None
                    break
                taken[name], need = use, more
            price = self.budget
            batch = Batch(
                tag=uuid.uuid4().hex, uses=taken, account=self.account, input=price.input, output=price.output
            )
            if taken:
                self._take(db, need, len(taken))
                told = (json.dumps(taken), time.time(), self.asker, price.input, price.output)
                db.execute(
                    "INSERT INTO batches VALUES (?, ?, ?, '', '', NULL, ?, ?, ?, ?, ?)",
                    (batch.tag, self.account, url, *told),
                )
        return batch

    def name(self, batch: Batch, *, file: str, id: str = "") -> Batch:
        """Write down what the server calls a batch and its file; return it with that. A batch that has an ``id`` is paid for: it is
        ours, even if another build took this one for dead and the batch for one that never was.
        """
        named = replace(batch, file=file, id=id)
        with self._writing() as db:
            told = (file, id, time.time(), batch.tag)
            if (
                id
                and not db.execute(
                    "UPDATE batches SET file = ?, id = ?, at = ? WHERE tag = ? AND ended IS NULL", told
                ).rowcount
            ):
                db.execute("UPDATE batches SET file = ?, id = ?, at = ?, ended = NULL WHERE tag = ?", told)
                self._payer(batch)._take(db, batch.most, len(batch.uses))
            if id:
                self._hand(db, batch, self.asker)
            else:
                db.execute("UPDATE batches SET file = ?, id = ?, at = ? WHERE tag = ?", told)
        return named

    def ours(self, batch: Batch) -> bool:
        """Tell whether no other build has taken a batch over meanwhile: a machine that slept a minute looks dead to others."""
        with self._writing() as db:
            found = db.execute(
                "SELECT 1 FROM batches WHERE tag = ? AND asker = ? AND ended IS NULL", (batch.tag, self.asker)
            )
            return found.fetchone() is not None

    def leave(self, batch: Batch) -> None:
        """Leave a batch that was taken over to whom it may concern."""
        with self._writing() as db:
            self._hand(db, batch, "")

    def end(self, batch: Batch, cost: Use | None, singly: Iterable[str] = ()) -> None:
        """Write down that a batch has ended, and what it did cost; None: it never was at the server. Of a batch that is not ours
        any more, or has ended, nothing is changed. ``singly`` are those of its requests that are put one by one now: nobody else
        asks them until ``put``.
        """
        with self._writing() as db:
            found = db.execute(
                "UPDATE batches SET ended = ? WHERE tag = ? AND asker = ? AND ended IS NULL",
                (time.time(), batch.tag, self.asker),
            )
            db.executemany("INSERT OR REPLACE INTO singly VALUES (?, ?)", [(name, self.asker) for name in singly])
            if found.rowcount == 1:
                self._payer(batch)._set_right(db, batch.most, cost or Use(0, 0))
            if found.rowcount == 1 and cost is None:
                db.execute(
                    "UPDATE spending SET requests = requests - ? WHERE account = ?", (len(batch.uses), batch.account)
                )

    def claim(self, names: Collection[str]) -> tuple[list[str], dict[str, str]]:
        """Write down those of the names (some hundred) that have no answer, and that no living build asks, as ours to be put one by
        one, until they are answered or ``put``. Return them, and those that others ask, each with the asker's token.
        """
        with self._writing() as db:
            answered, held = self._answered(db, names), dict[str, str]()
            rest = {name for name in names if name not in answered}
            for one in self._lines(db):
                if one.living and one.asker != self.asker:
                    held.update(dict.fromkeys(rest & one.batch.uses.keys(), one.asker))
            living = {token for token, who, _ in self._askers(db) if who} - {self.asker}
            for part, marks in _parts(rest if living else ()):
                put = db.execute(f"SELECT name, asker FROM singly WHERE name IN ({marks})", part)
                held.update({name: asker for name, asker in put if asker in living})
            ours = [name for name in names if name in rest and name not in held]
            db.executemany("INSERT OR REPLACE INTO singly VALUES (?, ?)", [(name, self.asker) for name in ours])
        return ours, held

    def at_it(self, tokens: Collection[str]) -> dict[str, tuple[str, int | None]]:
        """Return those of the askers that live and have something under way: who it is, and how much it has still to put one by
        one, None for one with batches. It is only read, so nobody who stores answers waits for it.
        """
        found = dict[str, tuple[str, int | None]]()
        with self._reading() as db:
            for token, who, _ in self._askers(db):
                if not who or token not in tokens:
                    continue
                (left,) = db.execute("SELECT count(*) FROM singly WHERE asker = ?", (token,)).fetchone()
                batches = "SELECT EXISTS(SELECT 1 FROM batches WHERE asker = ? AND ended IS NULL)"
                if db.execute(batches, (token,)).fetchone()[0]:
                    found[token] = who, None
                elif left:
                    found[token] = who, left
        return found

    def stopped(self, names: Iterable[str]) -> dict[str, int]:
        """Return the batches that are at a server and that nobody is at, each with how many of the names it has."""
        with self._writing() as db:
            lines = [one.batch for one in self._lines(db) if one.batch.id and not one.living]
        wanted = set(names) if lines else set[str]()
        return {one.id: count for one in lines if (count := len(wanted & one.uses.keys()))}

    def put(self) -> None:
        """Write down that what was put one by one is answered."""
        with self._writing() as db:
            db.execute("DELETE FROM singly WHERE asker = ?", (self.asker,))

    def _payer(self, batch: Batch) -> Ledger:
        """Return the account of a batch, at its price."""
        return Ledger(self.path, batch.account, replace(self.budget, input=batch.input, output=batch.output))

    def _askers(self, db: sqlite3.Connection) -> list[tuple[str, str, float]]:
        """Return all askers: the token, who it is ("" if it is dead), the last sign of life."""
        found = list[tuple[str, str, float]]()
        for token, told, beat in db.execute("SELECT token, holder, beat FROM askers").fetchall():
            holder: dict[str, Any] = json.loads(told)
            found.append((token, called(holder) if holder and not is_dead(holder, beat) else "", beat))
        return found

    def _singly(self, db: sqlite3.Connection) -> list[tuple[str, str, str]]:
        """Return what living askers put one by one: the name, the asker, who that is."""
        living = {token: who for token, who, _ in self._askers(db) if who}
        put = db.execute("SELECT name, asker FROM singly").fetchall()
        return [(name, asker, living[asker]) for name, asker in put if asker in living]

    def _forget(self, db: sqlite3.Connection, token: str) -> None:
        """Delete what a dead asker was to put one by one, and itself where it leaves no batch."""
        db.execute("DELETE FROM singly WHERE asker = ?", (token,))
        db.execute(
            "DELETE FROM askers WHERE token = ?1 AND NOT EXISTS "
            "(SELECT 1 FROM batches WHERE asker = ?1 AND ended IS NULL)",
            (token,),
        )

    def _lines(self, db: sqlite3.Connection) -> list[_Line]:
        """Return all batches that have not ended, the oldest first."""
        askers = {token: (who, beat) for token, who, beat in self._askers(db)}
        lines = db.execute(
            "SELECT tag, account, url, file, id, at, asker, input, output FROM batches WHERE ended IS NULL ORDER BY at, tag"
        ).fetchall()
        found = list[_Line]()
        for tag, account, url, file, name_there, at, asker, price_in, price_out in lines:
            if tag not in self._uses:
                (uses,) = db.execute("SELECT uses FROM batches WHERE tag = ?", (tag,)).fetchone()
                self._uses[tag] = {name: Use(*use) for name, use in json.loads(uses).items()}
            who, beat = askers.get(asker, ("", 0.0))
            batch = Batch(
                tag=tag,
                uses=self._uses[tag],
                file=file,
                id=name_there,
                account=account,
                input=self.budget.input if price_in is None else price_in,
                output=self.budget.output if price_out is None else price_out,
                heard=max(at, beat),
            )
            found.append(_Line(batch=batch, url=url, asker=asker, living=who))
        return found

    def _hand(self, db: sqlite3.Connection, batch: Batch, asker: str) -> None:
        db.execute("UPDATE batches SET asker = ? WHERE tag = ?", (asker, batch.tag))

    def _answered(self, db: sqlite3.Connection, names: Iterable[str]) -> set[str]:
        found = set[str]()
        for part, marks in _parts(names):
            found.update(name for (name,) in db.execute(f"SELECT key FROM rows WHERE key IN ({marks})", part))
        return found

    def _widen(self, db: sqlite3.Connection) -> None:
        def lacks() -> list[str]:
            have = {line[1] for line in db.execute("PRAGMA table_info(batches)")}
            return [name for name in LATER if name not in have]

        if lacks():
            db.execute("BEGIN IMMEDIATE")
            for name in lacks():  # another build may have been faster
                db.execute(f"ALTER TABLE batches ADD COLUMN {name} {LATER[name]}")
            db.execute("COMMIT")


def _parts(names: Iterable[str]) -> Iterator[tuple[list[str], str]]:
    """Yield the names, as many as a statement takes, with the marks that stand for them in it."""
    rest = iter(sorted(names))  # neighbours in the file are read at once
    while part := list(islice(rest, AT_ONCE)):
        yield part, ",".join("?" * len(part))


def total(uses: Iterable[Use]) -> Use:
    """Return the sum."""
    every = list(uses)
    return Use(sum(use.prompt for use in every), sum(use.completion for use in every))
