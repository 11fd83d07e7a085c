"""Teacher candidates, judged by their students: the table, its intervals, and what is refused of a candidate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill import session as sessions
from edgedistill import tables
from edgedistill.compare import step_of
from edgedistill.errors import RecipeError
from edgedistill.evals.statistics import paired_difference
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect
from edgedistill.session import prepare
from edgedistill.store import Store
from edgedistill.sweep import Line, Point, plan_points, read, scores, sessions_of, sheet
from edgedistill.sweep_teachers import KEY, teachers_sheet
from tests.unit.made_build import FIGURES, FILES, ROWS, fill_store, make_session
from tests.unit.test_plan import FACTS

PHONE = "phone-midrange"
CANDIDATES = {"path:large": (0.99, 0.80), "path:middle": (0.95, 0.95), "path:near": (0.93, 0.94)}
"""Teacher -> share that it gets right itself, and its student's."""


def candidates(factory: pytest.TempPathFactory, figures: dict[str, tuple[float, float]], **more: Any) -> list[Line]:
    points = []
    with pytest.MonkeyPatch.context() as patch:
        for teacher, (own, of_student) in figures.items():
            patch.setitem(FIGURES, "teacher", (own, *FIGURES["teacher"][1:]))
            patch.setitem(FIGURES, PHONE, (of_student, *FIGURES[PHONE][1:]))
            session = make_session(factory.mktemp("candidate"), student__model="path:student", **more)
            points.append(Point(values={KEY: teacher}, session=session))
    return [line for line in read(points) if line.target == PHONE]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """The strongest teacher has the worst student; the other two students are alike."""
    return candidates(tmp_path_factory, CANDIDATES, heal__hidden=0.0)


def test_each_student_is_held_against_the_best_one(lines: list[Line]) -> None:
    large, middle, near = lines
    assert middle.to_best["holdout"] is None
    for line in (large, near):
        mine, best = (scores(one.point, PHONE, "holdout") for one in (line, middle))
        assert mine and best
        expected, found = paired_difference(mine, best), line.to_best["holdout"]
        assert found == expected and found is not None and found.n == ROWS
    assert large.to_best["holdout"].high < 0 <= near.to_best["holdout"].high  # pyright: ignore[reportOptionalMemberAccess]
    assert large.teacher and large.teacher.suites["holdout"].score


def test_the_table_has_both_scores_and_says_that_the_strongest_does_not_teach_best(
    lines: list[Line], capsys: pytest.CaptureFixture[str]
) -> None:
    table = teachers_sheet(lines)
    assert table is not None
    tables.print_table(table)
    assert table.columns == ("suite", "teacher", "its own score", "its student's", "against the best", "verdict")
    holdout = [row for row in table.rows if row[0] == "holdout"]
    assert [(row[1], row[5]) for row in holdout] == [
        ("path:middle", "best"),
        ("path:near", "undecided"),
        ("path:large", "worse"),
    ]
    large, difference = lines[0], lines[0].to_best["holdout"]
    own, student = (one.suites["holdout"].score for one in (large.teacher, large.model))  # pyright: ignore[reportOptionalMemberAccess]
    assert own and student and difference
    assert holdout[2][2:5] == [
        own.text(3),
        student.text(3),
        f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
    ]
    assert holdout[0][4] == ""
    (gap,) = [note for note in table.notes if note.startswith(f"holdout, {PHONE}")]
    assert "path:large has the best score of its own, path:middle the best student" in gap and "capacity gap" in gap
    assert f"n = {ROWS}" in table.notes[0] and "flattered" in table.notes[0]
    assert not any("cut out of its teacher" in note for note in table.notes)
    text = capsys.readouterr().out
    assert "teachers, by their students" in text and "general" not in {row[0] for row in table.rows}


def test_what_the_interval_does_not_tell_apart_is_said_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    alike = candidates(tmp_path_factory, {"path:a": (0.99, 0.94), "path:b": (0.90, 0.95)}, heal__hidden=0.0)
    table = teachers_sheet(alike)
    assert table and any("does not tell apart" in note for note in table.notes)
    assert not any("capacity gap" in note for note in table.notes)


def test_the_best_of_equals_is_the_first_and_has_no_note(tmp_path_factory: pytest.TempPathFactory) -> None:
    equal = candidates(tmp_path_factory, {"path:a": (0.99, 0.94), "path:b": (0.90, 0.94)}, heal__hidden=0.0)
    assert equal[0].to_best["holdout"] is None
    assert equal[1].to_best["holdout"] is not None and equal[1].to_best["holdout"].value == 0.0
    table = teachers_sheet(equal)
    assert table and not any(note.startswith("holdout") for note in table.notes)


