"""What is kept beside the entries comes back as it was or not at all, and goes with the file that it belongs to."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from edgedistill.fingerprint import Key, digest
from edgedistill.gc import collect_garbage, verify_store
from edgedistill.kept import WRITTEN, Kept
from edgedistill.store import Entry, Store


def put(store: Store, name: str) -> Entry:
    """Add an entry with a file of its own."""
    key = Key(digest(name))
    out, _ = store.partial(key, {})
    (out / "model.gguf").write_text(name)
    return store.commit(key, stage="convert", inputs={}, fields={}, facts={}, seconds=0.1, versions={})


def test_a_piece_comes_back_for_the_same_inputs_only(tmp_path: Path) -> None:
    kept = Kept(tmp_path, ["moments", [1, 2]], of="ab")
    kept.put({"a": b"one", "b": b"two"}.items())
    kept.put({"c": b"three"}.items())
    again = Kept(tmp_path, ["moments", [1, 2]], of="ab")
    assert [again.get(name) for name in "abcd"] == [b"one", b"two", b"three", None]
    assert Kept(tmp_path, ["moments", [1, 3]], of="ab").get("a") is None
    assert Kept(tmp_path, ["moments", [1, 2]], of="cd").get("a") is None


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "index"])
def test_a_damaged_piece_is_none(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    kept = Kept(tmp_path, "x", of="ab")
    kept.put({"a": b"one", "b": b"two"}.items())
    assert verify_store(store) == []
    file = kept.path / ("index.json" if damage == "index" else "a")
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": b"on", "other": b"ono", "index": b"{"}[damage])
    assert kept.get("a") is None
    assert kept.get("b") == (None if damage == "index" else b"two")
    assert len(verify_store(store)) == (damage != "index")
    kept.put({"a": b"one"}.items())
    assert kept.get("a") == b"one" and verify_store(store) == []


def test_it_goes_with_the_file_that_it_belongs_to(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = put(store, "one"), put(store, "two")
    mine, other = (Kept(tmp_path, "x", of=entry.files["model.gguf"].sha256) for entry in (one, two))
    for kept in (mine, other):
        kept.put({"a": b"some bytes"}.items())
    count, freed, _ = collect_garbage(store, [one.key], dry_run=True)
    assert count == 1 and freed > 10 and other.get("a") == b"some bytes"
    collect_garbage(store, [one.key])
    assert mine.get("a") == b"some bytes" and other.get("a") is None and not other.path.exists()


def test_what_killed_processes_left_half_written_is_swept_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = put(store, "one")
    kept = Kept(tmp_path, "x", of=one.files["model.gguf"].sha256)
    kept.put([("a", b"some bytes")])
    old, index, new = (kept.path / name for name in (".0123abcd", ".index.json.0123abcd", ".4567abcd"))
    for path in (old, index, new):
        path.write_bytes(b"half")
    ago = time.time() - WRITTEN - 60
    for path in (old, index, kept.path / "a"):
        os.utime(path, (ago, ago))
    assert collect_garbage(store, [one.key], dry_run=True)[1] == 8 and old.exists()
    assert collect_garbage(store, [one.key])[1] == 8
    assert not old.exists() and not index.exists() and new.exists()  # that one may be written at this moment
    assert kept.get("a") == b"some bytes"


def test_two_that_write_at_once_leave_whole_pieces(tmp_path: Path) -> None:
    data = {f"{number}": bytes([number]) * 5000 for number in range(20)}
    threads = [threading.Thread(target=lambda: Kept(tmp_path, "x", of="ab").put(data.items())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = Kept(tmp_path, "x", of="ab")
    assert all(kept.get(name) == value for name, value in data.items())
    assert not [path for path in kept.path.iterdir() if path.name.startswith(".")]
