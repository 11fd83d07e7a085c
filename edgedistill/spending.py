"""What a recipe spends on a teacher behind a server, and the budget that it may not exceed.

The sums stand beside the rows, one line an account, so that all builds of a recipe on a store share one budget. What a request may
cost at most is taken out before it is sent, and set right when its answer says what it did cost: a build that is killed in between
has spent it, since the server may have answered. So the sum is never too small.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from edgedistill.errors import UsageError

SCHEMA = """
CREATE TABLE IF NOT EXISTS spending (
    account    TEXT PRIMARY KEY,
    requests   INTEGER NOT NULL,
    prompt     INTEGER NOT NULL,
    completion INTEGER NOT NULL,
    money      REAL NOT NULL
) WITHOUT ROWID;
"""
MILLION = 1_000_000
TEMPLATE = 64
"""Tokens that a chat template may put around a conversation: a system message of its own, say."""


class Use(NamedTuple):
    """Tokens of a request (or of several): those of what is asked, and those that are written."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Return both."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds on what is spent, None for none, and the prices of a million tokens of prompt and of answer."""

    tokens: int | None = None
    money: float | None = None
    input: float = 0.0
    output: float = 0.0

    def cost(self, use: Use) -> float:
        """Return the price of so many tokens."""
        return (use.prompt * self.input + use.completion * self.output) / MILLION


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What an account has spent: requests, tokens and money, with what is taken out for requests under way."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        """Return the tokens of prompts and answers."""
        return self.prompt + self.completion


def most(body: Mapping[str, Any]) -> Use:
    """Return what a request can cost at most. No tokenizer makes more tokens of a text than it has bytes."""
    limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)
    if isinstance(given := body.get("prompt"), list):
        return Use(len(given), limit)
    return Use(len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")) + TEMPLATE, limit)


def used(reply: Mapping[str, Any]) -> Use | None:
    """Return what a reply says that it cost; None where it says nothing."""
    usage = reply.get("usage")
    if not isinstance(usage, Mapping) or not isinstance(usage.get("prompt_tokens"), int):
        return None
    return Use(usage["prompt_tokens"], int(usage.get("completion_tokens") or 0))


class Ledger:
    """One account in ``rows.sqlite``. Safe for several processes: a reservation is one transaction."""

    schema: ClassVar[str] = SCHEMA

    def __init__(self, path: Path, account: str, budget: Budget) -> None:
        self.path, self.account, self.budget = path, account, budget
        self._db: sqlite3.Connection | None = None

    def reserve(self, use: Use) -> bool:
        """Take a request's most out of the budget; False, and nothing taken, where that much is not left."""
        with self._writing() as db:
            if not self._fits(self._spent(db), use):
                return False
            self._take(db, use)
        return True

    def settle(self, reserved: Use, actual: Use) -> None:
        """Set right what a request took out, now that it is known what it cost."""
        with self._writing() as db:
            self._set_right(db, reserved, actual)

    def over(self, need: Use) -> str:
        """Say of a request that may take so much, and that the budget has no room for, what is spent."""
        budget, spent, parts = self.budget, self.spent(), list[str]()
        if budget.tokens is not None:
            parts.append(f"{spent.tokens:,} of {budget.tokens:,} tokens are spent, a request may take {need.tokens:,}")
        if budget.money is not None:
            parts.append(
                f"{spent.money:.4g} of {budget.money:.4g} is spent, a request may cost {budget.cost(need):.2g}"
            )
        return "teacher.budget: " + "; ".join(parts)

    def spent(self) -> Spent:
        """Return what the account has spent so far, in all builds."""
        if not self.path.exists():
            return Spent()
        with self._writing() as db:
            return self._spent(db)

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _spent(self, db: sqlite3.Connection) -> Spent:
        found = db.execute(
            "SELECT requests, prompt, completion, money FROM spending WHERE account = ?", (self.account,)
        ).fetchone()
        return (
            Spent() if found is None else Spent(requests=found[0], prompt=found[1], completion=found[2], money=found[3])
        )

    def _fits(self, spent: Spent, use: Use) -> bool:
        """Tell whether the budget has so much left."""
        budget, price = self.budget, self.budget.cost(use)
        # a billionth is forgiven: sums of prices are not exact
        return (budget.tokens is None or spent.tokens + use.tokens <= budget.tokens) and (
            budget.money is None or spent.money + price <= budget.money + 1e-9
        )

    def _take(self, db: sqlite3.Connection, use: Use, requests: int = 1) -> None:
        db.execute(
            "INSERT INTO spending VALUES (?, ?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET "
            "requests = requests + excluded.requests, prompt = prompt + excluded.prompt, "
            "completion = completion + excluded.completion, money = money + excluded.money",
            (self.account, requests, use.prompt, use.completion, self.budget.cost(use)),
        )

    def _set_right(self, db: sqlite3.Connection, reserved: Use, actual: Use) -> None:
        more = Use(actual.prompt - reserved.prompt, actual.completion - reserved.completion)
        db.execute(
            "UPDATE spending SET prompt = prompt + ?, completion = completion + ?, money = money + ? WHERE account = ?",
            (more.prompt, more.completion, self.budget.cost(more), self.account),
        )

    def _widen(self, db: sqlite3.Connection) -> None:
        """Give tables of an earlier version what they lack."""

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Look and write in one transaction, which no other writer comes between."""
        with self._errors():
            db = self._connected()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Look, and keep no writer waiting."""
        with self._errors():
            yield self._connected()

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # as the row store
            self._db.executescript(self.schema)
            self._widen(self._db)
        return self._db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UsageError(
                f"{self.path}: {error}", "free some disk space, or look at the file: stored rows are kept"
            ) from error
