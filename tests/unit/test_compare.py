"""Arms of a recipe: what they share, what is refused, and that the verdict is what the interval of the difference says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill import session as sessions
from edgedistill import tables
from edgedistill.cli import app
from edgedistill.compare import flat, step_of
from edgedistill.errors import RecipeError
from edgedistill.evals.statistics import paired_difference
from edgedistill.evals.suites import load_scores
from edgedistill.lock import read_lock, write_lock
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.plan import Plan
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect, write_html
from edgedistill.report_sheets import comparisons_sheet
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.made_build import FIGURES, FILES, ROWS, fill_store
from tests.unit.test_plan import FACTS


@pytest.fixture(autouse=True)
def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the real model: a plan never opens it."""

    def resolved(recipe: Any, path: Path, *rest: Any) -> tuple[list[Resolved], Resolved]:
        facts = ModelFacts(**FACTS)
        one = Resolved(source=recipe.teacher.model, kind="pypi", revision="1", digest="d", path=path, facts=facts)
        return [one], one

    monkeypatch.setattr(sessions, "_models", resolved)


def written(folder: Path, compare: str, name: str = "quickstart") -> Path:
    path = copy_recipe(name, folder / name) / "recipe.toml"
    path.write_text(path.read_text() + f"\n[compare]\n{compare}\n")
    return path


def planned(folder: Path, compare: str, **overrides: Any) -> Session:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return prepare(written(folder, compare), overrides=changes, store=Store(folder / "store"))


def names(plan: Plan) -> set[str]:
    return {name for step in plan.steps for name in step.ids}


def test_nested_and_dotted_keys_mean_the_same() -> None:
    assert flat({"distill": {"loss": {"kd": 0.0}, "lr": 1e-4}}) == {"distill.loss.kd": 0.0, "distill.lr": 1e-4}
    assert flat({"distill.loss.kd": 0.0, "chain": [], "gates.max_drop": {}}) == {
        "distill.loss.kd": 0.0,
        "chain": [],
        "gates.max_drop": {},
    }


def test_an_arm_adds_only_what_its_keys_touch(tmp_path: Path) -> None:
    session = planned(tmp_path, '"no draws" = { score.kind = "none", distill.loss.kd = 0.0 }', baselines={})
    alone = prepare(session.path, overrides={"compare": {}, "baselines": {}}, store=session.store).plan
    assert names(session.plan) - names(alone) == {
        f"{step}@no draws" for step in ("distill/1", "merge", "convert/student", "evaluate/student")
    }
    assert [step.key for step in session.plan.steps][: len(alone.steps)] == [step.key for step in alone.steps]
    assert session.plan.packages == alone.packages
    seen: set[str] = set()
    for step in session.plan.steps:
        assert set(step.stage.inputs()) <= seen
        seen.add(step.key)


def test_two_arms_share_a_step_under_two_names(tmp_path: Path) -> None:
    session = planned(
        tmp_path, '"a" = { generate.samples = 2, generate.temperature = 1.0 }\n'
        '"b" = { generate = { samples = 2, temperature = 1.0 }, distill.lr = 1e-4 }'
    )  # fmt: skip
    (step,) = session.plan.match("generate@a")
    assert step.ids == ("generate@a", "generate@b")
    assert session.plan.match("distill/1@a") != session.plan.match("distill/1@b")


def test_an_arm_is_no_part_of_the_recipes_own_keys(tmp_path: Path) -> None:
    session = planned(tmp_path, '"other rate" = { distill.lr = 1e-4 }')
    without = prepare(copy_recipe("quickstart", tmp_path / "plain"), store=session.store)
    assert {step.key for step in without.plan.steps} <= {step.key for step in session.plan.steps}


