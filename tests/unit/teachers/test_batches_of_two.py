"""Two builds, each a process, that ask a server in batches at once: each question is asked and paid once, whoever is killed."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from edgedistill.rows import Answered, RowStore
from edgedistill.spending import Budget, Ledger
from tests.batch_client import start
from tests.batch_server import BatchServer, wait_for
from tests.planned_server import USAGE

EACH = sum(USAGE.values())
FIRST, SECOND = range(0, 8), range(4, 12)
SLOW = pytest.mark.slow


def finish(client: subprocess.Popen[str]) -> str:
    """Wait for a client; return what it noted."""
    said = client.communicate(timeout=60)[0]
    assert client.returncode == 0, said
    return said


def spent(folder: Path, account: str) -> tuple[int, int, float]:
    found = Ledger(folder / "rows.sqlite", account, Budget()).spent()
    return found.requests, found.tokens, found.money


def all_is_well(folder: Path, there: BatchServer, rows: int, accounts: str = "a") -> None:
    """Each of the questions was asked once and is stored, and the accounts hold what the server bills."""
    asked = there.batched + there.single
    assert dict(asked) == dict.fromkeys(range(rows), 1)
    assert RowStore(folder).known(f"r{row}" for row in range(rows)) == {f"r{row}" for row in range(rows)}
    assert sum(spent(folder, one)[1] for one in accounts) == there.billed == rows * EACH
    assert sum(spent(folder, one)[0] for one in accounts) == rows
    with sqlite3.connect(folder / "rows.sqlite") as db:
        assert db.execute("SELECT count(*) FROM batches WHERE ended IS NULL").fetchone() == (0,)


@pytest.mark.parametrize("step", [pytest.param("upload", marks=SLOW), "create", pytest.param("poll", marks=SLOW)])
def test_a_batch_that_a_living_build_is_at_is_not_asked_again(tmp_path: Path, step: str) -> None:
    """The second comes while the first is uploading, creating or waiting, and asks only what the first does not."""
    with BatchServer(fate=lambda batch: "completed after 20") as there:
        there.slow = {step: 2.0}
        there.hanging.clear()
        first = start(tmp_path, there.url, FIRST, input=2.0, output=4.0)
        wait_for(there.hanging)
        there.slow = {}
        second = start(tmp_path, there.url, SECOND, account="b")
        said = finish(second)
        finish(first)
        assert f"process {first.pid} on " in said and "4 of the questions" in said
        all_is_well(tmp_path, there, 12, "ab")
    assert spent(tmp_path, "a") == (8, 8 * EACH, pytest.approx(8 * (20 * 2.0 + 10 * 4.0) / 2 / 1e6))
    assert spent(tmp_path, "b")[:2] == (4, 4 * EACH)


@pytest.mark.parametrize(
    ("step", "account"),
    [
        pytest.param(step, account, marks=[] if (step, account) == ("late create", "b") else SLOW)
        for step in ("before upload", "upload", "before create", "late create", "create", "poll")
        for account in "ab"
    ],
)
def test_a_killed_build_is_taken_over_by_the_one_that_waits_for_it(tmp_path: Path, step: str, account: str) -> None:
    """``late``: the server creates the batch when whoever asked is dead."""
    with BatchServer() as there:
        there.hang = step
        first = start(tmp_path, there.url, FIRST, input=2.0, output=4.0)
        wait_for(there.hanging)
        there.hang = ""
        second = start(tmp_path, there.url, SECOND, account=account)
        assert second.stdout is not None
        while "questions" not in second.stdout.readline():  # it waits
            assert second.poll() is None
        first.kill()
        first.communicate()
        finish(second)
        finish(start(tmp_path, there.url, FIRST, input=2.0, output=4.0))  # what only the first wanted
        all_is_well(tmp_path, there, 12, "ab")
    money = spent(tmp_path, "a")[2]
    if "upload" not in step and step != "before create":  # the first one's batch, at its price
        assert money == pytest.approx(8 * (20 * 2.0 + 10 * 4.0) / 2 / 1e6)


def test_what_a_batch_failed_at_is_asked_by_one_of_them(tmp_path: Path) -> None:
    """By itself, after the batch: the other build must not put it in a batch meanwhile."""
    with BatchServer(plan=lambda row, batch: "500" if row in (5, 6, 10) else "ok") as there:
        there.slow = {"create": 1.0, "single": 1.0}
        first = start(tmp_path, there.url, FIRST)
        wait_for(there.hanging)
        second = start(tmp_path, there.url, SECOND, account="b")
        finish(second)
        finish(first)
        assert dict(there.single) == {5: 1, 6: 1, 10: 1}
        assert {row: count for row, count in there.batched.items() if count > 1} == {}
    assert RowStore(tmp_path).counts()["rows"] == 12
    assert sum(spent(tmp_path, one)[1] for one in "ab") == there.billed


@SLOW
def test_what_a_killed_build_was_to_ask_by_itself_is_asked_by_the_other(tmp_path: Path) -> None:
    with BatchServer(plan=lambda row, batch: "500" if row == 5 and batch == 1 else "ok") as there:
        there.hang = "before single"
        first = start(tmp_path, there.url, FIRST)
        wait_for(there.hanging)
        there.hang = ""
        second = start(tmp_path, there.url, SECOND, account="b")
        assert second.stdout is not None
        while "questions" not in second.stdout.readline():
            assert second.poll() is None
        first.kill()
        first.communicate()
        finish(second)
    assert RowStore(tmp_path).counts()["rows"] == 12 and there.single + there.batched == {
        row: 1 + (row == 5) for row in range(12)
    }


def test_a_build_that_died_between_the_answers_and_the_bill_is_settled(tmp_path: Path) -> None:
    """All that it asked is stored, so no later build asks for it; what it did cost is still to be said."""
    with BatchServer() as there:
        there.hang = "download"
        first = start(tmp_path, there.url, FIRST)
        wait_for(there.hanging)
        first.kill()
        first.communicate()
        there.hang = ""
        stored = [
            Answered(key=f"r{row}", text=f"answer {row}", token_ids=(), finish="stop", logprob=0.0) for row in FIRST
        ]
        RowStore(tmp_path).add_by_key("t", stored)
        finish(start(tmp_path, there.url, range(8, 12)))
        all_is_well(tmp_path, there, 12)


@SLOW
def test_builds_that_are_killed_at_any_moment_pay_for_each_question_once(tmp_path: Path) -> None:
    """Three recipes at a time, in small batches; at last each asks one more, and settles what its dead builds left."""
    rng, ranges = random.Random(3), {"a": range(0, 60), "b": range(20, 80), "c": range(40, 100)}
    with BatchServer(fate=lambda batch: f"completed after {1 + batch % 7}") as there:
        there.slow = {"create": 0.2, "upload": 0.1, "download": 0.2}
        running = {name: start(tmp_path, there.url, rows, account=name, requests=3) for name, rows in ranges.items()}
        for _ in range(10):
            time.sleep(rng.uniform(0.8, 2.5))
            name = rng.choice("abc")
            running[name].kill()
            running[name].communicate()
            running[name] = start(tmp_path, there.url, ranges[name], account=name, requests=3)
        for client in running.values():
            finish(client)
        for name, row in zip("abc", range(100, 103), strict=True):
            finish(start(tmp_path, there.url, range(row, row + 1), account=name))
        all_is_well(tmp_path, there, 103, "abc")
