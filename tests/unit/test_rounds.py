"""Rounds in the plan and in the report: which steps, which keys, what is refused, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import EdgeDistillError
from edgedistill.plan import Plan
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect, write_html
from edgedistill.report_sheets import all_sheets
from edgedistill.tables import build_table
from tests.unit.made_build import FIGURES, make_session
from tests.unit.test_plan import changed, make

SELF: dict[str, Any] = {"kind": "self", "samples": 3, "temperature": 0.7}
ONLINE: dict[str, Any] = {"kind": "online", "samples": 2, "replay": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def steps(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return keys and stages by name."""
    named = {name: step for step in plan.steps for name in step.ids}
    return {name: step.key for name, step in named.items()}, {name: step.stage for name, step in named.items()}


def test_each_round_is_more_steps_from_the_student_that_the_one_before_left(folder: Path) -> None:
    key, stage = steps(make(folder, round=[SELF, ONLINE]))
    first, second = stage["generate/round-1"], stage["generate/round-2"]
    assert (first.teacher, first.samples, first.temperature) == (key["merge/1"], 3, 0.7)
    assert (second.teacher, second.samples, second.temperature) == (key["adapt"], 2, 0.8)
    assert len({stage["generate"].seed, first.seed, second.seed}) == 3  # other draws, also of the same teacher
    assert stage["evaluate/round-2"].model == key["merge/2"] and second.student == key["evaluate/round-2"]
    assert [suite.metric for suite in stage["evaluate/round-2"].suites] == ["json-exact"]
    kept = [stage[f"filter/round-{number}"] for number in (1, 2)]
    assert [(one.by, one.before, one.replay) for one in kept] == [
        ("student", None, 0.0),
        ("teacher", key["filter/round-1"], 0.5),
    ]
    for number in (1, 2):
        score, distill = stage[f"score/round-{number}"], stage[f"distill/{number + 1}"]
        assert (score.teacher, score.kept) == (key["adapt"], key[f"filter/round-{number}"])
        assert (distill.student, distill.targets) == (key[f"merge/{number}"], key[f"score/round-{number}"])
    assert stage["merge"].adapter == key["distill/3"] and stage["convert/student"].model == key["merge"]


def test_a_round_leaves_what_was_built_before_it_as_it_was(folder: Path) -> None:
    plain, one, two = make(folder), make(folder, round=[SELF]), make(folder, round=[SELF, ONLINE])
    before, after = steps(plain)[0], steps(one)[0]
    for name in ("generate", "filter", "score", "heal", "distill/1", "distill/gold-sft", "evaluate/gold-sft"):
        assert after[name] == before[name]
    assert after["merge/1"] == before["merge"] and after["merge"] != before["merge"]
    assert after["evaluate/before-rounds"] == before["evaluate/student"]  # which is compared with, not built again
    assert {"distill/3", "score/round-2"} <= changed(one, two)
    assert changed(one, two).isdisjoint({"generate/round-1", "filter/round-1", "score/round-1", "distill/2"})
    assert changed(plain, make(folder, round=[])) == set()
    asked = changed(two, make(folder, round=[SELF, {**ONLINE, "samples": 3}]))
    assert "generate/round-2" in asked and asked.isdisjoint({"evaluate/round-2", "filter/round-1", "distill/2"})


def test_the_rounds_of_a_chain_are_its_last_students(folder: Path) -> None:
    plan = make(folder, chain=[{"ffn": 1344}], student__layers=20, round=[SELF, ONLINE])
    key, stage = steps(plan)
    assert stage["generate/round-1"].teacher == key["merge/2"] and stage["distill/3"].student == key["merge/2"]
    assert stage["score/round-1"].teacher == key["merge/1"]  # the link before, as in the distillation before
    assert stage["generate/round-2"].teacher == key["adapt"]  # who wrote the text before
    assert "distill/4" in key and stage["merge"].adapter == key["distill/4"]


def test_a_round_teaches_as_the_distillation_before_it(folder: Path) -> None:
    dense = make(folder, score__kind="dense", distill__method="full", round=[SELF])
    key, stage = steps(dense)
    assert "score/round-1" not in key and stage["distill/2"].teacher == key["adapt"]
    assert stage["generate/round-1"].teacher == key["distill/1"] and stage["convert/student"].model == key["distill/2"]
    text = make(folder, score__kind="none", distill__loss__kd=0.0, round=[SELF])
    assert steps(text)[1]["distill/2"].targets is None
    thinks = steps(make(folder, generate__style="think", round=[SELF]))[1]["filter/round-1"]
    assert thinks.style == "think" and type(thinks).__name__ == "ThinkingRoundFilter"


