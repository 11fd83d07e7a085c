"""How many processors this process may use: what a container, a job scheduler or `taskset` withholds is not counted."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": 2 processors' time; "max 100000": no limit


def usable_cpus() -> int:
    """Return the number of logical processors that this process may run on, 1 at least.

    More threads than that wait for each other: ggml's and OpenMP's spin until the last has come, so that a build in a container
    with two of a server's 64 processors would take many times as long with 64 threads as with two.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota() or allowed))


def _quota() -> int | None:
    try:
        limit, period = _QUOTA.read_text().split()
        return max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):  # no cgroup of the second version, or "max"
        return None
