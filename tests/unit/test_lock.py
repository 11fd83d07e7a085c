"""The lock file: what people write into it by hand is told of by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.lock import read_lock, write_lock
from edgedistill.models import HubFile

GOOD = '[models."pypi:one"]\nrevision = "1"\ndigest = "d"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[models."pypi:one"]\nrevision = "1"\n', 'models."pypi:one": has no digest'),
        ('[data."hf:a/b/c.csv"]\ndigest = "d"\n', 'data."hf:a/b/c.csv": has no revision'),
        ('[models."pypi:one"]\nrevision = 1\ndigest = "d"\n', 'models."pypi:one".revision: is 1, no text'),
        ('[models]\n"pypi:one" = "1"\n', "models.\"pypi:one\": is '1', no table"),
        ("models = 3\n", "models: is 3, no table"),
        ("[models\n", "not a lock file"),
        (b"\xff\xfe", "not a lock file"),
    ],
)
def test_a_lock_that_was_edited_is_refused_by_file_and_key(text: str | bytes, said: str, tmp_path: Path) -> None:
    lock = tmp_path / "one.lock"
    lock.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = lock.read_bytes()
    with pytest.raises(UsageError) as caught:
        write_lock(lock, [])
    assert caught.value.message.startswith(f"{lock}: ") and said in caught.value.message
    assert "to pin anew" in caught.value.hint
    assert lock.read_bytes() == before


def test_what_is_pinned_is_read_back(tmp_path: Path) -> None:
    lock = tmp_path / "one.lock"
    assert read_lock(lock) == {}
    lock.write_text(GOOD)
    write_lock(lock, [HubFile(source="hf:a/b/c.csv", revision="2", digest="e", path=tmp_path)], "data")
    assert read_lock(lock) == {"pypi:one": {"revision": "1", "digest": "d"}}
    assert read_lock(lock, "data") == {"hf:a/b/c.csv": {"revision": "2", "digest": "e"}}


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "missing" / "one.lock"
    with pytest.raises(UsageError, match=r"one\.lock: cannot be written \(No such file or directory\)"):
        write_lock(lock, [HubFile(source="hf:a/b/c.csv", revision="2", digest="e", path=tmp_path)], "data")
