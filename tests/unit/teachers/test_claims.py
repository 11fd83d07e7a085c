"""Two builds with questions in common: each question is put by one of them, whoever gives up or is killed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import StepFailed
from edgedistill.rows import Answered, RowStore
from edgedistill.spending import Budget, Use
from edgedistill.teachers import claims
from edgedistill.teachers.batch_book import Book
from edgedistill.teachers.claims import ask_once

HERE = "http://x"
KILLED = """
import sys, time
from pathlib import Path
from edgedistill.teachers.claims import ask_once

def ask(numbers, others):
    print(*numbers, flush=True)
    time.sleep(600)

ask_once(Path(sys.argv[1]), sys.argv[2:], ask, note=print)
"""


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "OTHERS_S", 0.02)


class Build:
    """A build: what it puts, what it is told, and what it does with a question before it stores the answer."""

    def __init__(self, folder: Path, before: Callable[[str], object] = lambda key: None) -> None:
        self.store, self.before = RowStore(folder), before
        self.put, self.notes, self.others = list[str](), list[str](), list[int]()

    def ask(self, *keys: str) -> int:
        def ask(numbers: Sequence[int], others: int) -> None:
            for number in numbers:
                self.put.append(keys[number])
                self.before(keys[number])
                answered(self.store, keys[number])

        put = ask_once(self.store.path, keys, ask, note=self.notes.append, waiting=self.others.append)
        assert put.waited > 0 or not self.others
        return put.count


class Gate:
    """Hold a build before it stores an answer, until ``go``."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, key: str) -> None:
        self.begun.set()
        assert self.go.wait(60)


def waits(build: Build, asking: Future[int]) -> None:
    """Return when a build waits for others."""
    while not build.others:
        assert not asking.done()


def answered(store: RowStore, *keys: str) -> None:
    store.add_by_key("t", [Answered(key=key, text="", token_ids=(), finish="stop", logprob=0.0) for key in keys])


def claimed(folder: Path) -> int:
    book = Book(folder / "rows.sqlite", "", Budget())
    with book._writing() as db:
        return db.execute("SELECT count(*) FROM singly").fetchone()[0]


def test_alone_it_puts_what_is_not_answered(tmp_path: Path) -> None:
    build = Build(tmp_path)
    answered(build.store, "b")
    assert build.ask("a", "b", "c") == 2 and build.put == ["a", "c"]
    assert build.ask("a", "b", "c") == 0 and build.ask() == 0
    assert (build.notes, build.others, claimed(tmp_path)) == ([], [], 0)


def test_what_another_puts_is_waited_for_and_not_put(tmp_path: Path) -> None:
    gate = Gate()
    first, second = Build(tmp_path, gate), Build(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.ask, "a", "b", "c")
        assert gate.begun.wait(30)
        two = pool.submit(second.ask, "b", "c", "d")
        waits(second, two)
        assert second.put == ["d"], "it does not wait while it has something to put"
        assert second.others[0] == 2
        gate.go.set()
        assert (one.result(30), two.result(30)) == (3, 1)
    assert first.put == ["a", "b", "c"] and second.put == ["d"]
    (note,) = second.notes
    assert note.startswith("process ") and note.endswith(" asks 2 of the questions: waiting for its answers")
    assert claimed(tmp_path) == 0


def test_what_one_gives_up_the_other_puts(tmp_path: Path) -> None:
    gate = Gate()

    def fail(key: str) -> None:
        if key == "b":
            gate(key)
            raise StepFailed("teacher.budget: spent", "raise it")

    first, second = Build(tmp_path, fail), Build(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.ask, "a", "b", "c")
        assert gate.begun.wait(30)
        two = pool.submit(second.ask, "a", "b", "c")
        waits(second, two)
        gate.go.set()
        with pytest.raises(StepFailed, match="spent"):
            one.result(30)
        assert two.result(30) == 2 and second.put == ["b", "c"]
    assert claimed(tmp_path) == 0