@pytest.mark.parametrize(
    ("table", "edit", "message"),
    [
        ('kind = "selfish"', ("", ""), r"recipe\.toml:\d+: round\[0\]\.kind.*online"),
        ('kind = "self"\nsample = 3', ("", ""), r"recipe\.toml:\d+: round\[0\]\.sample.*samples"),
        ('kind = "self"\ntemperature = 0.0', ("", ""), r"recipe\.toml:\d+: round\[0\].*all the same: set temperature"),
        ('kind = "online"\nsamples = 1\ntemperature = 0.0', ("", ""), r"round\[0\].*answers as it did before"),
        ('kind = "self"\nkeep = 5', ("", ""), r"round\[0\].*keep = 5 of samples = 4"),
        ('kind = "self"\nreplay = 0.5', ("", ""), r"round\[0\].*replay is for kind"),
        (
            'kind = "self"',
            ("max_new_tokens = 64", 'style = "rationale"'),
            r"recipe\.toml:\d+: round\[0\]\.kind.*rationale",
        ),
    ],
)
def test_a_round_that_cannot_work_is_refused_with_its_line(
    folder: Path, table: str, edit: tuple[str, str], message: str
) -> None:
    path = folder / "recipe.toml"
    text = path.read_text()
    assert edit[0] in text
    path.write_text(text.replace(edit[0], edit[1], 1).replace("[calibrate]", f"[[round]]\n{table}\n\n[calibrate]"))
    with pytest.raises(EdgeDistillError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("filters", [[], [{"kind": "thinking"}]])
def test_a_round_needs_a_filter_that_knows_right_from_wrong(folder: Path, filters: list[Any]) -> None:
    with pytest.raises(EdgeDistillError, match=r"round\[0\]\.kind.*nothing tells right answers from wrong ones"):
        make(folder, round=[SELF], filter=filters, generate__style="think" if filters else "answer")


def test_the_report_says_what_rounds_asked_and_whether_they_helped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgedistill.runner import Outcome

    session = make_session(tmp_path, round=[SELF, ONLINE])
    data = collect(session)
    assert [(one.step, one.kind, one.prompts, one.replayed) for one in data.rounds] == [
        ("round-1", "self", 120, 400),
        ("round-2", "online", 120, 400),
    ]
    first, second = data.rounds
    assert first.right is None and second.right is not None and second.right.n == 120
    assert first.good is not None and first.good.value == 0.75 and first.good.low is not None
    verdicts = {line.suite: line for line in data.comparisons if line.other == "before-rounds"}
    assert set(verdicts) == {"holdout", "ood"}
    assert (verdicts["holdout"].verdict, verdicts["ood"].verdict) == ("helped", "undecided")
    for line in verdicts.values():
        low, high = line.figure.low, line.figure.high
        assert low is not None and high is not None
        assert line.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
    titles = {sheet.title: sheet for sheet in all_sheets(data)}
    assert [row[0] for row in titles["rounds"].rows] == ["round-1", "round-2"]
    notes = build_table(session, Outcome(), []).notes
    (note,) = (one for one in notes if one.startswith("against the student before the rounds: holdout +0.0"))
    assert ": helped;" in note
    write_html(data, tmp_path / "report.html")
    assert "<h2>Rounds</h2>" in (tmp_path / "report.html").read_text()


def test_rounds_that_hurt_are_told_with_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {**FIGURES, "before-rounds": (0.999, 0.82, 29.0, 128, 0), "student": (0.80, 0.82, 29.0, 128, 189)}
    monkeypatch.setattr("tests.unit.made_build.FIGURES", figures)
    (found,) = [one for one in collect(make_session(tmp_path, round=[SELF])).findings if "rounds" in one.symptom]
    assert found.figure.startswith("holdout: -0.") and "ood" not in found.figure and "[[round]]" in found.key


def test_a_report_without_rounds_says_nothing_of_them(tmp_path: Path) -> None:
    data = collect(make_session(tmp_path))
    assert data.rounds == [] and data.model("before-rounds") is None
    assert "rounds" not in {sheet.title for sheet in all_sheets(data)}
