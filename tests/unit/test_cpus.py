"""As many threads as processors that may be used: by affinity, and by a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgedistill import cpus
from edgedistill.cpus import usable_cpus


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which the tests write what a cgroup of theirs allows."""
    monkeypatch.setattr(cpus, "_QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


def test_what_this_process_is_not_allowed_is_not_counted(quota: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1), ("\n", 8)],
)  # fmt: skip
def test_a_containers_quota_counts(text: str, expected: int, quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cpus() == 8, "no such file"
    quota.write_text(text)
    assert usable_cpus() == expected
