"""A sweep: one recipe built with several values of some keys, and what each choice is worth.

Every combination is a recipe of its own in the same store, so what two combinations share is built once, and a sweep that is
cut off goes on where it was. Nothing is packaged: the table says which of them to build. All combinations are planned before
the first step runs, so a value that cannot work is refused at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.sweep_teachers import KEY, verdict, with_best
from edgedistill.target import format_size

if TYPE_CHECKING:
    from edgedistill.evals.statistics import Estimate
    from edgedistill.report import Model
    from edgedistill.runner import Outcome, Reporter
    from edgedistill.session import Session
    from edgedistill.store import Store
    from edgedistill.tables import Sheet

MOST = 64
"""Combinations of one sweep: more were surely not meant."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination: the values of its keys, and its build."""

    values: dict[str, Any]
    session: Session

    @property
    def label(self) -> str:
        """Return the values as text."""
        return _label(self.values)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One combination on one target. ``difference`` is that of the first scored suite to the first combination, paired by row;
    ``best`` marks what no other line of the target beats in score, size and speed at once (the Pareto front).
    Where teachers are swept, ``teacher`` is this one's, and ``to_best`` the difference to the best student of the target on each
    suite: None for that student itself, and nothing where other rows were answered.
    """

    point: Point
    target: str
    model: Model
    difference: Estimate | None
    best: bool
    teacher: Model | None = None
    to_best: dict[str, Estimate | None] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return helped, hurt or undecided, as the interval of the difference says; "" for the first combination."""
        return "" if self.difference is None else self.difference.verdict

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        speed = self.model.speed
        return {
            "values": self.point.values,
            "target": self.target,
            "scores": {name: line.score.__dict__ for name, line in self.model.suites.items() if line.score is not None},
            "size": self.model.size,
            "tg": None if speed is None else speed.tg.value,
            "difference": None if self.difference is None else self.difference.to_json(),
            "verdict": self.verdict,
            "best": self.best,
            **({} if self.teacher is None else {"teacher": self._of_teacher()}),
        }

    def _of_teacher(self) -> dict[str, Any]:
        """Return the teacher's own scores, and how far its student is from the best one."""
        assert self.teacher is not None
        return {
            "scores": {name: one.score.__dict__ for name, one in self.teacher.suites.items() if one.score is not None},
            "to_best": {name: None if one is None else one.to_json() for name, one in self.to_best.items()},
            "verdicts": {name: verdict(one) for name, one in self.to_best.items()},
        }


def combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the values, the last key changing fastest. Raises UsageError for none and for too many."""
    if not sweep:
        raise UsageError(
            "there is nothing to sweep over",
            "add [sweep] to the recipe, or name a key: --over distill.lora.rank=8,16,32",
        )
    for key, values in sweep.items():
        if not values:
            raise UsageError(f"--over {key}: no values", f"give some: --over {key}=8,16")
    found = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    if len(found) > MOST:
        raise UsageError(f"{len(found)} combinations, at most {MOST} are swept", "take fewer keys or values")
    return found


def parse_over(argument: str) -> tuple[str, list[Any]]:
    """Split ``KEY=VALUE,VALUE`` of ``--over``; a comma inside brackets does not part values."""
    from edgedistill.toml_source import parse_override

    key, value = parse_override(f"{argument.partition('=')[0]}=[{argument.partition('=')[2]}]")
    if isinstance(value, list):
        return key, value
    return key, [parse_override(f"{key}={part.strip()}")[1] for part in argument.partition("=")[2].split(",")]


def parse_all_over(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Read all of ``--over``. Raises UsageError for a key that is named twice."""
    found: dict[str, list[Any]] = {}
    for key, values in map(parse_over, arguments):
        if key in found:
            raise UsageError(f"--over {key} is given twice", f"name all its values at once: --over {key}=8,16,32")
        found[key] = values
    return found


