"""The book of batches: who is at which, what living builds ask, and the money of each, booked once."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest

from edgedistill.rows import Answered, RowStore
from edgedistill.spending import Budget, Ledger, Use
from edgedistill.store import LEASE_DEAD_S, is_dead, new_holder
from edgedistill.teachers.batch_book import Batch, Book

HERE = "http://x"
ONE = Use(100, 10)


def book(folder: Path, account: str = "a", *, input: float = 0.0, output: float = 0.0) -> Book:
    return Book(folder / "rows.sqlite", account, Budget(input=input, output=output))


def opened(own: Book, *names: str) -> Batch:
    batch = own.open(HERE, dict.fromkeys(names, ONE))
    assert batch is not None
    return batch


def test_a_batch_is_settled_once(tmp_path: Path) -> None:
    own = Book(tmp_path / "rows.sqlite", "a", Budget(tokens=200))
    batch = opened(own, "r1", "r2")
    assert list(batch.uses) == ["r1"]
    assert own.under_way(HERE) == [batch] and own.under_way("http://y") == []
    own.end(batch, Use(7, 3))
    own.end(batch, Use(7, 3))
    assert (own.spent().tokens, own.spent().requests) == (10, 1)
    assert own.under_way(HERE) == []


def test_what_one_asks_no_other_opens(tmp_path: Path) -> None:
    first, second = book(tmp_path), book(tmp_path, "b")
    RowStore(tmp_path).add_by_key("t", [Answered(key="r4", text="", token_ids=(), finish="stop", logprob=0.0)])
    with second.at_work():
        with first.at_work():
            batch = opened(first, "r1", "r2")
            assert list(opened(second, "r2", "r3", "r4").uses) == ["r3"]
            adopted, held = second.look(HERE, {"r1", "r3", "r5"})
            assert adopted == [] and held == {"r1": held["r1"]} and str(os.getpid()) in held["r1"]
            assert opened(second, "r1", "r4").uses == {} and second.spent().requests == 1
            first.end(batch, Use(7, 3), ["r2"])
            assert list(second.look(HERE, {"r1", "r2"})[1]) == ["r2"]
            assert list(opened(second, "r1", "r2").uses) == ["r1"]
            first.put()
            assert list(opened(second, "r2").uses) == ["r2"]
            last = opened(first, "r6")
        assert second.look("http://y", {"r6"}) == ([], {})  # nobody's, and at another server
        assert second.look(HERE, {"r6"}, {last.tag}) == ([], {})
        assert second.look(HERE, {"r6"}) == ([last], {})


def test_a_batch_is_paid_by_its_own_recipe_at_its_own_price(tmp_path: Path) -> None:
    first, second = book(tmp_path, input=1e6, output=2e6), book(tmp_path, "b", input=5e6, output=5e6)
    with first.at_work():
        batch = opened(first, "r1")
    assert Ledger(tmp_path / "rows.sqlite", "a", Budget()).spent().money == pytest.approx(120)
    with second.at_work():
        assert second.look(HERE, {"r1"}) == ([batch], {})
        first.end(batch, Use(50, 5))  # it is not the first one's any more
        assert first.spent().money == pytest.approx(120)
        second.end(batch, Use(7, 3))
    assert first.spent().money == pytest.approx(13) and second.spent().requests == 0


def test_a_build_that_was_taken_for_dead_pays_for_the_batch_that_it_created(tmp_path: Path) -> None:
    """A machine that slept a minute: another has taken its batch for one that never was."""
    first, second = book(tmp_path), book(tmp_path, "b")
    with first.at_work(), second.at_work():
        batch = first.name(opened(first, "r1"), file="f")
        with sqlite3.connect(first.path) as db:
            there = '{"host": "elsewhere", "pid": 1, "boot": ""}'
            db.execute("UPDATE askers SET holder = ?, beat = 0 WHERE token = ?", (there, first.asker))
        assert first.ours(batch)
        assert second.look(HERE, {"r1"})[0] == [batch] and not first.ours(batch)
        second.end(batch, None)
        assert first.spent().requests == first.spent().tokens == 0
        batch = first.name(batch, file="f", id="batch_1")
        assert first.ours(batch) and (first.spent().requests, first.spent().tokens) == (1, ONE.tokens)
        second.end(batch, None)
        first.end(batch, Use(7, 3))
        first.end(batch, Use(7, 3))
    assert (first.spent().requests, first.spent().tokens) == (1, 10)


def test_a_book_of_before_is_read(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "rows.sqlite") as db:
        db.execute(
            "CREATE TABLE batches (tag TEXT PRIMARY KEY, account TEXT NOT NULL, url TEXT NOT NULL, file TEXT NOT NULL, "
            "id TEXT NOT NULL, ended REAL, uses TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID"
        )
        db.execute(
            "INSERT INTO batches VALUES ('t', 'a', ?, 'f', 'batch_1', NULL, '{\"r1\": [100, 10]}', 1.0)", (HERE,)
        )
    own = book(tmp_path, input=3.0)
    with own.at_work():
        ((batch,), held) = own.look(HERE, {"r1"})
        assert (batch.id, batch.input, batch.uses, held) == ("batch_1", 3.0, {"r1": ONE}, {})
        assert list(opened(own, "r1", "r2").uses) == ["r2"]


def test_a_holder_is_dead_when_its_process_is_another_now(tmp_path: Path) -> None:
    me, now = new_holder(), time.time()
    assert not is_dead(me, 0.0)  # here the process tells
    assert is_dead({**me, "started": "1"}, now)
    assert is_dead({**me, "boot": "another"}, now - LEASE_DEAD_S - 1) and not is_dead({**me, "host": "there"}, now)
    child = os.fork()
    if child == 0:
        os._exit(0)
    while (Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
        time.sleep(0.01)
    assert is_dead({**me, "pid": child}, now)  # nobody has waited for it yet
    os.waitpid(child, 0)
