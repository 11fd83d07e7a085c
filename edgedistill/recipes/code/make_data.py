"""Make the data of the recipe ``code``: functions of one or two steps, each with a reference and the tests that judge answers.

    python -m edgedistill.recipes.code.make_data [--check] [--out DIR]

``prompts`` are more of what ``train`` has; ``dev`` and ``holdout`` have pairs of steps that these have not, and functions and
arguments of other names; ``ood`` has their pairs in wordings that they have not. No prompt stands in two files. What a test
expects was computed by other code than the reference's (``steps.py``), and a row's tests tell its task from one with a step less.
The same seed makes the same bytes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from edgedistill.recipes.code.steps import STEPS, Step
from edgedistill.recipes.files import as_jsonl, write_or_check

HERE = Path(__file__).parent
SEED = 20261127
SIZES = {"train": 1000, "prompts": 500, "dev": 160, "holdout": 400, "ood": 400}
SYSTEM = "Write the function in Python. Answer with its code alone."
TESTS = 3

WHAT = {"numbers": "a list of whole numbers", "text": "a string", "number": "a whole number"}
FRAMES = (
    "Write a function `{sig}` for {what}: {first}, then {second}. Return the result.",
    "Define `{sig}`. It takes {what}. First {first}, then {second}, and return the result.",
    "I need a function `{sig}` that works on {what}: {first}; after that {second}. Return what comes out.",
)
OF_ONE = (
    "Write a function `{sig}` for {what}: {first}. Return the result.",
    "Define `{sig}`. It takes {what}: {first}, and return the result.",
    "I need a function `{sig}` that works on {what}: {first}. Return what comes out.",
)
NEW_FRAMES = (
    "Please code `{sig}`. Input: {what}. Step 1: {first}. Step 2: {second}. Output: the outcome.",
    "Could you give me `{sig}`, which is handed {what}? It should {first}, afterwards {second}, and give that back.",
    "`{sig}` gets {what}. Let it {first}. Next, let it {second}. That is its value.",
)
NEW_OF_ONE = (
    "Please code `{sig}`. Input: {what}. Only step: {first}. Output: the outcome.",
    "Could you give me `{sig}`, which is handed {what}? It should {first}, and give that back.",
    "`{sig}` gets {what}. Let it {first}. That is its value.",
)
# Names say nothing of the task: what is to be done stands in the wording alone.
VERBS = ("make", "do", "get", "run", "form", "build", "work", "treat")
NOUNS = ("it", "result", "one", "part", "output", "answer", "step", "job", "thing", "value")
NEW_NOUNS = ("piece", "block", "unit", "figure", "outcome", "item")
ARGUMENTS = {
    "numbers": ("numbers", "values", "items", "data"),
    "text": ("text", "word", "line", "s"),
    "number": ("n", "number", "value", "i"),
}
NEW_ARGUMENTS = {"numbers": ("entries", "series"), "text": ("phrase", "message"), "number": ("amount", "m")}
WORDS = (
    *("stone", "Carrot", "lesson", "Oslo", "tin", "Arena", "cello", "rain", "Lion", "torn", "coast", "Silence", "no"),
    *("42", "A1", "trolls", "eel", "Interest", "canal", "7", "sister", "Room", "ice", "relation", "Actor", "ocean"),
)


class Task(NamedTuple):
    """One or two steps on a kind of value, by their names in ``STEPS``."""

    kind: str
    names: tuple[str, ...]

    @property
    def steps(self) -> list[Step]:
        """Return the steps."""
        return [STEPS[self.kind][name] for name in self.names]


Drawn = tuple[Step, dict[str, Any]]
"""A step with its {k} and {j}."""


def all_tasks() -> tuple[list[Task], list[Task]]:
    """Return the tasks of one step, and those of two."""
    one = [Task(kind, (name,)) for kind, steps in STEPS.items() for name in steps]
    two = [
        Task(kind, pair)
        for kind, steps in STEPS.items()
        for pair in product(steps, steps)
        if pair[0] != pair[1] and not steps[pair[0]].last
    ]
    return one, two


def draw_step(step: Step, rng: random.Random) -> Drawn:
    """Draw what a step leaves open."""
    drawn = rng.sample(step.values, 2 if step.two else 1) if step.values else []
    return step, dict(zip("kj", drawn, strict=False))


def draw_value(kind: str, rng: random.Random) -> Any:
    """Draw something to call a function with."""
    if kind == "numbers":
        return [rng.randint(-9, 20) for _ in range(rng.randint(6, 8))]
    if kind == "text":
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 4)))
    return rng.randint(10, 99 if rng.random() < 0.5 else 999)


def apply(steps: Iterable[Drawn], value: Any) -> Any:
    """Do the steps. Raises an error where one cannot be done."""
    for step, drawn in steps:
        value = step.does(value, *drawn.values())
    return value


def _or_none(steps: Iterable[Drawn], value: Any) -> Any:
    try:
        return apply(steps, value)
    except (IndexError, AttributeError, TypeError, ValueError):
        return None


def make_cases(task: Task, steps: list[Drawn], rng: random.Random) -> list[tuple[Any, Any]] | None:
    """Return what the function is called with, and what it gives; None where no such cases tell the task from a lesser one."""
    found: list[tuple[Any, Any]] = []
    for _ in range(40):
        value = draw_value(task.kind, rng)
        given = _or_none(steps, value)
        # A negative number has no digits that add up, and from an empty list nothing is told.
        if given is None or given in ([], "") or (task.kind == "number" and _or_none(steps[:1], value) < 0):
            continue
        found.append((value, given))
        if len(found) == TESTS:
            break
    others = [steps[:at] + steps[at + 1 :] for at in range(len(steps))]
    told = [any(_or_none(other, value) != given for value, given in found) for other in others]
    differ = len({repr(given) for _, given in found}) > 1
    return found if len(found) == TESTS and differ and all(told) else None


def write_code(signature: tuple[str, str], steps: list[Drawn]) -> str:
    """Write the reference."""
    name, argument = signature
    lines = [step.code.format(v=argument, **drawn) for step, drawn in steps]
    body = [f"    {argument} = {line}" for line in lines[:-1]] + [f"    return {lines[-1]}"]
    return "\n".join([f"def {name}({argument}):", *body])


def make_row(task: Task, split: str, rng: random.Random) -> dict[str, Any] | None:
    """Make a row of a task; None where it tells nothing (upper case, then lower case)."""
    new = split not in ("train", "prompts")
    for _ in range(20):
        steps = [draw_step(step, rng) for step in task.steps]
        if (cases := make_cases(task, steps, rng)) is not None:
            break
    else:
        return None
    name = f"{rng.choice(VERBS)}_{rng.choice(NEW_NOUNS if new else NOUNS)}"
    argument = rng.choice((NEW_ARGUMENTS if new else ARGUMENTS)[task.kind])
    said = [rng.choice(step.ood if split == "ood" else step.say).format(**drawn) for step, drawn in steps]
    frames = (NEW_FRAMES, NEW_OF_ONE) if split == "ood" else (FRAMES, OF_ONE)
    frame = rng.choice(frames[len(said) == 1])
    text = frame.format(
        sig=f"{name}({argument})", what=WHAT[task.kind], first=said[0], second=said[-1] if len(said) > 1 else ""
    )
    return {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        "reference": f"```python\n{write_code((name, argument), steps)}\n```",
        "tests": "\n".join(f"assert {name}({value!r}) == {given!r}" for value, given in cases),
        "tags": [f"{task.kind}-{len(task.names)}"],
    }


def parted(rng: random.Random) -> dict[str, list[Task]]:
    """Return the pairs of steps of each file: those of dev and holdout are in no other, those of ood are train's."""
    _, two = all_tasks()
    rng.shuffle(two)
    tenth = len(two) // 10
    taught = two[3 * tenth :]
    return {
        **{"train": taught, "prompts": taught, "ood": taught},
        **{"dev": two[:tenth], "holdout": two[tenth : 3 * tenth]},
    }


def make_all() -> dict[str, list[dict[str, Any]]]:
    """Make every file's rows: a quarter of one step; no prompt stands in two files, or twice in one."""
    rng, seen = random.Random(SEED), set()
    pairs, (ones, _) = parted(rng), all_tasks()
    files: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        rows: list[dict[str, Any]] = []
        turn = {1: 0, 2: 0 if name != "prompts" else SIZES["train"]}  # on through the list, where train stopped
        while len(rows) < size:
            many = 1 if len(rows) % 4 == 3 else 2
            tasks = ones if many == 1 else pairs[name]
            row = make_row(tasks[turn[many] % len(tasks)], name, rng)
            turn[many] += 1
            if row is None or (text := row["messages"][1]["content"]) in seen:
                continue
            seen.add(text)
            rows.append({"id": f"{name}-{len(rows):04d}", **row})
        files[name] = rows
    return files


def rendered() -> dict[str, bytes]:
    """Render every file: path relative to the recipe's folder -> bytes."""
    return as_jsonl(make_all())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them; return 1 where one differs."""
    return write_or_check(rendered, HERE, prog="edgedistill.recipes.code.make_data", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
