"""Questions that are put one by one are put by one build: what another puts meanwhile is waited for.

Before a question is put it is claimed, in the book beside the rows (``batch_book.py``). A claim ends when its answer is stored,
when its build is done or gives up, and when that build dies: then whoever waits puts the question itself. Nobody waits while it
has something to put, and nobody holds a claim while it waits, so no two builds wait for each other.

A batch is waited for while the build that has it lives. One that was stopped is that of builds that ask in batches, too: asked one
by one, its questions are paid twice, which is said.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgedistill.spending import Budget
from edgedistill.teachers.batch_book import AT_ONCE, OTHERS_S, Book

GAP_S = 0.005
"""Between two parts of what is claimed: who stores answers meanwhile gets a turn."""
BATCHES_S = 60.0
"""How often it is looked which batches of a build have ended: one that has several goes on living."""


@dataclass(frozen=True, kw_only=True)
class Put:
    """How many questions were put here, and the seconds that went by waiting for other builds."""

    count: int = 0
    waited: float = 0.0


def ask_once(
    path: Path,
    keys: Sequence[str],
    ask: Callable[[Sequence[int], int], None],
    *,
    note: Callable[[str], None],
    waiting: Callable[[int], None] = lambda count: None,
) -> Put:
    """Put those questions that have no answer in the row store at ``path`` and that no other build puts: ``ask`` gets their numbers
    in ``keys`` and the count of what others put, and stores the answers. Then wait for the rest, and put what others left
    unanswered.

    ``waiting`` is told how many others put, as long as there are any. Raises what ``ask`` raises: its claims are free then.
    """
    count, waited, left = 0, 0.0, array("I", range(len(keys)))
    with closing(Book(path, "", Budget())) as book, book.at_work():
        for batch, common in book.stopped(keys).items():
            note(
                f"{batch} has {common:,} of the questions and runs on at its server: without teacher.batch they are paid twice"
            )
        while len(left):
            ours, left, who = _claim(book, keys, left)
            if ours:
                ask(ours, len(left))
                book.put()
                count += len(ours)
            elif left:
                began = time.monotonic()
                _wait(book, who, note, waiting)
                waited += time.monotonic() - began
    return Put(count=count, waited=waited)


def _claim(book: Book, keys: Sequence[str], numbers: Sequence[int]) -> tuple[array[int], array[int], Counter[str]]:
    """Claim what is free: (its numbers, those that others hold, how many of them each asker holds). What is answered is neither."""
    ours, others, who = array("I"), array("I"), Counter[str]()
    for start in range(0, len(numbers), AT_ONCE):
        part = {keys[number]: number for number in numbers[start : start + AT_ONCE]}
        free, held = book.claim(part)
        ours.extend(part[name] for name in free)
        others.extend(part[name] for name in held)
        who.update(held.values())
        time.sleep(GAP_S)
    return ours, others, who


def _wait(book: Book, held: Counter[str], note: Callable[[str], None], waiting: Callable[[int], None]) -> None:
    """Wait until one of the askers has nothing under way any more, or is dead; a while only where one has batches. ``held``: how
    many questions each has.
    """
    told, began = False, time.monotonic()
    while len(at_it := book.at_it(held)) == len(held):
        if told and time.monotonic() - began > BATCHES_S and any(left is None for _, left in at_it.values()):
            return
        for token, (who, _) in at_it.items() if not told else ():
            note(f"{who} asks {held[token]:,} of the questions: waiting for its answers")
        told = True
        waiting(sum(held[token] if left is None else min(held[token], left) for token, (_, left) in at_it.items()))
        time.sleep(OTHERS_S)
