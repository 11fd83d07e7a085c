"""Children that die with the process that started them, also where that is killed and can do nothing any more.

A killed build must leave nobody who still writes to the files of the next one, or takes its memory.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# Asked for by the child itself, since what Popen runs between fork and exec is not safe in a process with threads (as torch's).
# The kernel keeps it over the exec; a parent that died before is noticed by the child's having another one (prctl(2)).
_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[3], sys.argv[3:])
"""


def bound(command: Sequence[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """Return the command whose process gets signal ``number`` once the thread that starts it ends (Linux; elsewhere as it is)."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(int(number)), *command]
