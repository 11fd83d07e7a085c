"""Prompts and their answers, through several filters, a few at a time: answers are read when their turn comes, and then gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from edgedistill.data.answers import Answer, Answers, blocks
from edgedistill.data.prompts import Row
from edgedistill.data.recovery import UNWANTED

Judged = list[tuple[Answer, str]]
"""Answers, each with why it does not pass, "" where it does, in the order in which they are kept."""
Judge = Callable[[Row, list[Answer]], Judged]
Block = list[tuple[Row, list[Answer]]]


class Sieve(NamedTuple):
    """One filter: it judges the answers to each prompt, in the prompts' order, or (``at_once``) is first given several prompts with
    their answers, and how many answers come after them. ``verdicts``: the keys of what people said, where it goes by that.
    """

    kind: str
    judge: Judge | None = None
    at_once: Callable[[Block, int], Judge] | None = None
    verdicts: Collection[str] | None = None


class Sifted(NamedTuple):
    """What the filters left of the answers to one prompt. ``out``: it is not to be taught, by whatever text. ``wrong``: what was
    rejected. ``shown``: the keys of answers that a first filter of verdicts met, each with its row's tag.
    """

    row: Row
    found: list[Answer]
    alive: list[Answer]
    wrong: list[Answer]
    out: bool
    shown: dict[str, str]


class Passed(Protocol):
    """Counts something over the answers that passed."""

    def add(self, passed: list[Answer]) -> None:
        """Take the answers to one prompt."""


class Tally(NamedTuple):
    """How many answers there were, to how many prompts, of how many prompts one passed, and how many rows were carried over;
    ``passed`` was told of those that passed, where a filter wants to know.
    """

    answers: int
    prompts: int
    good: int
    carried: int
    passed: Passed | None = None


def sift(
    rows: Iterable[Row],
    answers: Answers,
    sieves: Sequence[Sieve],
    reject: Callable[[int, Answer], object],
    reviewable: Callable[[Row, list[Answer]], dict[str, str]],
) -> tuple[list[dict[str, Any]], Iterator[Sifted]]:
    """Apply filters in their order. Return what each lets through, counted as the prompts are read, and the prompts.

    ``reject`` is given each answer that does not pass, with why and the filter's number; ``reviewable`` says how people are shown
    answers.
    """
    yields: list[dict[str, Any]] = [{"filter": one.kind, "in": 0, "out": 0} for one in sieves]
    reviews = [at for at, one in enumerate(sieves) if one.verdicts is not None]
    for at in reviews:
        yields[at] |= {"reviewed": 0, "rejected": 0, "edited": 0}

    def apply() -> Iterator[Sifted]:
        left = len(answers)
        for block in blocks(rows, answers):
            left -= sum(len(found) for _, found in block)
            alive = [found for _, found in block]
            wrong: list[list[Answer]] = [[] for _ in block]
            out, shown = [False] * len(block), [dict[str, str]() for _ in block]
            for at, (one, line) in enumerate(zip(sieves, yields, strict=True)):
                now = [(row, found) for (row, _), found in zip(block, alive, strict=True)]
                judge = one.judge or (one.at_once and one.at_once(now, left))
                assert judge is not None
                for number, (row, found) in enumerate(now):
                    told = judge(row, found)
                    for answer in ({**a, "why": why} for a, why in told if why):
                        reject(at, answer)
                        wrong[number].append(answer)
                    alive[number] = good = [a for a, why in told if not why]
                    line["in"], line["out"] = line["in"] + len(found), line["out"] + len(good)
                    out[number] |= bool(found) and not good and one.kind in UNWANTED
                    if one.verdicts is not None:
                        seen = reviewable(row, found)
                        shown[number] = seen if at == reviews[0] else shown[number]
                        line["reviewed"] += sum(key in one.verdicts for key in seen)
                        line["rejected"] += len(found) - len(good)
                        line["edited"] += sum(a.get("source") == "review" for a in good)
            for number, (row, found) in enumerate(block):
                yield Sifted(row, found, alive[number], wrong[number], out[number], shown[number])

    return yields, apply()


def best(found: list[Answer], keep: int = 1, by: str = "likelihood") -> list[Answer]:
    """Return ``keep`` of the answers to one prompt whose texts differ: the likeliest as a whole, the shortest, or, ``drawn``, the
    first, which is a fair draw.
    """
    first: dict[str, Answer] = {}
    for answer in found:
        first.setdefault(answer["text"], answer)
    order = {"likelihood": lambda a: -a["logprob"], "shortest": lambda a: len(a["text"]), "drawn": lambda a: 0}
    return sorted(first.values(), key=order[by])[:keep]


def best_first(good: list[Answer], found: list[Answer]) -> Judged:
    """Return the answers that are kept as the best, and then the others."""
    return [(answer, "") for answer in good] + [(answer, "best") for answer in found if answer not in good]


def taught_line(row: Row, number: int, text: str, source: str, key: str) -> dict[str, Any]:
    """Return the line of what is taught in answer to a prompt: its ``number``-th text."""
    line = {
        "id": row.id if number == 0 else f"{row.id}#{number}",
        "messages": list(row.messages),
        "text": text,
        "reference": row.reference,
        "source": source,
        "row": key,
        **({} if row.evolution is None else {"evolution": row.evolution}),
    }
    line |= {"tools": list(row.tools)} if row.tools else {}
    line |= {"trace": row.trace} if row.trace else {}
    return line | ({"guidance": row.guidance} if row.guidance else {})


def nameless(folder: Path) -> IO[str]:
    """Open a file that is gone when it is closed, or when the process dies."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n", dir=folder)