def test_what_a_killed_build_was_at_the_one_that_waits_puts(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "rows.sqlite"), "a", "b"], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "0 1\n"
    second = Build(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        two = pool.submit(second.ask, "b", "c")
        waits(second, two)
        assert f"process {first.pid} on " in second.notes[0]
        first.kill()
        first.communicate()
        assert two.result(30) == 2 and second.put == ["c", "b"]
    assert Build(tmp_path).ask("a", "b") == 1, "claims of the dead are nobody's"
    assert claimed(tmp_path) == 0


def test_a_batch_and_single_questions_wait_for_each_other(tmp_path: Path) -> None:
    single, batches = Build(tmp_path), Book(tmp_path / "rows.sqlite", "a", Budget())

    def look(key: str) -> None:
        if key == "c":
            other = Book(tmp_path / "rows.sqlite", "b", Budget())
            assert list(other.look(HERE, {"b", "c", "d"})[1]) == ["c"], "b is answered by now"
            opened = other.open(HERE, dict.fromkeys(("b", "c", "d"), Use(1, 1)))
            assert opened is not None and list(opened.uses) == ["d"]
            assert other.stopped(["d"]) == {}, "the server has no such batch"

    single.before = look
    with batches.at_work():
        batch = batches.open(HERE, {"a": Use(1, 1)})
        assert batch is not None
        with ThreadPoolExecutor(1) as pool:
            alone = pool.submit(single.ask, "a", "b", "c")
            waits(single, alone)
            assert single.put == ["b", "c"]
            answered(single.store, "a")
            batches.end(batch, Use(1, 1))
            assert alone.result(30) == 2


def test_of_a_stopped_batch_it_is_said_that_it_is_paid_twice(tmp_path: Path) -> None:
    batches, single = Book(tmp_path / "rows.sqlite", "a", Budget()), Build(tmp_path)
    with batches.at_work():
        opened = batches.open(HERE, dict.fromkeys(("a", "b"), Use(1, 1)))
        assert opened is not None
        batches.name(opened, file="f", id="batch_7")
    assert single.ask("b", "c") == 2
    assert single.notes == [
        "batch_7 has 1 of the questions and runs on at its server: without teacher.batch they are paid twice"
    ]
    assert Build(tmp_path).ask("x") == 1


def test_a_builds_batches_are_looked_at_again_while_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BATCHES_S", 0.05)
    batches, single = Book(tmp_path / "rows.sqlite", "a", Budget()), Build(tmp_path)
    with batches.at_work(), ThreadPoolExecutor(1) as pool:
        both = [batches.open(HERE, {name: Use(1, 1)}) for name in ("a", "b")]
        waiting = pool.submit(single.ask, "a")
        waits(single, waiting)
        assert both[0] is not None
        answered(single.store, "a")
        batches.end(both[0], Use(1, 1))
        assert waiting.result(30) == 0, "the other batch has nothing that it waits for"


def test_who_waits_does_not_write(tmp_path: Path) -> None:
    """So whoever stores answers never waits for it, however many questions there are."""
    gate = Gate()
    first, second = Build(tmp_path, gate), Build(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.ask, "a", "b")
        assert gate.begun.wait(30)
        two = pool.submit(second.ask, "a", "b")
        waits(second, two)
        with closing(sqlite3.connect(tmp_path / "rows.sqlite", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            looks = len(second.others)
            while len(second.others) < looks + 5:
                assert not two.done()
            db.execute("COMMIT")
        gate.go.set()
        assert (one.result(60), two.result(60)) == (2, 0)


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 30), max_size=20, unique=True), min_size=2, max_size=4))
def test_however_they_overlap_each_is_put_once(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("builds")
    builds = [Build(folder) for _ in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        done = [pool.submit(build.ask, *map(str, numbers)) for build, numbers in zip(builds, wanted, strict=True)]
        counts = [one.result(60) for one in done]
    put = Counter(key for build in builds for key in build.put)
    assert put == dict.fromkeys({str(number) for numbers in wanted for number in numbers}, 1)
    assert counts == [len(build.put) for build in builds]
    assert builds[0].store.known(put) == set(put) and claimed(folder) == 0
