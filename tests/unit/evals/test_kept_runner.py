"""What a reference says of a text is computed once, and is the same afterwards, to the last bit."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill import kept
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.runners.kept import TEXTS, KeptRunner
from edgedistill.fingerprint import file_digest
from edgedistill.kept import Kept, collect_kept, verify_kept

Rows = tuple[list[list[int]], list[range]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that llama.cpp is given at once."""
    found, whole = list[int](), GgufRunner.logprobs

    def counted(self: Any, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Any:
        found.append(len(token_rows))
        return whole(self, token_rows, positions)

    monkeypatch.setattr(GgufRunner, "logprobs", counted)
    return found


@pytest.fixture
def asked() -> Rows:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 200, size).tolist() for size in (9, 30, 4, 17, 17)]
    return rows, [range(len(row) // 2, len(row)) for row in rows]


def test_what_was_computed_is_not_computed_again(
    tmp_path: Path, tiny_file: Path, computed: list[int], asked: Rows
) -> None:
    with GgufRunner(tiny_file, threads=1) as plain:
        wanted = list(plain.logprobs(*asked))
    computed.clear()
    for _ in range(2):
        with KeptRunner(tiny_file, root=tmp_path, threads=1) as runner:
            found = list(runner.logprobs(*asked))
            assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
            assert list(runner.logprobs([], [])) == []
    assert computed == [5]
    with KeptRunner(tiny_file, root=tmp_path, threads=1) as runner:
        assert len(list(runner.logprobs(asked[0][:2], asked[1][:2]))) == 2
    assert computed == [5, 2], "other rows at once are another computation"


def test_what_is_damaged_or_broken_off_is_computed_again(
    tmp_path: Path, tiny_file: Path, computed: list[int], asked: Rows
) -> None:
    with KeptRunner(tiny_file, root=tmp_path, threads=1) as runner:
        broken_off = runner.logprobs(*asked)
        first = [next(iter(broken_off)) for _ in range(2)]
        assert isinstance(broken_off, Generator)
        broken_off.close()
        wanted = list(runner.logprobs(*asked))
        assert all(np.array_equal(one, other) for one, other in zip(first, wanted, strict=False))
        assert computed == [5, 5]
        (piece,) = tmp_path.glob("kept/*/3")
        piece.write_bytes(b"\0" * piece.stat().st_size)
        assert len(verify_kept(tmp_path)) == 1
        found = list(runner.logprobs(*asked))
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert computed == [5, 5, 5] and verify_kept(tmp_path) == []


def test_it_belongs_to_the_files_bytes(tmp_path: Path, tiny_file: Path, computed: list[int], asked: Rows) -> None:
    copy = Path(shutil.copy(tiny_file, tmp_path / "copy.gguf"))
    for path in (tiny_file, copy):
        with KeptRunner(path, root=tmp_path, threads=1) as runner:
            list(runner.logprobs(*asked))
    assert computed == [5]
    assert collect_kept(tmp_path, {file_digest(tiny_file)}) == 0
    assert collect_kept(tmp_path, {"another"}) > 0 and not list(tmp_path.glob("kept/*"))


def test_what_a_file_says_of_a_few_texts_is_kept(tmp_path: Path, tiny_file: Path, computed: list[int]) -> None:
    Kept(tmp_path, "moments", of=file_digest(tiny_file)).put([("a", b"a")])
    Kept(tmp_path, "another's", of="another", kind="log-probabilities").put([("a", b"a")])
    with KeptRunner(tiny_file, root=tmp_path, threads=1) as runner:
        for at in range(TEXTS + 2):
            list(runner.logprobs([[1, 2, at]], [range(2)]))
        assert len(list(tmp_path.glob("kept/*"))) == TEXTS + 2
        list(runner.logprobs([[1, 2, TEXTS + 1]], [range(2)]))
        assert len(computed) == TEXTS + 2
        list(runner.logprobs([[1, 2, 0]], [range(2)]))
    assert len(computed) == TEXTS + 3


@pytest.mark.parametrize("full", [True, False])
def test_where_it_is_too_much_nothing_is_kept(
    full: bool, tmp_path: Path, tiny_file: Path, computed: list[int], asked: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    if full:
        monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    else:
        monkeypatch.setattr("edgedistill.evals.runners.kept.MOST_BYTES", 10_000)
    for _ in range(2):
        with KeptRunner(tiny_file, root=tmp_path, threads=1) as runner:
            assert len(list(runner.logprobs(*asked))) == 5
    assert computed == [5, 5] and not (tmp_path / "kept").exists()
