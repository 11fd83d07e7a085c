"""A draft model in the plan: its steps, what they hang on, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import EdgeDistillError, RecipeError
from edgedistill.inputs import draft_inputs, student_facts
from edgedistill.recipe import load_recipe
from edgedistill.recipe_draft import Draft
from edgedistill.recipes import copy_recipe
from edgedistill.stages.distill import DistillDraft
from edgedistill.stages.package import DraftedPackage
from edgedistill.stages.speculate import Speculate
from edgedistill.stages.write import Write
from tests.tuned import TUNE
from tests.unit.test_plan import changed, make, make_inputs

PHONE = {"targets": ["phone-midrange"]}
BOTH = {"targets": ["phone-midrange", "laptop-x86"]}
STEPS = {
    "write/phone-midrange",
    "shape/draft",
    "distill/draft-phone-midrange",
    "convert/draft-phone-midrange",
    "quantize/draft-phone-midrange",
    "speculate/phone-midrange",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_a_draft_adds_its_steps_and_changes_no_other_than_the_package(folder: Path) -> None:
    assert changed(make(folder), make(folder, draft=PHONE)) == {*STEPS, "package/phone-midrange"}
    names = changed(make(folder, draft=PHONE), make(folder, draft=BOTH))
    assert names == {step.replace("phone-midrange", "laptop-x86") for step in STEPS - {"shape/draft"}} | {
        "package/laptop-x86"
    }


def test_the_shipped_file_writes_what_its_draft_learns_and_is_what_the_draft_is_measured_beside(folder: Path) -> None:
    plan = make(folder, draft=PHONE, tune=TUNE)
    tuned, student = plan.match("tune/phone-midrange")[0].key, plan.match("merge")[0].key
    write, trained, spoken, package = (
        plan.match(name)[0].stage for name in ("write/*", "distill/draft-*", "speculate/*", "package/phone-midrange")
    )
    assert isinstance(write, Write) and isinstance(trained, DistillDraft)
    assert isinstance(spoken, Speculate) and isinstance(package, DraftedPackage)
    assert write.model == spoken.model == package.model == tuned
    assert trained.teacher == student
    assert trained.kept == plan.match("write/*")[0].key
    assert trained.training["method"] == "full"
    assert spoken.draft == package.draft == plan.match("quantize/draft-*")[0].key
    assert package.drafting == plan.match("speculate/*")[0].key
    assert len({row.id for row in spoken.prompts}) == 64
    assert spoken.max_new_tokens == 40


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("layers", 3, "shape/draft"),
        ("rows", [7, 9], "write/phone-midrange"),
        ("lr", 1e-3, "distill/draft-phone-midrange"),
        ("loss", {"kd": 0.0, "ce": 1.0}, "distill/draft-phone-midrange"),
        ("type", "Q4_0", "quantize/draft-phone-midrange"),
        ("tokens", 5, "speculate/phone-midrange"),
        ("min_probability", 0.5, "speculate/phone-midrange"),
    ],
)
def test_what_a_key_of_the_draft_runs_anew(folder: Path, key: str, value: Any, first: str) -> None:
    files = {**PHONE, "files": ["data/train.jsonl", "data/drills.jsonl"], "rows": [8, 8]}
    names = changed(make(folder, draft=files), make(folder, draft={**files, key: value}))
    assert first in names
    assert names <= {*STEPS, "package/phone-midrange"}
    order = [step for step in plan_order(make(folder, draft=files)) if step in STEPS]
    independent = {"shape/draft", "write/phone-midrange"}  # neither is made of the other
    assert names & STEPS == set(order[order.index(first) :]) - (independent - {first})


def plan_order(plan: Any) -> list[str]:
    return [name for step in plan.steps for name in step.ids]


def test_the_draft_is_cut_out_of_the_student_and_has_its_tokens(folder: Path) -> None:
    facts = student_facts(draft_inputs(make_inputs(folder, draft={**PHONE, "ffn": 256})))
    assert (facts.layers, facts.ffn, facts.vocab) == (2, 256, 12800)
    facts = student_facts(draft_inputs(make_inputs(folder, draft=PHONE)))
    assert (facts.layers, facts.ffn) == (2, 1024)


def test_settings_at_their_defaults_are_no_part_of_the_key(folder: Path) -> None:
    stage: Any = make(folder, draft=PHONE).match("distill/draft-*")[0].stage
    assert not {"optimizer", "gradient_checkpointing", "on_policy", "think_weight"} & set(stage.training)


@pytest.mark.parametrize(
    ("draft", "key", "message"),
    [
        ({"kind": "eagle"}, "draft.kind", "llama.cpp's library hands the states"),
        ({"kind": "EAGLE3"}, "draft.kind", "llama.cpp's library hands the states"),
        ({"kind": "medusa"}, "draft.kind", "llama.cpp cannot load Medusa heads"),
        ({"kind": "lookahead"}, "draft.kind", '"model"'),
        ({"vocabulary": 4096}, "draft.vocabulary", "writes the tokens of the model that checks it"),
        ({"layers": "all"}, "draft", "as slow as the model itself"),
        ({"layers": 31}, "draft.layers", "the student has 30 layers"),
        ({"ffn": 1216}, "draft.ffn", "the FFN of the student has 1024 neurons"),
        ({"type": "Q4"}, "draft.type", "unknown GGUF type 'Q4'"),
        ({"rows": 8}, "draft", "rows and skip count rows of draft.files"),
        ({"files": ["data/train.jsonl"], "rows": [8, 9]}, "", "draft.rows has 2 counts for 1 files"),
        ({"files": ["data/train.jsonl"], "skip": [8, 9]}, "", "draft.skip has 2 counts for 1 files"),
        ({"files": ["data/train.jsonl"], "skip": 9999}, "draft.skip", "leaves out 9999 rows"),
        ({"files": ["data/holdout.jsonl"]}, "suites", "stands in the training rows and in the suite"),
        ({"targets": ["laptop-x86-onnx"]}, "draft.targets", "drafts run in llama.cpp"),
        ({"targets": ["nowhere"]}, "", "draft.targets names the target 'nowhere'"),
        ({"min_probability": 1.0}, "draft.min_probability", "less than 1"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(folder: Path, draft: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(EdgeDistillError, match=message) as found:
        make(folder, draft={**PHONE, **draft})
    assert key in str(found.value)


def test_a_draft_needs_prompts_to_be_measured_on(folder: Path) -> None:
    general = {"general": {"files": ["data/general.jsonl"], "metric": "perplexity"}}
    with pytest.raises(RecipeError, match="measured on the prompts of a suite") as found:
        make(folder, draft=PHONE, suites=general, gates={}, teacher__min_score={})
    assert found.value.key == "draft.targets"


def test_a_wrong_key_is_told_with_its_line(folder: Path) -> None:
    path = folder / "recipe.toml"
    path.write_text(path.read_text() + '\n[draft]\ntargets = ["phone-midrange"]\nkind = "eagle"\n')
    line = len(path.read_text().splitlines())
    with pytest.raises(RecipeError, match=rf"recipe\.toml:{line}: draft\.kind") as found:
        load_recipe(path)
    assert 'take kind = "model"' in str(found.value)


def test_defaults_of_the_draft() -> None:
    draft = Draft(targets=("phone-midrange",))
    assert (draft.layers, draft.kind, draft.vocabulary) == (2, "model", None)