def test_other_rows_are_not_compared(lines: list[Line]) -> None:
    session = lines[2].point.session
    inputs = dataclasses.replace(
        session.inputs, suites={**session.inputs.suites, "holdout": session.inputs.suites["holdout"][1:]}
    )
    point = Point(values=lines[2].point.values, session=dataclasses.replace(session, inputs=inputs))
    mixed = [line for line in read([lines[0].point, lines[1].point, point]) if line.target == PHONE]
    assert "holdout" not in mixed[2].to_best
    table = teachers_sheet(mixed)
    assert table and [row[5] for row in table.rows if row[0] == "holdout"][1:].count("other rows") == 1


def test_json_has_it_and_other_sweeps_have_none_of_it(lines: list[Line], tmp_path: Path) -> None:
    found = json.loads(json.dumps([line.to_json() for line in lines]))
    assert [one["teacher"]["verdicts"]["holdout"] for one in found] == ["worse", "best", "undecided"]
    assert found[0]["teacher"]["to_best"]["holdout"]["high"] < 0 and found[1]["teacher"]["to_best"]["holdout"] is None
    assert found[0]["teacher"]["scores"]["holdout"]["n"] == ROWS
    assert len(sheet(lines).rows) == 3  # the usual table stays what it was
    plain = read([Point(values={"distill.lr": 1e-4}, session=make_session(tmp_path))])
    assert teachers_sheet(plain) is None is teachers_sheet([]) and "teacher" not in plain[0].to_json()


def test_a_student_that_is_cut_out_of_its_teacher_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    session = make_session(tmp_path_factory.mktemp("cut"))
    table = teachers_sheet(read([Point(values={KEY: "path:a"}, session=session)]))
    assert table and any("cut out of its teacher" in note for note in table.notes)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart with a student of its own; ``path:other`` has another tokenizer."""

    def resolved(recipe: Any, path: Path, *rest: Any) -> tuple[list[Resolved], Resolved]:
        def one(source: str) -> Resolved:
            facts = ModelFacts(**{**FACTS, "tokenizer": "u" if source == "path:other" else "t"})
            return Resolved(source=source, kind="path", revision="1", digest=source, path=path, facts=facts)

        return [one(recipe.teacher.model)], one(recipe.student.model)

    monkeypatch.setattr(sessions, "_models", resolved)
    path = copy_recipe("quickstart", tmp_path / "quickstart") / "recipe.toml"
    path.write_text(
        path.read_text()
        .replace('model      = "teacher"', 'model      = "path:student"')
        .replace("hidden     = 150", "")
    )
    return path


def test_a_candidate_with_another_tokenizer_is_refused_by_name_before_anything_runs(recipe: Path) -> None:
    notes: list[str] = []
    with pytest.raises(RecipeError, match="path:other and path:student have different tokenizers") as error:
        plan_points(recipe, {KEY: ["path:same", "path:other"]}, store=Store(recipe.parent / "s"), note=notes.append)
    assert notes[-1] == "in the combination teacher.model = path:other" and "score.kind" in error.value.hint
    text = {"score.kind": "none", "distill.loss.kd": 0.0}
    points = plan_points(
        recipe, {KEY: ["path:same", "path:other"]}, overrides=text, store=Store(recipe.parent / "s"), note=notes.append
    )
    base = [point.session.plan.match("base/student")[0].key for point in points]
    assert base[0] == base[1] and points[0].session.plan.match("generate") != points[1].session.plan.match("generate")


def test_a_kept_recipe_keeps_what_its_sweep_needs(recipe: Path) -> None:
    """`store gc --keep` must not delete the trained students of the points."""
    store = Store(recipe.parent / "s")
    recipe.write_text(recipe.read_text() + '\n[sweep]\n"distill.lr" = [1e-4, 3e-4]\n')
    sessions = sessions_of(recipe, store=store)
    assert len({one.plan.match("distill/1")[0].key for one in sessions}) == 3


def test_an_arm_with_another_teacher_shows_its_teacher_too(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe
    path.write_text(path.read_text() + '\n[compare]\n"a larger teacher" = { teacher.model = "path:large" }\n')
    session = prepare(path, store=Store(path.parent / "store"))
    names = {name for step in session.plan.steps for name in step.ids}
    teacher, student = (step_of(name, "a larger teacher") for name in ("teacher", "student"))
    assert {f"evaluate/{teacher}", f"evaluate/{student}", f"generate@{'a larger teacher'}"} <= names
    monkeypatch.setitem(FIGURES, teacher, (0.99, 0.95, 9.0, 0, 0))
    monkeypatch.setitem(FIGURES, student, (0.70, 0.60, 30.0, 128, 0))
    monkeypatch.setitem(FILES, student, f"convert/{student}")
    fill_store(session)
    data = collect(session)
    found = data.model(teacher)
    assert found and found.label == "teacher, a larger teacher" and found.suites["holdout"].score
    (line,) = [one for one in data.comparisons if one.suite == "holdout" and one.other == student]
    assert line.verdict == "helped" and line.keys == {KEY: "path:large"}