def plan_points(
    recipe: Path,
    sweep: Mapping[str, Sequence[Any]],
    *,
    targets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    store: Store | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """Plan every combination. Raises what planning raises, once ``note`` was told in which combination."""
    from edgedistill.errors import EdgeDistillError
    from edgedistill.session import prepare

    points = []
    for values in combinations(sweep):
        try:
            session = prepare(
                recipe,
                targets=targets,
                overrides={**(overrides or {}), **values, "compare": {}},  # its arms are no part of the table
                store=store,
                note=note,
            )
        except EdgeDistillError:
            note(f"in the combination {_label(values)}")
            raise
        points.append(Point(values=values, session=session))
    return points


def sessions_of(recipe: Path, *, store: Store) -> list[Session]:
    """Plan a recipe, and every combination of its [sweep]."""
    from edgedistill.session import prepare

    session = prepare(recipe, store=store)
    points = plan_points(recipe, session.recipe.sweep, store=store) if session.recipe.sweep else []
    return [session, *(point.session for point in points)]


def build(
    points: Sequence[Point], *, reporter: Callable[[], Reporter], say: Callable[[str], None], threads: int = 0
) -> list[Outcome]:
    """Build what the table needs of every point: evaluations and speeds of the artifacts. A point that fails is told of, and
    the others go on.
    """
    from edgedistill.runner import Runner

    outcomes = []
    every = {step.key for point in points for step in point.session.plan.steps}
    with points[0].session.store.using(every):
        for number, point in enumerate(points, 1):
            say(f"{number} of {len(points)}: {point.label}")
            plan = point.session.plan
            names = [
                name
                for target in point.session.inputs.targets
                for name in (f"evaluate/{target.name}", f"measure/{target.name}")
            ]
            wanted = [step for name in ("evaluate/teacher", *names) for step in plan.match(name)]
            outcomes.append(Runner(plan.only(wanted), point.session.store, reporter(), threads=threads).build())
    return outcomes


def read(points: Sequence[Point]) -> list[Line]:
    """Read what has been built, target by target, in the order of the points."""
    from edgedistill.evals.statistics import paired_difference
    from edgedistill.report_read import read as read_report

    found: list[tuple[Point, str, Model]] = []
    teachers: list[Model | None] = []
    for point in points:
        data = read_report(point.session)
        for target in point.session.inputs.targets:
            model = data.model(target.name)
            if model is not None and _score(model) is not None:
                found.append((point, target.name, model))
                teachers.append(data.model("teacher") if KEY in point.values else None)
    lines = []
    for (point, target, model), teacher in zip(found, teachers, strict=True):
        alike = [(other, one) for other, name, one in found if name == target]
        first = alike[0][0]
        suite = next(name for name, line in model.suites.items() if line.score is not None)
        pair = None if point is first else _paired(point, first, target, suite)
        lines.append(
            Line(
                point=point,
                target=target,
                model=model,
                difference=None if pair is None else paired_difference(*pair),
                best=not any(_beats(one, model) for _, one in alike),
                teacher=teacher,
            )
        )
    return with_best(lines)


def sheet(lines: Sequence[Line]) -> Sheet:
    """Lay the lines out as a table."""
    from edgedistill.tables import Sheet

    keys = list(lines[0].point.values) if lines else []
    suites = list(dict.fromkeys(name for line in lines for name, one in line.model.suites.items() if one.score))
    several = len({line.target for line in lines}) > 1
    columns = [
        *keys,
        *(["target"] if several else []),
        *suites,
        "against the first",
        "verdict",
        "size",
        "tg128 t/s",
        "best",
    ]
    rows = []
    for line in lines:
        scores = [line.model.suites.get(name) for name in suites]
        speed, difference = line.model.speed, line.difference
        told = "" if difference is None else f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        rows.append(
            [
                *(_text(line.point.values[key]) for key in keys),
                *([line.target] if several else []),
                *("" if one is None or one.score is None else one.score.text(3) for one in scores),
                told,
                line.verdict,
                "" if line.model.size is None else format_size(line.model.size),
                "" if speed is None else f"{speed.tg.value:.1f}" + " (noisy)" * bool(speed.noise),
                "*" if line.best else "",
            ]
        )
    n = next((one.score.n for line in lines for one in line.model.suites.values() if one.score), None)
    return Sheet(
        title="sweep",
        columns=tuple(columns),
        rows=rows,
        right=frozenset(range(len(columns) - 1)) - {len(columns) - 4},
        notes=[
            f"[…] 95 % intervals, n = {n} rows; against the first: {suites[0] if suites else 'score'}, paired by row",
            "* no other line is as good in score, size and speed and better in one (of the same target)",
            *learning_curve(lines),
        ],
    )


def learning_curve(lines: Sequence[Line]) -> list[str]:
    """Say, where one of the keys that are swept counts rows, whether still more of them would help: what the last step up brought,
    by its interval; for each target, suite and combination of the other keys.
    """
    from edgedistill.evals.statistics import paired_difference

    counted = [key for key in lines[0].point.values if key.rpartition(".")[2] == "rows"] if lines else []
    if len(counted) != 1:
        return []
    (key,) = counted
    curves: dict[tuple[str, str], dict[int, Line]] = {}
    for line in lines:
        others = _label({name: value for name, value in line.point.values.items() if name != key})
        curves.setdefault((line.target, others), {}).setdefault(rows_of_point(line.point, key), line)
    told = []
    for (target, others), by_rows in curves.items():
        if len(by_rows) < 2:
            continue
        few, many = sorted(by_rows)[-2:]
        fewer, more = by_rows[few], by_rows[many]
        for suite in [name for name, line in more.model.suites.items() if line.score is not None]:
            pair = _paired(more.point, fewer.point, target, suite)
            if pair is None:
                continue
            gain = paired_difference(*pair)
            verdict = "more would likely help" if gain.low > 0 else "more would not" if gain.high < 0 else "undecided"
            told.append(
                f"{target}{f' ({others})' if others else ''}: the step from {few} to {many} rows brought {gain.value:+.3f} "
                f"[{gain.low:+.3f}, {gain.high:+.3f}] on {suite}, n = {gain.n}: {verdict}"
            )
    return told


def rows_of_point(point: Point, key: str) -> int:
    """Return how many rows a point really has where ``key`` limits them: a count may be of each file, and files may have fewer."""
    inputs, value = point.session.inputs, point.values[key]
    read = {
        "prompts.rows": inputs.prompts,
        "adapt.rows": inputs.gold,
        "heal.rows": inputs.healing,
        "temperature.rows": inputs.tempering,
        "tune.rows": inputs.tuning,
        "draft.rows": inputs.drafting,
        "distill.keep.rows": inputs.general,
        "tune.general.rows": inputs.tuning_general,
    }.get(key)
    if read is None:
        return sum(value) if isinstance(value, list | tuple) else int(value)
    return len(read)


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(list(value)) if isinstance(value, list | tuple) else f"{value}"


def _score(model: Model) -> float | None:
    return next((line.score.value for line in model.suites.values() if line.score is not None), None)


def _beats(one: Model, other: Model) -> bool:
    """Tell whether one is nowhere worse than the other and somewhere better: score, size, decode speed."""
    mine, theirs = (
        (_score(model) or 0.0, -(model.size or 0), model.speed.tg.value if model.speed else 0.0)
        for model in (one, other)
    )
    return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def _paired(point: Point, first: Point, target: str, suite: str) -> tuple[list[float], list[float]] | None:
    """Return the scores of two points on the rows of a suite; None where they answered other rows."""
    if point.session.inputs.suites[suite] != first.session.inputs.suites[suite]:
        return None
    mine, theirs = (scores(one, target, suite) for one in (point, first))
    return None if mine is None or theirs is None else (mine, theirs)


def scores(point: Point, target: str, suite: str) -> list[float] | None:
    """Return what a point's artifact for a target scored on each row of a suite; None where it is not evaluated."""
    from edgedistill.evals.suites import load_scores

    entry = point.session.store.load(point.session.plan.match(f"evaluate/{target}")[0].key)
    return None if entry is None else load_scores(entry.path, suite)
