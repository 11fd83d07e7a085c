"""Questions that are put one by one are put by one build: what another puts meanwhile is waited for.

Before a question is put it is claimed, in the book beside the rows (``batch_book.py``). A claim ends when its answer is stored,
when its build is done or gives up, and when that build dies: then whoever waits puts the question itself. Nobody waits while it
has something to put, and nobody holds a claim while it waits, so no two builds wait for each other.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from edgedistill.spending import Budget
from edgedistill.teachers.batch_book import AT_ONCE, Book

OTHERS_S = 1.0
"""How often it is looked whether other builds are done."""
SHARE = 20
"""A look may take this part of the time between two: of very many questions it takes longer than a moment."""


def ask_once(
    path: Path,
    keys: Sequence[str],
    ask: Callable[[Sequence[int], int], None],
    *,
    note: Callable[[str], None],
    waiting: Callable[[int], None] = lambda count: None,
) -> int:
    """Put those questions that have no answer in the row store at ``path`` and that no other build puts: ``ask`` gets their numbers
    in ``keys`` and the count of what others put, and stores the answers. Then wait for the rest, and put what others left
    unanswered. Return how many were put here.

    ``waiting`` is told how many others put, as long as there are any. Raises what ``ask`` raises: its claims are free then.
    """
    put, told, left = 0, set[str](), array("I", range(len(keys)))
    with closing(Book(path, "", Budget())) as book, book.at_work():
        while len(left):
            began = time.monotonic()
            ours, others, who = _claim(book, keys, left)
            if ours:
                ask(ours, len(others))
                book.put()
                put += len(ours)
            for name, count in who.items():
                if name not in told:
                    note(f"{name} asks {count:,} of the questions: waiting for its answers")
                told.add(name)
            if not ours and others:
                waiting(len(others))
                time.sleep(max(OTHERS_S, SHARE * (time.monotonic() - began)))
            left = others
    return put


def _claim(book: Book, keys: Sequence[str], numbers: Sequence[int]) -> tuple[array[int], array[int], Counter[str]]:
    """Claim what is free: (its numbers, those that others hold, how many of them each holds). What is answered is neither."""
    ours, others, who = array("I"), array("I"), Counter[str]()
    for start in range(0, len(numbers), AT_ONCE):
        part = {keys[number]: number for number in numbers[start : start + AT_ONCE]}
        free, held = book.claim(part)
        ours.extend(part[name] for name in free)
        others.extend(part[name] for name in held)
        who.update(held.values())
    return ours, others, who
