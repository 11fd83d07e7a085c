"""What batches of requests are under way, written down beside the rows before anything is sent.

A batch and what it may cost at most come into the file in one transaction; then its file's name at the server, then its own. So a
build that is killed at any moment leaves a line that says how far it was, and the next one goes on from there.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from edgedistill.spending import Ledger, Use

SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    tag     TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    url     TEXT NOT NULL,
    file    TEXT NOT NULL,
    id      TEXT NOT NULL,
    ended   REAL,
    uses    TEXT NOT NULL,
    at      REAL NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch that has not ended. ``tag`` is our name for it, which the server keeps along; ``file`` and ``id`` are the server's
    names of what was sent and of the batch, "" until they are known; ``uses`` is what each of its requests costs at most, by name.
    """

    tag: str
    uses: Mapping[str, Use]
    file: str = ""
    id: str = ""

    @property
    def most(self) -> Use:
        """Return what all of it costs at most."""
        return total(self.uses.values())


class Book(Ledger):
    """The batches of one account, whose spending it keeps as any ledger does, at the price of batches."""

    schema: ClassVar[str] = Ledger.schema + SCHEMA

    def under_way(self, url: str) -> list[Batch]:
        """Return the batches at a server that have not ended, the oldest first."""
        with self._writing() as db:
            found = db.execute(
                "SELECT tag, uses, file, id FROM batches WHERE account = ? AND url = ? AND ended IS NULL ORDER BY at, tag",
                (self.account, url),
            ).fetchall()
        return [
            Batch(tag=tag, uses={name: Use(*use) for name, use in json.loads(uses).items()}, file=file, id=name_there)
            for tag, uses, file, name_there in found
        ]

    def open(self, url: str, uses: Mapping[str, Use]) -> Batch | None:
        """Write down a batch of as many requests, from the first on, as the budget has room for; None where it has none."""
        with self._writing() as db:
            spent, taken, need = self._spent(db), dict[str, Use](), Use(0, 0)
            for name, use in uses.items():
                more = Use(need.prompt + use.prompt, need.completion + use.completion)
                if not self._fits(spent, more):
                    break
                taken[name], need = use, more
            if not taken:
                return None
            batch = Batch(tag=uuid.uuid4().hex, uses=taken)
            self._take(db, need, len(taken))
            db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, '', '', NULL, ?, ?)",
                (batch.tag, self.account, url, json.dumps(taken), time.time()),
            )
        return batch

    def name(self, batch: Batch, *, file: str, id: str = "") -> Batch:
        """Write down what the server calls a batch and its file; return it with that."""
        with self._writing() as db:
            db.execute("UPDATE batches SET file = ?, id = ? WHERE tag = ?", (file, id, batch.tag))
        return Batch(tag=batch.tag, uses=batch.uses, file=file, id=id)

    def end(self, batch: Batch, cost: Use | None) -> None:
        """Write down that a batch has ended, and what it did cost; None: it never was at the server. A second time changes nothing:
        two builds may wait for it.
        """
        with self._writing() as db:
            found = db.execute("UPDATE batches SET ended = ? WHERE tag = ? AND ended IS NULL", (time.time(), batch.tag))
            if found.rowcount == 1:
                self._set_right(db, batch.most, cost or Use(0, 0))
            if found.rowcount == 1 and cost is None:
                db.execute(
                    "UPDATE spending SET requests = requests - ? WHERE account = ?", (len(batch.uses), self.account)
                )


def total(uses: Iterable[Use]) -> Use:
    """Return the sum."""
    every = list(uses)
    return Use(sum(use.prompt for use in every), sum(use.completion for use in every))
