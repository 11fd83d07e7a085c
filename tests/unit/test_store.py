"""The store: entries appear whole or not at all, damage is found, two builds do not do the same work twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key, digest
from edgedistill.gc import collect_garbage, list_store, verify_store
from edgedistill.rows import Answered, Question, RowStore
from edgedistill.store import Damaged, Entry, Store, write_atomic


def put(store: Store, name: str, text: str = "hello", inputs: dict[Key, str] | None = None) -> Entry:
    key = Key(digest(name))
    out, _ = store.partial(key, {})
    (out / "file.txt").write_text(text)
    (out / "log").mkdir()
    (out / "log" / "time.txt").write_text(str(time.time_ns()))
    return store.commit(
        key, stage=name, inputs=inputs or {}, fields={"name": name}, facts={"n": 1}, seconds=0.1, versions={}
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_an_entry_comes_back_with_its_facts(store: Store) -> None:
    made = put(store, "a")
    found = Store(store.root).load(made.key)
    assert found is not None
    assert (found.digest, found.facts, found.stage) == (made.digest, {"n": 1}, "a")
    assert not (store.root / "partial" / made.key).exists()


def test_a_log_is_kept_but_does_not_change_the_digest(store: Store, tmp_path: Path) -> None:
    first, second = put(store, "a"), put(Store(tmp_path / "other"), "a")
    assert (first.path / "log" / "time.txt").read_text() != (second.path / "log" / "time.txt").read_text()
    assert first.digest == second.digest


def test_without_entry_json_there_is_no_entry(store: Store) -> None:
    made = put(store, "a")
    (made.path / "entry.json").unlink()
    assert Store(store.root).load(made.key) is None


def test_a_straggler_cannot_write_into_the_next_attempt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child of a killed build still writes is in the way of deleting it, and must not come into the entry."""
    key = Key(digest("a"))
    out, work = store.partial(key, {})
    (out / ".onnx-half").mkdir()
    (work / "checkpoint").touch()
    monkeypatch.setattr("edgedistill.store.shutil.rmtree", lambda path, **_: (Path(path) / "late").touch())
    out, work = store.partial(key, {Key("of other"): "bytes"})
    assert list(out.iterdir()) == list(work.iterdir()) == []
    monkeypatch.undo()
    assert list(put(store, "a").files) == ["file.txt", "log/time.txt"]
    assert collect_garbage(store, [key])[0] == 0
    assert list((store.root / "partial").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "entry"])
def test_damage_is_found(store: Store, damage: str) -> None:
    made = put(store, "a")
    file = made.path / "file.txt"
    if damage == "cut":
        file.write_text("hell")
    elif damage == "flip":
        file.write_text("jello")
        os.utime(file, ns=(1, 1))
    elif damage == "gone":
        file.unlink()
    else:
        (made.path / "entry.json").write_text('{"stage": ')
    with pytest.raises(Damaged, match="damaged entry"):
        Store(store.root).load(made.key)
    assert len(verify_store(Store(store.root))) == 1


def test_a_flip_that_kept_size_and_mtime_is_found_when_it_is_consumed(store: Store) -> None:
    made = put(store, "a")
    file = made.path / "file.txt"
    stat = file.stat()
    file.write_text("jello")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fresh = Store(store.root)
    entry = fresh.load(made.key)
    assert entry is not None
    with pytest.raises(Damaged, match="other bytes"):
        fresh.verify(entry)


def test_a_touched_file_with_the_same_bytes_is_fine(store: Store) -> None:
    made = put(store, "a")
    os.utime(made.path / "file.txt", ns=(1, 1))
    assert Store(store.root).load(made.key) is not None


def test_descendants_live_as_long_as_their_inputs_have_the_same_bytes(store: Store) -> None:
    a = put(store, "a")
    b = put(store, "b", inputs={a.key: a.digest})
    store.discard(a.key)
    assert "gone" in store.inputs_match(b)
    put(store, "a")
    assert store.inputs_match(b) == ""
    store.discard(a.key)
    put(store, "a", text="other")
    assert "other bytes" in store.inputs_match(b)


def test_the_second_of_two_holders_waits_and_finds_the_work_done(store: Store) -> None:
    key, order = Key(digest("x")), []

    def first() -> None:
        with store.lease(key) as mine:
            order.append(("first", mine))
            started.set()
            time.sleep(0.5)
            put(store, "x")

    started = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    told: list[str] = []
    with Store(store.root).lease(key, waiting=told.append) as mine:
        order.append(("second", mine))
    thread.join()
    assert order == [("first", True), ("second", False)]
    assert told and str(os.getpid()) in told[0]


