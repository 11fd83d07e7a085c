"""Judge code by running it: the code of an answer, then its row's tests, in the sandbox (``data/sandbox.py``)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from edgedistill.cpus import usable_cpus
from edgedistill.data.sandbox import Limits, Sandbox

TIMEOUT_S = 10.0
MEMORY_MIB = 512
_FENCE = re.compile(
    r"^ {0,3}(```+|~~~+)[ \t]*([^\s`]*)[^\n]*\n(.*?)(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py", "python3")

_Case = TypeVar("_Case")
_Found = TypeVar("_Found")


def code_of(answer: str) -> str:
    """Return the code of an answer: its last fenced block of Python, else its last block that names no language, else, where
    nothing is fenced, the whole answer.
    """
    blocks = [(found[2].lower(), found[3]) for found in _FENCE.finditer(answer)]
    for languages in (_PYTHON, ("",)):
        if fitting := [code for language, code in blocks if language in languages]:
            return fitting[-1]
    return "" if blocks else answer


def verdict(answer: str, tests: str, timeout: float = TIMEOUT_S, memory: int = MEMORY_MIB) -> str:
    """Return "" where the answer's code passes the tests, else why not, in a word or two: "AssertionError", "timed out", "no code".
    ``timeout`` in seconds, ``memory`` in MiB. Raises UsageError where this machine has no sandbox.
    """
    code = code_of(answer)
    if not code.strip():
        return "no code"
    return _sandbox(timeout, memory).judge(code, tests).error


@functools.cache
def _sandbox(timeout: float, memory: int) -> Sandbox:
    return Sandbox.open(Limits(seconds=timeout, memory=memory << 20))


def at_once(judge: Callable[[_Case], _Found], cases: Iterable[_Case]) -> Iterator[_Found]:
    """Yield what is found of each case, in their order, several at a time: as many as processors, at least two."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(2, usable_cpus())) as pool:
        yield from pool.map(judge, cases)
