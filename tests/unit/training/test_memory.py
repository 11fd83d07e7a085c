"""Check that freed memory stays in the process, in processes of their own: malloc's settings cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from edgedistill.training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()

def work():
    blocks = [np.ones(1_000_000, dtype=np.float32) for _ in range(20)]
    return len(blocks)

work(); work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back like this")
def test_freed_blocks_are_used_again_without_page_faults() -> None:
    assert faults("leave") > 10_000  # 5 x 80 MB of 4 kB pages are 98,000
    assert faults("keep") < 1_000