def test_set_reaches_the_arms_too(tmp_path: Path) -> None:
    session = planned(tmp_path, '"one sample" = { distill.lr = 1e-4 }', prompts__rows=[20, 20])
    assert "generate@one sample" not in names(session.plan)


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ('"types" = { quantize.phone-midrange.type = "Q4_0" }', "these keys give the same student"),
        ('"rows" = { suites.ood.files = ["data/dev-ood.jsonl"], seed = 1 }', "would answer different rows"),
        ('"typo" = { distil.lr = 1e-4 }', "did you mean"),
        ('"wrong" = { distill.lr = "fast" }', "distill.lr"),
        ('"draws" = { score.kind = "none" }', "leaves no distributions"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_its_line(tmp_path: Path, compare: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path, compare)
    name = compare.split('"')[1]
    path = tmp_path / "quickstart" / "recipe.toml"
    line = path.read_text().splitlines().index(compare) + 1
    assert str(caught.value).startswith(f"{path}:{line}: compare.{name}: ")
    assert said in str(caught.value) and caught.value.hint
    assert "--set" not in str(caught.value)


@pytest.mark.parametrize("compare", ['"a/b" = { seed = 1 }', '"a" = {}', '"a" = 1'])
def test_a_wrong_table_is_refused(tmp_path: Path, compare: str) -> None:
    with pytest.raises(RecipeError, match="compare"):
        planned(tmp_path, compare)


def test_a_suite_needs_a_score(tmp_path: Path) -> None:
    suites = {"general": {"files": ["data/general.jsonl"], "metric": "perplexity"}}
    changes = {"suites": suites, "gates": {}, "teacher__min_score": {}}
    with pytest.raises(RecipeError, match="no suite has a score to compare"):
        planned(tmp_path, '"seed" = { seed = 1 }', **changes)


ARMS = {"worse": 0.70, "alike": 0.955, "better": 0.999}
TABLE = '"worse" = { distill.lr = 1e-5 }\n"alike" = { distill.lr = 1e-4 }\n"better" = { distill.lr = 3e-4 }'


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A made build whose student gets 0.955 right, and three arms that get fewer, as many and more."""
    session = planned(tmp_path, TABLE)
    for name, share in ARMS.items():
        arm = step_of("student", name)
        monkeypatch.setitem(FIGURES, arm, (share, 0.82, 30.0, 128, 0))
        monkeypatch.setitem(FILES, arm, step_of("convert/student", name))
    fill_store(session)
    return session


def test_the_verdict_is_what_the_interval_says(built: Session) -> None:
    data = collect(built)
    found = {one.name: one for one in data.comparisons if one.suite == "holdout"}
    assert {name: one.verdict for name, one in found.items()} == {
        "worse": "helped",
        "alike": "undecided",
        "better": "hurt",
        "references only": "undecided",
    }
    for one in data.comparisons:
        folders = [
            built.store.entry_path(built.plan.match(f"evaluate/{name}")[0].key) for name in ("student", one.other)
        ]
        mine, theirs = (load_scores(folder, one.suite) for folder in folders)
        expected = paired_difference(mine, theirs)
        assert (one.figure.value, one.figure.low, one.figure.high) == (expected.value, expected.low, expected.high)
        assert one.figure.n == ROWS and one.verdict == expected.verdict
    assert found["worse"].keys == {"distill.lr": 1e-5} and found["references only"].keys == {}
    arm = data.model("student@worse")
    assert arm and arm.label == "student, worse" and arm.kind == "baseline"


def test_table_page_and_json_say_so(built: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = collect(built)
    tables.print_table(comparisons_sheet(data))
    text = capsys.readouterr().out
    assert "distill.lr = 1e-05" in text and all(word in text for word in ("helped", "hurt", "undecided"))
    tables.print_table(tables.report_tables(data)[0])  # also what a build prints
    first = capsys.readouterr().out
    assert "against worse: holdout +0.2" in first and f"n = {ROWS}: helped; ood" in first
    write_html(data, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Does it help?" in page and ">helped<" in page
    told = json.loads(json.dumps(data.to_json()))["comparisons"]
    assert {one["verdict"] for one in told} == {"helped", "hurt", "undecided"}
    assert told[0]["figure"]["n"] == ROWS


def test_a_better_arm_is_a_finding(built: Session) -> None:
    symptoms = {one.symptom: one for one in collect(built).findings}
    assert symptoms["better does better than what the recipe does"].key == "distill.lr"
    assert not any(symptom.startswith(("worse does", "alike does", "references only does")) for symptom in symptoms)


def test_arms_that_are_not_built_have_no_verdict(tmp_path: Path) -> None:
    session = planned(tmp_path, TABLE, baselines={})
    fill_store(session, keep=lambda name: "@" not in name)
    data = collect(session)
    assert data.comparisons == [] and any("distill/1@worse" in line for line in data.missing)


def test_a_sweep_leaves_arms_out(tmp_path: Path) -> None:
    from edgedistill.sweep import plan_points

    path = written(tmp_path, '"other rate" = { distill.lr = 1e-4 }')
    points = plan_points(path, {"distill.lora.rank": [8, 16]}, store=Store(tmp_path / "store"))
    assert not any("@" in name for point in points for name in names(point.session.plan))


def test_plan_shows_the_steps_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "store"))
    path = written(tmp_path, '"other rate" = { distill.lr = 1e-4 }')
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert done.exit_code == 0, done.output
    assert "evaluate/student@other rate" in done.stdout


def test_a_lock_keeps_the_models_of_all_arms(tmp_path: Path) -> None:
    def model(source: str, revision: str) -> Resolved:
        facts = ModelFacts(**FACTS)
        return Resolved(source=source, kind="pypi", revision=revision, digest="d", path=tmp_path, facts=facts)

    lock = tmp_path / "quickstart.lock"
    for one in (model("pypi:a", "1"), model("pypi:b", "1"), model("pypi:a", "2")):
        write_lock(lock, [one])
    assert {source: pin["revision"] for source, pin in read_lock(lock).items()} == {"pypi:a": "2", "pypi:b": "1"}