def test_the_lease_of_a_dead_process_is_taken_over(store: Store) -> None:
    code = (
        "import os, sys; from pathlib import Path; from edgedistill.store import Store\n"
        "from edgedistill.fingerprint import Key\n"
        f"lease = Store(Path({str(store.root)!r})).lease(Key('dead')); lease.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (store.root / "leases" / "dead.json").exists()
    began = time.monotonic()
    with store.lease(Key("dead")) as mine:
        assert mine
    assert time.monotonic() - began < 5


def test_gc_keeps_what_is_needed_and_never_the_rows_unless_asked(store: Store) -> None:
    a, b = put(store, "a"), put(store, "b")
    rows = RowStore(store.root)
    rows.add([(question("hi"), answer("ho"))])
    (store.root / "partial" / "left").mkdir()
    assert collect_garbage(store, [a.key], dry_run=True)[0] == 1
    assert {line["key"] for line in list_store(store)} == {a.key, b.key}
    assert collect_garbage(store, [a.key])[0] == 1
    assert [line["key"] for line in list_store(store)] == [a.key]
    assert not (store.root / "partial" / "left").exists()
    assert rows.counts()["rows"] == 1
    assert collect_garbage(store, [a.key], rows=True)[2] == 1
    assert rows.counts()["rows"] == 0


def test_gc_deletes_all_entries_only_where_that_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store gc` is the remedy of a full disk: it must not take what is to be kept."""
    put(store, "a")
    monkeypatch.setenv("EDGEDISTILL_STORE", str(store.root))
    found = CliRunner().invoke(app, ["store", "gc"])
    assert isinstance(found.exception, UsageError) and "--keep RECIPE" in str(found.exception.hint)
    assert len(list_store(store)) == 1
    told = CliRunner().invoke(app, ["store", "gc", "--all"])
    assert told.exit_code == 0 and told.output.startswith("1 entries, freed")
    assert list_store(store) == []


def test_gc_leaves_what_a_build_under_way_needs(store: Store) -> None:
    a, b = put(store, "a"), put(store, "b")
    with store.using([a.key]):
        assert collect_garbage(Store(store.root), [])[0] == 1
    assert store.used() == set()
    assert [line["key"] for line in list_store(store)] == [a.key] != [b.key]
    code = (
        "import os; from pathlib import Path; from edgedistill.store import Store\n"
        f"held = Store(Path({str(store.root)!r})).using([{a.key!r}]); held.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list((store.root / "builds").iterdir())) == 1
    assert collect_garbage(store, [])[0] == 1  # a killed build needs nothing any more
    assert not list((store.root / "builds").iterdir())


def test_write_atomic_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", "one")
    write_atomic(tmp_path / "f", "two")
    assert (tmp_path / "f").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# ── rows ──


def question(text: str, **changes: object) -> Question:
    base = {"teacher": "t", "messages": (("user", text),), "sampling": (("temperature", 0.0),), "seed": 0}
    return Question(**{**base, **changes})  # type: ignore[arg-type]


def answer(text: str) -> Answered:
    return Answered(key="", text=text, token_ids=(1, 2), finish="stop", logprob=-0.5)


def test_a_row_is_keyed_by_what_was_asked_of_whom() -> None:
    base = question("hi")
    assert question("hi").key == base.key
    others = [question("ho"), question("hi", teacher="u"), question("hi", seed=1), question("hi", sample=1)]
    assert len({base.key, *(other.key for other in others)}) == 5


def test_rows_are_stored_once_and_asks_are_counted(tmp_path: Path) -> None:
    rows = RowStore(tmp_path)
    asked = [question("a"), question("b")]
    rows.asking(asked)
    rows.add([(asked[0], answer("first")), (asked[1], answer("b"))])
    rows.add([(asked[0], answer("second"))])
    assert rows.get([asked[0].key])[asked[0].key].text == "first"
    assert rows.counts() == {"rows": 2, "asks": 2}
    assert rows.asked_again() == []
    rows.asking(asked[:1])
    assert rows.asked_again() == [asked[0].key]


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgedistill.rows import *\n"
        "rows = RowStore(Path(sys.argv[1]))\n"
        "for i in range(40):\n"
        "    q = Question(teacher='t', messages=(('user', str(i)),), sampling=(), seed=0)\n"
        "    rows.add([(q, Answered(key='', text=sys.argv[2], token_ids=(), finish='stop', logprob=0.0))])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert RowStore(tmp_path).counts()["rows"] == 40


def test_a_row_store_that_is_no_database_is_named(tmp_path: Path) -> None:
    from edgedistill.errors import UsageError

    (tmp_path / "rows.sqlite").write_text("not a database, and long enough to be read as a header " * 4)
    with pytest.raises(UsageError, match=r"rows\.sqlite: not a readable row store"):
        RowStore(tmp_path).get(["x"])


def test_entry_json_is_plain_json(store: Store) -> None:
    made = put(store, "a")
    body = json.loads((made.path / "entry.json").read_text())
    assert set(body) == {"stage", "digest", "files", "inputs", "facts", "seconds", "created", "fields", "versions"}
