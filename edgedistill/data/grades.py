"""What a model thinks of answers, one number each, and what passes: grades are made once and read again by every threshold.

A file of grades is JSONL, one line an answer: its key in the row store ("row") and its "grade", null where there is none. The key
has the prompt's id behind it where the grade is about the reference, and prompts that are the same have several.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgedistill.data.answers import Places
from edgedistill.jsonl import each_line

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Grades = Mapping[str, float | None]
MISSING = {
    "perplexity": "longer than the model's context",
    "reward": "longer than the model's context",
    "judge": "no verdict",
}
"""What it means that an answer has no grade."""


def write_grades(path: Path, grades: Grades) -> None:
    """Write the grades of answers, by the answers' keys, in the order of the keys."""
    with path.open("w") as file:
        for key in sorted(grades):
            file.write(line(key, grades[key]))


def line(key: str, grade: float | None) -> str:
    """Return one line of a file of grades."""
    return json.dumps({"row": key, "grade": grade}) + "\n"


def read_grades(path: Path, *, partial: bool = False) -> dict[str, float | None]:
    """Read a file of grades; of a ``partial`` one the last line may be cut, and is left out."""
    found: dict[str, float | None] = {}
    for text in path.read_text().splitlines(keepends=True):
        if partial and not text.endswith("\n"):
            break
        one = json.loads(text)
        found[one["row"]] = one["grade"]
    return found


def told(grades: Grades) -> dict[str, Any]:
    """Return how grades are spread, to choose a threshold by: how many there are, quantiles, the least and the greatest."""
    values = sorted(value for value in grades.values() if value is not None)
    spread: dict[str, Any] = {"n": len(values), "none": len(grades) - len(values)}
    if values:
        spread |= {"min": values[0], "max": values[-1]}
        spread["quantiles"] = {f"{share:g}": values[math.floor(share * (len(values) - 1) + 0.5)] for share in QUANTILES}
    return spread


def histogram(grades: Grades) -> dict[str, int]:
    """Return how many answers have each grade; "none" where the judge gave no verdict."""
    found: dict[str, int] = {}
    for value in sorted(grades.values(), key=lambda one: (one is None, one or 0.0)):
        name = "none" if value is None else f"{value:g}"
        found[name] = found.get(name, 0) + 1
    return found


class GradeTable:
    """Look up the grades that several files hold, in 20 bytes an answer. Of an answer that stands in two the last one counts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import numpy as np

        def keys() -> Iterator[str]:
            for path in paths:
                for one in map(json.loads, each_line(path)):
                    values.append(math.nan if one["grade"] is None else one["grade"])
                    yield one["row"]

        values = array("d")
        self._places = Places(keys())
        self._values = np.asarray(values)

    def __getitem__(self, row: str) -> float | None:
        """Return the grade of an answer. Raises KeyError where it was not graded."""
        if (number := self._places.get(row)) is None:
            raise KeyError(row)
        value = float(self._values[number])
        return None if math.isnan(value) else value


def judged(
    spec: Mapping[str, Any], grades: Grades | GradeTable, found: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], str]]:
    """Return the answers to one prompt, each with why it does not pass ("" where it does), by the thresholds of a filter: ``min``,
    ``max``, and ``keep``, so many of the highest grades. The order stays. What a person wrote is no answer of the row store's, and
    has no grade: it passes, and comes before all others.
    """
    values = [_graded(spec, grades, answer) if answer["row"] else math.inf for answer in found]
    whys = [_why(spec, value) if answer["row"] else "" for answer, value in zip(found, values, strict=True)]
    if "keep" in spec:
        good = [at for at, why in enumerate(whys) if not why]
        order = sorted(good, key=lambda at: -(values[at] or 0.0))  # of equal ones, the first drawn
        seen: set[str] = set()
        best = []
        for at in order:  # texts that differ, as kind = "best" keeps them
            if len(best) < spec["keep"] and found[at]["text"] not in seen:
                best.append(at)
                seen.add(found[at]["text"])
        for at in set(good) - set(best):
            whys[at] = f"{spec['kind']}: not among the best {spec['keep']}"
    return list(zip(found, whys, strict=True))


def apart(answer: Mapping[str, Any]) -> str:
    """Return the key of a grade that holds for one prompt's reference alone."""
    return f"{answer['row']} {answer['id']}"


def _graded(spec: Mapping[str, Any], grades: Grades | GradeTable, answer: Mapping[str, Any]) -> float | None:
    if spec.get("against"):
        with suppress(KeyError):
            return grades[apart(answer)]
    return grades[answer["row"]]


def _why(spec: Mapping[str, Any], grade: float | None) -> str:
    kind, least, most = spec["kind"], spec.get("min"), spec.get("max")
    if grade is None:
        return f"{kind}: {MISSING[kind]}"
    if spec.get("against"):
        return "" if grade > 0 else f"{kind}: loses to the {spec['against']}"
    if most is not None and grade > most:
        return f"{kind}: {grade:.4g} over {most:g}"
    if least is not None and grade < least:
        return f"{kind}: {grade:.4g} under {least:g}"
    return ""
