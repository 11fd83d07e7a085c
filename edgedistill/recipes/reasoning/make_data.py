"""Make the data of the recipe ``reasoning``: problems of reasoning-gym, and how some of them are solved.

    python -m edgedistill.recipes.reasoning.make_data [--check] [--out DIR]

reasoning-gym's rows have an answer and no way to it. These tasks are solved by one sum after the other, which ``solve_*`` write
down: that is the ``rationale`` of ``train``, and of no other file. ``prompts`` are more problems, for the teacher to solve by
itself; ``dev`` and ``holdout`` new ones like them; ``ood`` has longer ones, and a task that train has not. No prompt stands in two
files. The same seeds make the same bytes with reasoning-gym 0.1.25 (``pip install 'edgedistill[reasoning]'``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.evals.reasoning import make_rows
from edgedistill.recipes.files import as_jsonl, write_or_check

HERE = Path(__file__).parent
SIZES = {"train": 1500, "prompts": 400, "dev": 160, "holdout": 400, "ood": 400}
SEEDS = {name: number for number, name in enumerate(SIZES, 1)}
DRAWN = 100_000  # problems of a task that are looked through at most: most are too hard to solve so, or stand elsewhere
LARGEST = 1000  # of what a step may come to

LEGS = {
    **dict.fromkeys(("chicken", "bird", "human", "duck"), 2),
    **dict.fromkeys(("dog", "cat", "cow", "horse", "lion", "elephant", "giraffe", "tiger", "deer", "sheep"), 4),
    **dict.fromkeys(("ant", "butterfly", "beetle", "bee", "wasp", "grasshopper", "cricket", "firefly"), 6),
    **dict.fromkeys(("spider", "scorpion"), 8),
}
"""Animals whose legs a rationale counts; problems with others are left out."""
Solved = tuple[list[str], int] | None
"""Steps, and what the last one comes to; None where a problem is not of the kind that is taught."""


@dataclass(frozen=True)
class Source:
    """A task with its settings, and which of its problems are used."""

    task: str
    settings: Mapping[str, Any]
    solve: Callable[[Mapping[str, Any]], Solved]


def one_sum(left: int, sign: str, right: int) -> tuple[str, int]:
    """Write one step, and what it comes to."""
    result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right if right else 0}[sign]
    return f"{left} {sign} {right} = {result}.", result


def along(numbers: Sequence[int], signs: Sequence[str]) -> tuple[list[str], int]:
    """Write sums from left to right, each with the result before it."""
    told, value = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        step, value = one_sum(value, sign, number)
        told.append(step)
    return told, value


def solve_chain(made: Mapping[str, Any]) -> Solved:
    """Solve what is done from left to right: additions and subtractions, or one multiplication."""
    words = made["expression"].split()
    signs = words[1::2]
    return along([int(word) for word in words[::2]], signs) if set(signs) <= {"+", "-"} or signs == ["*"] else None


def solve_product(made: Mapping[str, Any]) -> Solved:
    """Solve a product with a number from 11 to 15: by its tens, then by its ones."""
    one, two = sorted((int(word) for word in made["expression"].split(" * ")), reverse=True)
    if not 11 <= two <= 15:
        return None
    (first, tens), (second, ones) = one_sum(one, "*", 10), one_sum(one, "*", two - 10)
    last, result = one_sum(tens, "+", ones)
    return [first, second, last], result


def solve_equation(made: Mapping[str, Any]) -> Solved:
    """Solve a*x + b = c and a*x - b = c for small numbers."""
    found = re.fullmatch(r"(\d+)\*[a-z] ([+-]) (\d+) = (\d+)", made["equation"])
    if found is None:
        return None
    factor, sign, moved, result = int(found[1]), found[2], int(found[3]), int(found[4])
    first, product = one_sum(result, "-" if sign == "+" else "+", moved)
    if not 2 <= factor <= 9 or not 0 < product < 200 or product % factor:
        return None
    second, value = one_sum(product, "/", factor)
    return [first, second], value


def solve_legs(made: Mapping[str, Any]) -> Solved:
    """Count legs, animal by animal, where all of them are known."""
    if not set(made["animals"]) <= set(LEGS):
        return None
    told, total = [], 0
    for at, (animal, count) in enumerate(made["animals"].items()):
        step, legs = one_sum(count, "*", LEGS[animal])
        told.append(f"{animal}: {step}")
        if at:
            step, legs = one_sum(total, "+", legs)
            told.append(step)
        total = legs
    return told, total


CHAIN = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}
EQUATION = {"min_terms": 2, "max_terms": 2, "max_value": 20, "operators_weights": [0.5, 0.5, 0.0]}
TAUGHT = (
    Source("chain_sum", CHAIN, solve_chain),
    Source("products", {"min_digits": 2, "max_digits": 2}, solve_product),
    Source("simple_equations", EQUATION, solve_equation),
    Source("leg_counting", {"min_animals": 2, "max_animals": 3, "max_instances": 9}, solve_legs),
)
NEVER_TAUGHT = (
    Source("chain_sum", {**CHAIN, "min_terms": 5, "max_terms": 6}, solve_chain),
    Source(
        "basic_arithmetic",
        {"min_terms": 2, "max_terms": 3, "max_digits": 2, "allow_parentheses": False, "allow_negation": False},
        solve_chain,
    ),
    Source("leg_counting", {"min_animals": 4, "max_animals": 4, "max_instances": 9}, solve_legs),
)


def problems(source: Source, name: str) -> Iterator[dict[str, Any]]:
    """Yield a file's rows of a task, those that ``solve`` solves; in ``train`` with its steps."""
    for row in make_rows(source.task, DRAWN, SEEDS[name], source.settings):
        solved = source.solve(row["reasoning_gym"]["metadata"])
        if solved is None or any(abs(int(step.rpartition("= ")[2][:-1])) >= LARGEST for step in solved[0]):
            continue
        if str(solved[1]) != row["reference"]:
            raise ValueError(f"{row['id']}: {' '.join(solved[0])} is not {row['reference']}")
        yield {**row, **({"rationale": " ".join(solved[0])} if name == "train" else {})}


def make_all() -> dict[str, list[dict[str, Any]]]:
    """Make every file's rows, the tasks in turn; no prompt stands in two files, or twice in one."""
    seen: set[str] = set()
    files: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        drawn = [problems(source, name) for source in (NEVER_TAUGHT if name == "ood" else TAUGHT)]
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            row = next(one for one in drawn[len(rows) % len(drawn)] if one["prompt"] not in seen)
            seen.add(row["prompt"])
            rows.append({**row, "id": f"{name}-{len(rows):04d}"})
        files[name] = rows
    return files


def rendered() -> dict[str, bytes]:
    """Render every file: path relative to the recipe's folder -> bytes."""
    return as_jsonl(make_all())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them; return 1 where one differs."""
    return write_or_check(rendered, HERE, prog="edgedistill.recipes.reasoning.make_data", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
