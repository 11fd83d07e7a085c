"""Make the data of the recipe ``think``: word problems of two or three steps, each with its rationale and its number.

    python -m edgedistill.recipes.think.make_data [--check] [--out DIR]

``train``, ``dev`` and ``holdout`` share their wordings and differ in names, things and numbers; ``ood`` has wordings that train
never saw. No problem stands in two files. The same seed makes the same bytes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.recipes.files import as_jsonl, write_or_check

HERE = Path(__file__).parent
SEED = 20261126
SIZES = {"train": 1500, "dev": 160, "holdout": 400, "ood": 400}
SYSTEM = "Solve the problem. Give the number."

NAMES = ("Mara", "Ivo", "Lena", "Tom", "Aisha", "Felix", "Nora", "Omar", "Pia", "Jan", "Rosa", "Ken", "Zoe", "Paul")
THINGS = (
    "apples",
    "jars",
    "pencils",
    "stamps",
    "marbles",
    "cards",
    "tiles",
    "screws",
    "candles",
    "cups",
    "shells",
    "books",
)
BOXES = ("box", "crate", "bag", "basket", "drawer")


@dataclass(frozen=True)
class Problem:
    """A wording and how it is solved. ``steps`` gives, for its numbers, sentences and the result; None where they do not suit."""

    text: str
    numbers: tuple[tuple[int, int], ...]  # from, to
    steps: Callable[..., tuple[list[str], int] | None]


def _add(a: int, b: int) -> tuple[str, int]:
    return f"{a} plus {b} is {a + b}.", a + b


def _take(a: int, b: int) -> tuple[str, int]:
    return f"{a} minus {b} is {a - b}.", a - b


def _times(a: int, b: int) -> tuple[str, int]:
    return f"{a} times {b} is {a * b}.", a * b


def _share(a: int, b: int) -> tuple[str, int]:
    return f"{a} divided by {b} is {a // b}.", a // b


def _then(*steps: Callable[[int], tuple[str, int]]) -> Callable[[int], tuple[list[str], int]]:
    """Apply steps in turn, each to the result before it."""

    def solve(value: int) -> tuple[list[str], int]:
        told = []
        for step in steps:
            sentence, value = step(value)
            told.append(sentence)
        return told, value

    return solve


def _two_sums(a: int, b: int, c: int, d: int) -> tuple[list[str], int]:
    (one, x), (two, y) = _times(a, b), _times(c, d)
    three, total = _add(x, y)
    return [one, two, three], total


def _even(a: int, b: int, c: int) -> tuple[list[str], int] | None:
    return _then(lambda v: _times(v, b), lambda v: _share(v, c))(a) if a * b % c == 0 else None


def _packs(a: int, b: int, c: int) -> tuple[list[str], int] | None:
    return _then(lambda v: _share(v, b), lambda v: _times(v, c))(a) if a % b == 0 else None


TAUGHT = (
    Problem(
        "{n} has {a} {thing}. {m} gives {n} {b} more, and then {c} get lost. How many {thing} does {n} have?",
        ((8, 40), (3, 30), (2, 9)),
        lambda a, b, c: _then(lambda v: _add(v, b), lambda v: _take(v, c))(a),
    ),
    Problem(
        "A {box} holds {a} {thing}. {n} buys {b} of them and gives {c} {thing} away. How many {thing} are left?",
        ((4, 15), (2, 9), (2, 7)),
        lambda a, b, c: _then(lambda v: _times(v, b), lambda v: _take(v, c))(a),
    ),
    Problem(
        "One ticket costs {a} coins and one map costs {c} coins. {n} buys {b} tickets and {d} maps. How many coins is that?",
        ((3, 12), (2, 6), (2, 9), (2, 5)),
        _two_sums,
    ),
    Problem(
        "{n} has {a} {box} full of {thing}, {b} in each, and shares them equally among {c} friends. How many does each get?",
        ((2, 9), (4, 12), (2, 6)),
        _even,
    ),
    Problem(
        "A bus drives {a} km every hour for {b} hours, and then {c} km more. How many km is that?",
        ((20, 60), (2, 5), (5, 30)),
        lambda a, b, c: _then(lambda v: _times(v, b), lambda v: _add(v, c))(a),
    ),
    Problem(
        "{n} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left?",
        ((5, 20), (2, 6), (130, 240)),
        lambda a, b, c: (
            [(first := _times(a, b))[0], (last := _take(c, first[1]))[0]],
            last[1],
        ),
    ),
    Problem(
        "{n} is {a} years old. {m} is {b} years older, and {o} is twice as old as {m}. How old is {o}?",
        ((4, 30), (2, 12)),
        lambda a, b: _then(lambda v: _add(v, b), lambda v: _times(v, 2))(a),
    ),
    Problem(
        "{n} pays {a} coins for {b} {thing} at {c} coins each. How many coins come back?",
        ((60, 150), (2, 7), (3, 8)),
        lambda a, b, c: (
            [(first := _times(b, c))[0], (last := _take(a, first[1]))[0]],
            last[1],
        ),
    ),
)
NEVER_TAUGHT = (
    Problem(
        "There are {a} rows of {b} seats in the hall, and {c} seats are taken. How many seats are free?",
        ((4, 12), (5, 12), (3, 19)),
        lambda a, b, c: _then(lambda v: _times(v, b), lambda v: _take(v, c))(a),
    ),
    Problem(
        "In the field stand {a} sheep. {b} of them leave, and {c} others come. How many sheep stand in the field now?",
        ((15, 50), (3, 12), (4, 20)),
        lambda a, b, c: _then(lambda v: _take(v, b), lambda v: _add(v, c))(a),
    ),
    Problem(
        "{n} earns {a} coins a day and spends {b} of them. How many coins has {n} saved after {c} days?",
        ((12, 30), (3, 11), (2, 8)),
        lambda a, b, c: _then(lambda v: _take(v, b), lambda v: _times(v, c))(a),
    ),
    Problem(
        "The {a} {thing} are packed in bags of {b}. A bag sells for {c} coins. How many coins do all bags bring?",
        ((12, 72), (2, 9), (2, 9)),
        _packs,
    ),
)


def make_row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Fill one wording with names, things and numbers that suit it."""
    while True:
        values = [rng.randint(low, high) for low, high in problem.numbers]
        solved = problem.steps(*values)
        if solved is not None and 0 < solved[1] < 400:
            break
    names = rng.sample(NAMES, 3)
    words = {"n": names[0], "m": names[1], "o": names[2], "thing": rng.choice(THINGS), "box": rng.choice(BOXES)}
    text = problem.text.format(**words, **dict(zip("abcd", values, strict=False)))
    text = (
        text.replace(" box full", " boxes full").replace("crate full", "crates full").replace("bag full", "bags full")
    )
    text = text.replace("basket full", "baskets full").replace("drawer full", "drawers full")
    return {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "rationale": " ".join(solved[0]),
        "reference": str(solved[1]),
    }


def make_all() -> dict[str, list[dict[str, Any]]]:
    """Make every file's rows; no problem stands in two files, or twice in one."""
    rng, seen = random.Random(SEED), set()
    files: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        rows: list[dict[str, Any]] = []
        problems = NEVER_TAUGHT if name == "ood" else TAUGHT
        while len(rows) < size:
            number = len(rows) % len(problems)
            row = make_row(problems[number], rng)
            if (text := row["messages"][1]["content"]) in seen:
                continue
            seen.add(text)
            kind = f"{name if name == 'ood' else 'taught'}-{number + 1}"
            rows.append({"id": f"{name}-{len(rows):04d}", **row, "tags": [kind]})
        files[name] = rows
    return files


def rendered() -> dict[str, bytes]:
    """Render every file: path relative to the recipe's folder -> bytes."""
    return as_jsonl(make_all())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them; return 1 where one differs."""
    return write_or_check(rendered, HERE, prog="edgedistill.recipes.think.make_data", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
