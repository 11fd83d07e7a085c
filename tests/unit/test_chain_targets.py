"""Links of a chain that ship for targets of their own: their steps, what stays as it was, what is refused, and the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgedistill import session as sessions
from edgedistill import tables
from edgedistill.errors import RecipeError, UsageError
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect, write_html
from edgedistill.runner import Outcome
from edgedistill.session import Session, prepare, publish
from edgedistill.store import Store
from tests.unit.made_build import FIGURES, FILES, fill_store
from tests.unit.test_plan import FACTS

SHIPS: dict[str, Any] = {"chain.0.targets": ["laptop-x86", "phone-midrange"]}
NO_ARMS: dict[str, Any] = {"compare": {}}


@pytest.fixture(autouse=True)
def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the real model: a plan never opens it."""

    def resolved(recipe: Any, path: Path, *rest: Any) -> tuple[list[Resolved], Resolved]:
        one = Resolved(source="pypi:x", kind="pypi", revision="1", digest="d", path=path, facts=ModelFacts(**FACTS))
        return [one], one

    monkeypatch.setattr(sessions, "_models", resolved)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The packaged chain, whose link ships for nobody as yet."""
    path = copy_recipe("chain", tmp_path / "chain") / "recipe.toml"
    text = path.read_text()
    own, table = re.findall(r"(?m)^(?:targets    =|gates      =).*\n", text), text.index("[quantize.laptop-x86]")
    assert len(own) == 2
    text = text[:table] + text[text.index("[suites.holdout]") :]
    path.write_text(text.replace(own[0], "").replace(own[1], ""))
    return path


def planned(recipe: Path, *targets: str, **changes: Any) -> Session:
    overrides = {**NO_ARMS, **{key.replace("__", "."): value for key, value in changes.items()}}
    return prepare(recipe, targets=targets, overrides=overrides, store=Store(recipe.parent / "store"))


def keys(session: Session) -> dict[str, str]:
    return {name: step.key for step in session.plan.steps for name in step.ids}


def test_a_link_with_targets_is_more_steps_and_the_last_student_stays_what_it_was(recipe: Path) -> None:
    plain, ships = planned(recipe), planned(recipe, chain__0__targets=["laptop-x86", "phone-midrange"])
    before, after = keys(plain), keys(ships)
    assert {name: after[name] for name in before} == before
    of_student = {f"{stage}/student@link-1" for stage in ("convert", "evaluate", "measure")} | {"calibrate@link-1"}
    of_targets = {
        f"{stage}/{target}@link-1"
        for stage in ("quantize", "evaluate", "measure", "package")
        for target in ("laptop-x86", "phone-midrange")
    }
    assert after.keys() - before.keys() == of_student | of_targets
    assert list(ships.plan.packages) == ["phone-midrange", "laptop-x86@link-1", "phone-midrange@link-1"]
    step = {name: step for step in ships.plan.steps for name in step.ids}
    assert after["merge/1"] in step["convert/student@link-1"].stage.inputs()
    assert after["convert/student@link-1"] in step["quantize/laptop-x86@link-1"].stage.inputs()
    package: Any = step["package/phone-midrange@link-1"].stage
    assert package.recipe == "chain@link-1" and package.target["name"] == "phone-midrange"
    assert package.reference == after["convert/teacher"] and package.student == after["evaluate/student@link-1"]
    quantize: Any = step["quantize/phone-midrange@link-1"].stage
    assert quantize.type == "Q8_0"  # [quantize.phone-midrange] is the profile's for whoever ships
    seen: set[str] = set()
    for one in ships.plan.steps:
        assert set(one.stage.inputs()) <= seen
        seen.add(one.key)


def test_a_name_means_one_student_and_a_stage_all_of_them(recipe: Path) -> None:
    plan = planned(recipe, **SHIPS).plan
    assert [step.id for step in plan.match("quantize/phone-midrange")] == ["quantize/phone-midrange"]
    assert [step.id for step in plan.match("evaluate/student")] == ["evaluate/student"]
    assert {step.id for step in plan.match("package")} == {f"package/{name}" for name in plan.packages}
    assert {step.id for step in plan.match("*@link-1")} == {name for name in keys_of(plan) if name.endswith("@link-1")}
    (target,) = plan.match("package/laptop-x86@link-1")
    cut = plan.only([target])
    assert set(cut.packages) == {"laptop-x86@link-1"}
    assert "distill/2" not in keys_of(cut) and "distill/1" in keys_of(cut)


def keys_of(plan: Any) -> set[str]:
    return {name for step in plan.steps for name in step.ids}


def test_gates_are_the_links_own_or_the_recipes(recipe: Path) -> None:
    def gates(**changes: Any) -> Any:
        stage: Any = planned(recipe, **SHIPS, **changes).plan.match("package/laptop-x86@link-1")[0].stage
        return stage.gates

    assert gates()["min_retention"] == {"holdout": 0.5} and gates()["min_shrink"] == 8.0
    own = gates(chain__0__gates={"min_retention": {"holdout": 0.9}, "min_shrink": {"phone-midrange": 3.0}})
    assert own["min_retention"] == {"holdout": 0.9} and own["min_shrink"] is None
    shared = gates(gates={"min_speedup": {"laptop-x86": 1.5, "phone-midrange": 2.0}})
    assert shared["min_speedup"] == 1.5


def test_one_target_alone_may_be_asked_for(recipe: Path) -> None:
    assert list(planned(recipe, "laptop-x86", **SHIPS).plan.packages) == ["laptop-x86@link-1"]
    assert list(planned(recipe, "phone-midrange", **SHIPS).plan.packages) == [
        "phone-midrange",
        "phone-midrange@link-1",
    ]
    with pytest.raises(UsageError, match="target 'pi' is not in the recipe") as error:
        planned(recipe, "pi", **SHIPS)
    assert error.value.hint.endswith("phone-midrange, laptop-x86")


def test_onnx_and_tuned_files_of_a_link(recipe: Path) -> None:
    tune = {"targets": ["laptop-x86"], "files": ["data/train.jsonl"], "skip": 1200, "rows": 50}
    plan = planned(recipe, chain__0__targets=["laptop-x86", "laptop-x86-onnx"], tune=tune).plan
    stage = {name: step.stage for step in plan.steps for name in step.ids}
    key = {name: step.key for step in plan.steps for name in step.ids}
    assert key["tune/laptop-x86@link-1"] in stage["package/laptop-x86@link-1"].inputs()
    onnx: Any = stage["quantize/laptop-x86-onnx@link-1"]
    assert onnx.model == key["merge/1"] and onnx.calibration is None


def test_a_link_that_ships_is_tempered_and_teaches_as_it_was(recipe: Path) -> None:
    temperature = {"files": ["data/train.jsonl"], "skip": 1200, "rows": 50}
    plain, plan = planned(recipe, **SHIPS), planned(recipe, **SHIPS, temperature=temperature)
    key, stage = keys(plan), {name: step.stage for step in plan.plan.steps for name in step.ids}
    assert key["temper@link-1"] in stage["convert/student@link-1"].inputs()
    assert key["merge/1"] in stage["temper@link-1"].inputs() and key["distill/2"] == keys(plain)["distill/2"]


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"chain.0.targets": ["laptop-x68"]}, "chain.0.targets", "no target is called"),
        ({"chain.0.targets": ["laptop-x86"] * 2}, "chain.0.targets", "named twice"),
        ({"chain.0.gates": {"min_shrink": 2.0}}, "chain.0.gates", "nothing of this link is packaged"),
        ({**SHIPS, "chain.0.gates": {"min_retention": {"mmlu": 0.5}}}, "", r"chain\.0\.gates\.min_retention names the suite"),
        ({**SHIPS, "chain.0.gates": {"min_shrink": {"pi": 2.0}}}, "", r"min_shrink names the target 'pi'"),
        ({**SHIPS, "draft.targets": ["laptop-x86"]}, "", r"draft\.targets names the target 'laptop-x86'"),
        ({**SHIPS, "compare": {"link-1": {"seed": 1}}}, "compare", "take another name"),
    ],
)  # fmt: skip
def test_what_no_link_can_ship_is_refused(recipe: Path, changes: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        planned(recipe, **changes)
    assert key in str(error.value) and str(error.value).startswith((str(recipe), f"--set {key}"))


def test_what_only_a_plan_refuses_is_told_with_its_line(recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    at = next(number for number, line in enumerate(lines, 1) if line.startswith("[prompts]"))
    files = next(number for number, line in enumerate(lines, 1) if number > at and line.startswith("files"))
    recipe.write_text("\n".join([*lines[: files - 1], 'files = ["data/nothing.jsonl"]', *lines[files:]]))
    with pytest.raises(RecipeError, match=r"nothing\.jsonl: no such file") as error:
        planned(recipe, prompts__rows=None)
    assert str(error.value).startswith(f"{recipe}:{files}: prompts.files: ")
    with pytest.raises(RecipeError) as error:
        planned(recipe, prompts__files=["data/gone.jsonl"], prompts__rows=None)
    assert str(error.value).startswith("--set prompts.files: ") and "gone.jsonl: no such file" in str(error.value)


def test_the_packaged_chain_ships_its_link_too(tmp_path: Path) -> None:
    session = prepare(copy_recipe("chain", tmp_path / "chain"), store=Store(tmp_path / "store"))
    assert list(session.plan.packages) == ["phone-midrange", "laptop-x86@link-1"]
    assert [step.id for step in session.plan.match("evaluate/student@in one step")]


def test_a_link_too_large_for_its_target_is_told_by_its_name(recipe: Path) -> None:
    folder = recipe.parent / "targets"
    folder.mkdir()
    profile = (
        '[quantize]\ntype = "Q8_0"\n[runtime]\nformat = "gguf"\nengine = "llama.cpp"\nthreads = 4\ncontext = 2048\n'
    )
    head = 'summary = "small"\narch = "aarch64"\n'
    (folder / "tight.toml").write_text(f'{head}{profile}[limits]\nfile_size = "60 MiB"\n')
    warned = planned(recipe, targets=["tight"], chain__0__targets=["tight"], quantize={}).plan.warnings
    (told,) = [one for one in warned if "over its file_size" in one]
    assert told.startswith("tight, link 1 of the chain: Q8_0 makes about")
    (folder / "tight.toml").write_text(f'{head}{profile}[limits]\nfile_size = "10 MiB"\n')
    with pytest.raises(RecipeError, match="no type brings link 1 of the chain under 10 MiB"):
        planned(recipe, chain__0__targets=["tight"], quantize={})


def test_an_arm_without_the_chain_needs_none_of_its_targets(recipe: Path) -> None:
    changes = {**SHIPS, "quantize.laptop-x86.type": "Q8_0", "gates.min_speedup": {"laptop-x86": 1.0}}
    arm = {"compare": {"in one step": {"chain": [], "student.vocabulary": 12288}}}
    plan = planned(recipe, **changes, **arm).plan
    assert [step.id for step in plan.match("evaluate/student@in one step")]
    assert not any("link-1" in name and "in one step" in name for name in keys_of(plan))


@pytest.fixture
def built(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A made build whose link gets more right than the last student, at twice the size."""
    session = planned(recipe, **SHIPS)
    made = {"student@link-1": (0.965, 0.85, 25.0, 190, 150), "laptop-x86@link-1": (0.70, 0.60, 26.0, 90, 200)}
    made["phone-midrange@link-1"] = (0.96, 0.84, 26.0, 90, 190)
    for name, figures in made.items():
        monkeypatch.setitem(FIGURES, name, figures)
    monkeypatch.setitem(FILES, "student@link-1", "convert/student@link-1")
    fill_store(session, ship=session.plan.packages)
    return session


