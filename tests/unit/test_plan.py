"""The plan: what is in a key and what is not, what shares, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.expand import expand
from edgedistill.inputs import read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.plan import Plan
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.stages.adapt import Adapt
from edgedistill.target import find_target
from tests.tuned import TUNE

FACTS = {
    "architecture": "llama", "layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocab": 49152,
    "tied": True, "context": 8192, "tokenizer": "t", "quantized_from": "Q4_1", "licence": "apache-2.0",
    "size": 98362432,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def make(folder: Path, *, student: dict[str, Any] | None = None, **overrides: Any) -> Plan:
    path = folder / "recipe.toml"
    recipe = load_recipe(path, {key.replace("__", "."): value for key, value in overrides.items()})
    gguf = folder / "recipe.toml"  # any file: the plan never opens it

    def resolved(facts: dict[str, Any]) -> Resolved:
        return Resolved(source="x", kind="pypi", revision="1", digest="d", path=gguf, facts=ModelFacts(**facts))

    targets = [find_target(name, folder) for name in recipe.targets]
    targets = [
        t.with_types(recipe.quantize[t.name].model_dump(exclude_none=True)) if t.name in recipe.quantize else t
        for t in targets
    ]
    models = resolved(FACTS), resolved({**FACTS, **(student or {})})
    return expand(read_inputs(recipe, path, *models, targets, others=[resolved(FACTS) for _ in recipe.teachers]))


def changed(a: Plan, b: Plan) -> set[str]:
    before = {name: step.key for step in a.steps for name in step.ids}
    after = {name: step.key for step in b.steps for name in step.ids}
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def stages(names: set[str]) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_a_plan_needs_no_torch_and_every_step_follows_its_inputs(folder: Path) -> None:
    plan = make(folder)
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.stage.inputs()) <= seen
        seen.add(step.key)
    assert set(plan.packages) == {"phone-midrange", "laptop-x86", "laptop-x86-onnx"}


def test_the_same_recipe_in_another_folder_has_the_same_keys(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert changed(make(folder), make(tmp_path / "elsewhere")) == set()


def test_rows_are_counted_for_all_files_or_for_each(folder: Path) -> None:
    def gold(rows: Any) -> dict[str, int]:
        plan = make(folder, adapt__files=["data/train.jsonl", "data/lists.jsonl"], adapt__rows=rows)
        (adapt,) = (step.stage for step in plan.steps if isinstance(step.stage, Adapt))
        names = [row.id.partition("-")[0] for row in adapt.rows]
        return {name: names.count(name) for name in set(names)}

    assert gold(7) == {"train": 7, "lists": 7}
    assert gold([7, 3]) == {"train": 7, "lists": 3}
    with pytest.raises(RecipeError, match=r"adapt\.rows has 3 counts for 2 files"):
        gold([7, 3, 1])


def test_lr_reruns_from_distill_on(folder: Path) -> None:
    names = changed(make(folder), make(folder, distill__lr=3e-4))
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape", "heal"})
    assert "distill/1" in names and "package/phone-midrange" in names
    assert "evaluate/teacher" not in names and "convert/teacher" not in names


def test_another_seed_of_distilling_trains_anew_on_the_same_targets(folder: Path) -> None:
    names = changed(make(folder), make(folder, distill__seed=1))
    assert {"distill/1", "distill/gold-sft"} <= names
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape", "heal"})
    assert changed(make(folder), make(folder, distill__seed=0)) == set()  # the recipe's own


def test_a_key_that_came_later_changes_nothing_until_it_is_used(folder: Path) -> None:
    """What an older version built is not built again because of a new key at its default."""
    (adapt,) = make(folder).match("adapt")
    assert isinstance(adapt.stage, Adapt)
    assert not {"optimizer", "gradient_checkpointing"} & set(adapt.stage.training)
    assert set(adapt.stage.training["lora"]) == {"rank", "alpha", "dropout", "targets"}
    assert changed(make(folder), make(folder, adapt__optimizer="adamw_torch", adapt__lora__dora=False)) == set()
    changes: dict[str, Any]
    for changes in ({"adapt__optimizer": "adafactor"}, {"adapt__lora__dora": True}, {"adapt__lora__rslora": True}):
        assert "adapt" in changed(make(folder), make(folder, **changes))
    assert "heal" in changed(make(folder), make(folder, heal__gradient_checkpointing=True))


def write_chat(folder: Path, *names: str) -> None:
    """Write rows of other text beside the recipe, under some names."""
    rows = [{"id": f"g{n}", "prompt": f"question {n}", "reference": f"answer {n}"} for n in range(20)]
    for name in names or ("chat.jsonl",):
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows))


def test_general_rows_rerun_from_distill_on_wherever_their_file_lies(folder: Path) -> None:
    write_chat(folder, "chat.jsonl", "moved.jsonl")
    plain, kept = make(folder), make(folder, distill__keep={"files": ["chat.jsonl"]})
    names = changed(plain, kept)
    assert {"distill/1", "distill/gold-sft", "merge"} <= names  # both: they still differ by the soft targets alone
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape", "heal"})
    assert changed(kept, make(folder, distill__keep={"files": ["moved.jsonl"]})) == set()
    assert "distill/1" in changed(kept, make(folder, distill__keep={"files": ["chat.jsonl"], "kl": 2.0}))
    assert "distill/1" in changed(kept, make(folder, distill__keep={"files": ["chat.jsonl"], "rows": 15}))
    (before,), (after,) = plain.match("distill/1"), kept.match("distill/1")
    assert after.work.amount > before.work.amount and after.memory == before.memory
    keeps: tuple[Any, ...] = (None, {"files": ["chat.jsonl"]})
    full = [make(folder, distill__method="full", distill__keep=keep).match("distill/1")[0] for keep in keeps]
    assert full[1].memory > full[0].memory  # the start, as a copy
    for keep, key, message in (
        ({"files": ["chat.jsonl"], "rows": 9}, "distill.keep.rows", "9 general rows are too few"),
        ({"files": ["nothing.jsonl"]}, "distill.keep.files", "no such file"),
        ({"files": ["data/general.jsonl"]}, "suites", "stands in the training rows and in the suite"),
    ):
        with pytest.raises(RecipeError, match=message) as error:
            make(folder, distill__keep=keep)
        assert error.value.key == key
    with pytest.raises(RecipeError, match="nothing would be kept"):
        make(folder, distill__keep={"files": ["chat.jsonl"], "kl": 0.0})
    with pytest.raises(RecipeError, match=r"distill\.keep\.rows has 2 counts for 1 files"):
        make(folder, distill__keep={"files": ["chat.jsonl"], "rows": [5, 5]})


def test_what_was_forgotten_is_held_against_the_students_own_base(folder: Path) -> None:
    def steps(**overrides: Any) -> dict[str, Any]:
        return {name: step.stage for step in make(folder, **overrides).steps for name in step.ids}

    assert "evaluate/base" not in steps()  # the base with examples in its prompt is evaluated already
    alone = steps(baselines={})
    assert [spec.name for spec in alone["evaluate/base"].suites] == ["general"]
    assert set(alone["evaluate/base"].rows) == {"general"}
    inputs = make_inputs(folder, student__model="path:other")
    other = expand(dataclasses.replace(inputs, student=dataclasses.replace(inputs.student, digest="another")))
    (base,) = other.match("evaluate/base")
    assert other.match("base/student")[0].key in base.stage.inputs()
    assert "evaluate/base" not in steps(adapt=None, baselines={}, heal__hidden=0.0)  # the teacher is the base
    general = {"suites.general.files": ["data/general.jsonl"], "suites.general.metric": "exact"}
    assert "evaluate/base" not in steps(
        baselines={}, **{key.replace(".", "__"): value for key, value in general.items()}
    )


def test_thinking_is_a_style_with_rationales_in_the_gold_rows(folder: Path) -> None:
    plan = make(folder, generate__style="think")
    assert any("no row of adapt.files has a" in one and "rationale" in one for one in plan.warnings)
    assert any("grammar must allow the block <think>" in one for one in plan.warnings)
    assert any("phone-midrange may write as slowly as" in one and "max_words" in one for one in plan.warnings)
    (evaluate,) = plan.match("evaluate/student")
    assert {spec.metric for spec in evaluate.stage.suites} == {"think:json-exact", "perplexity"}  # pyright: ignore
    bounded = make(
        folder,
        generate__style="think",
        filter=[{"kind": "reference"}, {"kind": "thinking", "max_words": 60}],
    )
    assert any("60 words of thinking take" in one for one in bounded.warnings)
    path = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rationale": "Because I say so."}) + "\n" for row in rows))
    taught = make(folder, generate__style="think")
    assert not any("rationale" in one for one in taught.warnings)
    (adapt,) = taught.match("adapt")
    assert isinstance(adapt.stage, Adapt)
    assert (adapt.stage.rows[0].reference or "").startswith("<think>\nBecause I say so.\n</think>\n\n{")
    plain = make(folder)
    assert {"adapt", "generate", "filter", "evaluate/student"} <= changed(plain, taught)
    assert make(folder, generate__style="rationale").match("filter")[0].key != taught.match("filter")[0].key


def test_a_chain_is_more_steps_each_taught_by_the_one_before(folder: Path) -> None:
    plain = make(folder)
    plan = make(folder, chain=[{"ffn": 1344}, {"layers": 20}], student__layers=10, student__ffn=1024)
    names = {name for step in plan.steps for name in step.ids}
    assert {"shape/1", "heal/1", "score/1", "distill/1", "merge/1", "shape/2", "merge/2", "distill/3", "merge"} <= names
    assert "distill/2" in names and "distill/4" not in names
    key = {name: step.key for step in plan.steps for name in step.ids}
    stage = {name: step.stage for step in plan.steps for name in step.ids}
    shape = {name: stage[name] for name in ("shape/1", "shape/2", "shape")}
    assert [len(one.layers) for one in shape.values()] == [30, 20, 10]  # pyright: ignore[reportAttributeAccessIssue]
    assert max(shape["shape"].layers) == 19  # of the second link's 20  # pyright: ignore[reportAttributeAccessIssue]
    assert key["adapt"] in shape["shape/1"].inputs()
    assert key["merge/1"] in shape["shape/2"].inputs() and key["merge/2"] in shape["shape"].inputs()
    assert key["adapt"] in stage["score/1"].inputs() and key["merge/1"] in stage["score/2"].inputs()
    assert key["merge/2"] in stage["heal"].inputs()  # whose hidden states it is shown
    before = {name: step.key for step in plain.steps for name in step.ids}
    for name in ("adapt", "generate", "filter", "convert/teacher", "evaluate/teacher"):
        assert key[name] == before[name]


def test_a_wide_gap_is_told_and_a_chain_ends_in_its_own_student(folder: Path) -> None:
    small: dict[str, Any] = {"student__layers": 4, "student__ffn": 512, "student__vocabulary": 4096}
    assert any("of what teaches it: beyond 1/4" in one and "[[chain]]" in one for one in make(folder, **small).warnings)
    assert not any("of what teaches it" in one for one in make(folder).warnings)
    bridged = make(folder, **small, chain=[{"layers": 12, "vocabulary": 8192}, {"layers": 6, "ffn": 768}])
    assert not any("of what teaches it" in one for one in bridged.warnings)
    with pytest.raises(RecipeError, match=r"cut out of its last link"):
        make(folder, chain=[{"layers": 12}], student__model="pypi:other")
    with pytest.raises(RecipeError, match="before this link has 12 layers") as error:
        make(folder, chain=[{"layers": 12}, {"layers": 13}])
    assert error.value.key == "chain.1.layers"


def test_gold_sft_knows_nothing_of_what_is_written_on_policy(folder: Path) -> None:
    settings = {"score__kind": "dense", "distill__on_policy": 0.5}
    plan, plain = make(folder, **settings), make(folder, score__kind="dense")
    names = changed(plain, plan)
    assert "distill/1" in names and "distill/gold-sft" not in names
    assert changed(plain, make(folder, score__kind="dense", distill__on_policy_tokens=9)) == set()
    short = make(folder, **settings, distill__on_policy_tokens=9)
    assert "distill/1" in changed(plan, short)
    took = [one.match("distill/1")[0].work.amount for one in (plain, short, plan)]
    assert took == sorted(took) and took[0] < took[1] < took[2]  # writing takes time, the longer the more


def test_filters_that_came_later_change_no_key_until_they_are_used(folder: Path) -> None:
    plain = make(folder)
    table = {"kind": "reference", "metric": "json-exact", "otherwise": "gold"}
    at_default = {**table, "corrections": 0, "keep": 1, "by": "likelihood"}
    assert changed(plain, make(folder, filter=[at_default])) == set()
    corrected = make(folder, filter=[{**table, "corrections": 1}])
    assert {"filter", "distill/1"} <= changed(plain, corrected)
    # The objection to a wrong answer is text that a trimmed vocabulary has to spell.
    assert "shape" in changed(plain, corrected) and "adapt" not in changed(plain, corrected)
    drawn = {"generate__samples": 4, "generate__temperature": 0.8}
    names = changed(make(folder, **drawn), make(folder, **drawn, filter=[table, {"kind": "best", "keep": 2}]))
    assert "filter" in names and "generate" not in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": [{"kind": "best"}]}, "raise generate.samples"),
        ({"filter": [{"kind": "reference", "keep": 2}]}, r'filter\[0\]\.keep: this is for kind = "best"'),
        (
            {"filter": [{"kind": "thinking", "corrections": 1}], "generate__style": "think"},
            r'corrections: this is for kind = "reference"',
        ),
        (
            {"filter": [{"kind": "reference", "corrections": 1}], "generate__style": "tool-trace", "baselines": {}},
            "nothing executes tools",
        ),
        ({"generate__style": "verification", "distill__think_weight": 0.0}, "neither to go on after the answer nor"),
    ],
)
def test_what_says_nothing_about_sequences_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, **changes)


@pytest.mark.parametrize("style", ["explanation", "verification"])
def test_a_block_after_the_answer_keeps_no_device_waiting(folder: Path, style: str) -> None:
    plan = make(folder, generate__style=style)
    told = " ".join(plan.warnings)
    assert "no row of adapt.files has a" in told and "must allow the block" in told
    assert "tokens/s, and nothing bounds the thinking" not in told


def test_what_the_student_writes_has_no_weights_of_thinking(folder: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be told of what the student writes"):
        make(folder, score__kind="dense", distill__on_policy=0.5, distill__think_weight=0.0, generate__style="think")


def test_a_rationale_is_healed_as_two_tasks_and_asked_of_the_suites_alone(folder: Path) -> None:
    path = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rationale": "Because I say so."}) + "\n" for row in rows))
    plan = make(folder, generate__style="rationale")
    (heal,), (adapt,), (shape,) = (plan.match(name) for name in ("heal", "adapt", "shape"))
    healed = {row.id: row for row in heal.stage.rows}  # pyright: ignore[reportAttributeAccessIssue]
    assert healed["train-0000"].reference.startswith("{") and healed["train-0000+why"].reference == "Because I say so."
    assert adapt.stage.rows[0].reference.startswith("<think>")  # pyright: ignore[reportAttributeAccessIssue]
    asked = [row for row in shape.stage.taught if row.id.endswith("+why")]  # pyright: ignore[reportAttributeAccessIssue]
    assert asked and "Explain how" in asked[0].messages[-1]["content"]


def test_layers_by_importance_are_known_once_they_are_measured(folder: Path) -> None:
    plan = make(folder, student__layers=10, student__layers_by="importance")
    (shape,), (heal,) = plan.match("shape"), plan.match("heal")
    assert (shape.stage.keep, shape.stage.layers, heal.stage.layers) == (10, (), ())  # pyright: ignore[reportAttributeAccessIssue]
    assert shape.stage.rows  # pyright: ignore[reportAttributeAccessIssue]
    spaced = make(folder, student__layers=10)
    assert {"shape", "heal"} <= changed(plan, spaced)
    assert changed(spaced, make(folder, student__layers=10, student__layers_by="spacing")) == set()
    with pytest.raises(RecipeError, match="set layers to a count"):
        make(folder, student__layers_by="importance")


def test_the_temperature_of_the_loss_reruns_score_at_most(folder: Path) -> None:
    names = changed(make(folder), make(folder, distill__loss__temperature=1.5))
    assert "score" in names
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "shape", "heal"})
    fixed = changed(
        make(folder, score__temperature=1.0), make(folder, score__temperature=1.0, distill__loss__temperature=1.5)
    )
    assert "score" not in fixed and "distill/1" in fixed


def test_nothing_is_scored_for_a_loss_that_asks_for_no_distributions(folder: Path) -> None:
    text: dict[str, Any] = {"distill__loss__kd": 0.0, "distill__loss__ce": 1.0}
    plan = make(folder, **text)
    assert not any(step.stage.name == "score" for step in plan.steps)
    assert changed(plan, make(folder, **text, score__kind="none")) == set()
    ordered = make(folder, **text, distill__curriculum="confidence")  # by how sure the teacher is
    assert any(step.stage.name == "score" for step in ordered.steps)
    assert make(folder, student={"tokenizer": "other"}, **text, heal__hidden=0.0)


def test_a_dense_teacher_runs_beside_the_student_and_nothing_is_scored(folder: Path) -> None:
    plan = make(folder, score__kind="dense", distill__loss__divergence="reverse-kl")
    assert "score" not in {name for step in plan.steps for name in step.ids}
    (adapt,), (distill,), (gold,) = (plan.match(name) for name in ("adapt", "distill/1", "distill/gold-sft"))
    assert adapt.key in distill.stage.inputs() and adapt.key not in gold.stage.inputs()
    sampled = make(folder).match("distill/1")[0]
    assert adapt.key not in sampled.stage.inputs()
    assert distill.memory > sampled.memory and distill.work.amount > sampled.work.amount


def test_healing_on_references_waits_for_no_answer_and_its_weight_changes_nothing_before_it(folder: Path) -> None:
    plan = make(folder)
    (heal,) = plan.match("heal")
    adapted, shaped, answers = (plan.match(name)[0].key for name in ("adapt", "shape", "generate"))
    assert set(heal.stage.inputs()) == {shaped, adapted}
    assert "base/student" not in {name for step in plan.steps for name in step.ids}  # cut out of the adapted teacher
    assert answers not in heal.stage.inputs()
    names = changed(plan, make(folder, heal__hidden=40.0))
    assert {"heal", "distill/1", "distill/gold-sft"} <= names
    assert stages(names).isdisjoint({"base", "adapt", "generate", "filter", "score", "shape"})
    other = make(folder, heal__files=[], heal__rows=9, heal__hidden=0.0)
    (on_answers,), (cut_by_gold,) = other.match("heal"), other.match("shape")
    assert set(on_answers.stage.inputs()) == {cut_by_gold.key, plan.match("filter")[0].key}


def test_a_student_of_its_own_has_its_own_base(folder: Path) -> None:
    plan = make(folder, student__model="path:other")
    assert plan.match("base/student")
    assert plan.match("adapt")[0].key not in plan.match("shape")[0].stage.inputs()


def test_hidden_states_of_another_depth_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"heal\.hidden compares layers, and path:other has 24 of width 576") as found:
        make(folder, student={"layers": 24}, student__model="path:other", student__layers=10)
    assert found.value.key == "heal.hidden"


def test_the_grammar_is_for_the_runtime_that_reads_it(folder: Path) -> None:
    plan = make(folder)

    def grammars(target: str) -> list[bool]:
        stage: Any = plan.match(f"evaluate/{target}")[0].stage
        return [suite.grammar is not None for suite in stage.suites]

    assert grammars("phone-midrange") == [True, False, False]
    assert grammars("laptop-x86-onnx") == [False, False, False]


def test_a_targets_limits_remeasure_nothing(folder: Path) -> None:
    before = make(folder)
    local = folder / "targets"
    local.mkdir(exist_ok=True)
    profile = find_target("laptop-x86", folder)
    assert profile.path is not None
    text = profile.path.read_text().replace("[limits]", "[limits]\ntg128 = 3.5\n#", 1)
    lines = [line for n, line in enumerate(text.splitlines()) if not (line.startswith("tg128") and "3.5" not in line)]
    (local / "laptop-x86.toml").write_text("\n".join(lines))
    assert changed(before, make(folder)) == {"package/laptop-x86"}


def test_a_targets_type_reruns_its_own_four_steps_and_nothing_else(folder: Path) -> None:
    assert changed(make(folder), make(folder, student=None, **{"quantize__laptop-x86__type": "Q6_K"})) == {
        "quantize/laptop-x86", "evaluate/laptop-x86", "measure/laptop-x86", "package/laptop-x86",
    }  # fmt: skip


def test_two_targets_that_want_one_file_share_it(folder: Path) -> None:
    plan = make(
        folder,
        **{
            "quantize__laptop-x86__type": "IQ4_NL",
            "quantize__laptop-x86__imatrix": True,
            "quantize__laptop-x86__rounding": "gptq",
            "tune": {**TUNE, "targets": ["laptop-x86", "phone-midrange"]},
        },
    )
    shared = plan.match("quantize/laptop-x86")[0]
    assert shared.ids == ("quantize/phone-midrange", "quantize/laptop-x86")
    assert plan.match("tune/laptop-x86") == plan.match("tune/phone-midrange")
    assert plan.match("evaluate/laptop-x86") == plan.match("evaluate/phone-midrange")


def test_a_quantized_teacher_is_warned_of(folder: Path) -> None:
    assert any("Q4_1" in warning for warning in make(folder).warnings)


def test_rounding_back_to_the_grid_that_the_weights_came_from_is_warned_of(folder: Path) -> None:
    changed: dict[str, Any] = {"quantize__phone-midrange__type": "Q4_1"}
    (found,) = (one for one in make(folder, **changed).warnings if "puts them back" in one)
    assert found.startswith("phone-midrange: the student's weights came in Q4_1, and rounding to Q4_1 puts them back")
    assert not [one for one in make(folder).warnings if "puts them back" in one]


def make_inputs(folder: Path, **overrides: Any) -> Any:
    path = folder / "recipe.toml"
    recipe = load_recipe(path, {key.replace("__", "."): value for key, value in overrides.items()})
    facts = ModelFacts(**FACTS)
    model = Resolved(source="x", kind="pypi", revision="1", digest="d", path=path, facts=facts)
    return read_inputs(recipe, path, model, model, [])


def test_what_is_measured_lies_in_memory_beside_what_it_is_measured_against(folder: Path) -> None:
    plan = make(folder)

    def memory(name: str) -> int:
        return plan.match(name)[0].memory - (600 << 20)

    teacher = 2 * ModelFacts(**FACTS).params()
    assert memory("measure/teacher") == pytest.approx(teacher, rel=0.05)
    student = memory("measure/student")
    assert 0.5 * teacher < student < teacher
    # IQ4_NL has 4.7 bits of the student's 16
    assert memory("measure/phone-midrange") == pytest.approx(teacher + student * 4.7 / 16, rel=0.05)
    assert memory("measure/laptop-x86-onnx") == pytest.approx(teacher + student, rel=0.05)
