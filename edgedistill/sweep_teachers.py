"""A sweep over ``teacher.model``: which candidate has the best student?

The teacher with the best score of its own is not always the best teacher: where the gap in capacity is wide, a student learns
less from it than from a smaller one (Cho and Hariharan 2019, arXiv:1910.01348; Mirzadeh et al. 2019, arXiv:1902.03393). So
candidates are judged by what their students get right, paired by row; their own scores stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgedistill.evals.statistics import Estimate
    from edgedistill.report import Figure
    from edgedistill.sweep import Line
    from edgedistill.tables import Sheet

KEY = "teacher.model"


def with_best(lines: list[Line]) -> list[Line]:
    """Return the lines with their differences to the best student of their target on each suite, where teachers are swept. Of
    equals the first is the best.
    """
    from edgedistill.evals.statistics import paired_difference
    from edgedistill.sweep import scores

    found: list[dict[str, Estimate | None]] = [{} for _ in lines]
    swept = [(at, line) for at, line in enumerate(lines) if KEY in line.point.values]
    for suite, target in {(suite, line.target) for _, line in swept for suite in line.model.suites}:
        known = [
            (at, line, own)
            for at, line in swept
            if line.target == target and _score(line, suite) and (own := scores(line.point, target, suite))
        ]
        if not known:
            continue
        first, best, reference = max(known, key=lambda one: sum(one[2]) / len(one[2]))
        for at, line, own in known:
            if at == first:
                found[at][suite] = None
            elif line.point.session.inputs.suites[suite] == best.point.session.inputs.suites[suite]:
                found[at][suite] = paired_difference(own, reference)
    return [replace(line, to_best=one) for line, one in zip(lines, found, strict=True)]


def verdict(to_best: Estimate | None) -> str:
    """Say what a difference to the best student says: ``best`` for that student itself, ``worse`` where the interval is below 0,
    else ``undecided``.
    """
    if to_best is None:
        return "best"
    return "worse" if to_best.high < 0 else "undecided"


def teachers_sheet(lines: Sequence[Line]) -> Sheet | None:
    """Lay out the candidates, suite by suite and target by target, the best student first; None for a sweep over other keys."""
    from edgedistill.tables import Sheet

    lines = [line for line in lines if KEY in line.point.values]
    if not lines:
        return None
    others = [key for key in lines[0].point.values if key != KEY]
    several = len({line.target for line in lines}) > 1
    names = ["suite", *(["target"] if several else []), "teacher", *others]
    rows: list[list[str]] = []
    notes: list[str] = []
    rules: list[int] = []
    for (suite, target), group in _groups(lines).items():
        rules.append(len(rows))
        for line in group:
            values, difference = line.point.values, line.to_best.get(suite)
            row = [suite, *([target] if several else []), str(values[KEY]), *(str(values[key]) for key in others)]
            row += [_text(_own(line, suite)), _text(_score(line, suite)), _signed(difference)]
            rows.append([*row, verdict(difference) if suite in line.to_best else "other rows"])
        notes += _capacity(suite, target, group)
    counts = [one.n for line in lines for one in line.to_best.values() if one is not None]
    if counts:
        told = f"[…] 95 % intervals; against the best student: paired by row, n = {max(counts)}. Which one is best was chosen by"
        notes.insert(0, f"{told} these rows, and its lead is flattered: score it once more on rows that chose nothing")
    if any(line.point.session.recipe.student.model == "teacher" for line in lines):
        notes.append(
            'student.model = "teacher": each student is cut out of its teacher, and differs in more than who taught it'
        )
    return Sheet(
        title="teachers, by their students",
        columns=(*names, "its own score", "its student's", "against the best", "verdict"),
        rows=rows,
        right=frozenset(range(len(names), len(names) + 3)),
        rules=frozenset(rules) - {0},
        notes=notes,
    )


def _groups(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """Return the lines of each suite and target that have a score there, by falling score of the student; the one that the others
    are held against comes first, of equals too.
    """
    found: dict[tuple[str, str], list[Line]] = {}
    for suite in dict.fromkeys(name for line in lines for name in line.model.suites):
        for line in lines:
            if _score(line, suite):
                found.setdefault((suite, line.target), []).append(line)

    def place(line: Line, suite: str) -> tuple[bool, float]:
        score, is_best = _score(line, suite), suite in line.to_best and line.to_best[suite] is None
        return not is_best, -score.value if score else 0.0

    return {
        (suite, target): sorted(group, key=lambda line, suite=suite: place(line, suite))
        for (suite, target), group in found.items()
    }


def _capacity(suite: str, target: str, group: Sequence[Line]) -> list[str]:
    """Say so where the candidate with the best score of its own is not the one with the best student."""
    known = [(own.value, line) for line in group if (own := _own(line, suite))]
    strongest = max(known, key=lambda one: one[0])[1] if known else group[0]
    difference, own, best = strongest.to_best.get(suite), strongest.point.values[KEY], group[0].point.values[KEY]
    if difference is None or own == best:
        return []
    told = f"{suite}, {target}: {own} has the best score of its own, {best} the best student: {_signed(difference)}, "
    if verdict(difference) == "worse":
        return [told + "the stronger model is not the better teacher here (capacity gap, arXiv:1910.01348)"]
    return [told + "which the interval does not tell apart"]


def _score(line: Line, suite: str) -> Figure | None:
    one = line.model.suites.get(suite)
    return one.score if one else None


def _own(line: Line, suite: str) -> Figure | None:
    one = line.teacher.suites.get(suite) if line.teacher else None
    return one.score if one else None


def _text(figure: Figure | None) -> str:
    return figure.text(3) if figure else ""


def _signed(difference: Estimate | None) -> str:
    return "" if difference is None else f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