def test_the_report_names_whose_artifact_it_is(
    built: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = collect(built)
    labels = {model.id: (model.label, model.kind) for model in data.models}
    assert labels["laptop-x86@link-1"] == ("laptop-x86 Q4_K_M, link-1", "artifact")
    assert labels["student@link-1"] == ("student f16, link-1", "student") and "student" in labels
    assert data.shipped == dict.fromkeys(built.plan.packages, True) and set(data.gates) == set(built.plan.packages)
    found = {(line.before, line.after): line for line in data.differences if line.suite == "holdout"}
    assert found["student@link-1", "laptop-x86@link-1"].noticed == "loss"
    assert ("student", "laptop-x86@link-1") not in found and ("student", "phone-midrange") in found
    (finding,) = [one for one in data.findings if one.symptom == "laptop-x86@link-1 loses accuracy to quantization"]
    assert finding.key.startswith("quantize.laptop-x86.type")
    link, last = data.model("student@link-1"), data.model("student")
    assert link and last and link.calibration and last.calibration
    tables.print_table(tables.report_tables(data)[0])
    text = capsys.readouterr().out
    assert "laptop-x86 Q4_K_M, link-1" in text and "phone-midrange Q8_0, link-1" in text
    write_html(data, tmp_path / "report.html")
    assert "3 of 3 artifacts packaged" in (tmp_path / "report.html").read_text()


def test_each_package_has_a_folder_of_its_own(built: Session) -> None:
    folders = publish(built, Outcome())
    root = built.path.parent / "dist" / "chain"
    assert folders == [root / name for name in ("phone-midrange", "laptop-x86@link-1", "phone-midrange@link-1")]
    assert all((folder / "made").read_text() == f"package/{folder.name}" for folder in folders)
