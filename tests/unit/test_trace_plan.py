"""A recipe of traces: its rows by turn, what is refused, and what the teacher is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.asked import asked, conversation
from edgedistill.errors import RecipeError
from edgedistill.evals.runners.base import Answer
from edgedistill.evals.suites import WHOLE_TRACES, evaluate
from edgedistill.inputs import read_inputs
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import load_recipe
from edgedistill.refusals import refuse
from edgedistill.rows import Question
from edgedistill.target import find_target
from tests.unit.test_chat import folder as model_folder
from tests.unit.test_plan import FACTS
from tests.unit.tool_template import CALL, TEMPLATE, TOOL, trace

STYLE = {
    "generate.style": "tool-trace",
    "baselines": {},
    "suites": {},
    "teacher.min_score": {},
    "gates": {},
    "tune": None,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from edgedistill.recipes import copy_recipe

    path = copy_recipe("quickstart", tmp_path / "quickstart")
    (path / "traces.jsonl").write_text("".join(json.dumps(trace(f"t{n}")) + "\n" for n in range(12)))
    (path / "suite.jsonl").write_text("".join(json.dumps(trace(f"s{n}")) + "\n" for n in range(3)))
    return path / "recipe.toml"


def inputs(path: Path, template: str = TEMPLATE, **overrides: Any) -> Any:
    files = {f"{name}.files": ["traces.jsonl"] for name in ("adapt", "heal", "prompts")}
    rows = {f"{name}.rows": None for name in ("adapt", "heal", "prompts")}
    suite = {"suites": {"calls": {"files": ["suite.jsonl"], "metric": "tool-calls"}}}
    table = {**STYLE, **files, **rows, **suite, "filter.0.metric": "tool-calls"}
    found = load_recipe(path, table | {key.replace("__", "."): value for key, value in overrides.items()})
    target = path.parent / f"model{len(list(path.parent.glob('model*')))}"
    there = model_folder(target, template)
    model = Resolved(source="path:m", kind="path", revision="1", digest="d", path=there.path, facts=ModelFacts(**FACTS))
    targets = [find_target("laptop-x86", path.parent)]
    return read_inputs(found, path, model, model, targets)


def test_rows_are_turns_everywhere(recipe: Path) -> None:
    found = inputs(recipe)
    for rows in (found.prompts, found.gold, found.healing):
        assert [row.id for row in rows[:3]] == ["t0/1", "t0/2", "t1/1"] and len(rows) == 24
    assert [row.id for row in found.suites["calls"]] == [f"s{n}/{turn}" for n in range(3) for turn in (1, 2)]
    assert {row.reference for row in found.prompts} == {CALL, "Yes, take an umbrella."}
    told = " ".join(refuse(found))
    assert "rows have tools: time to first token is measured without" in told and '"answer" does the same' not in told
    assert [row.id for row in inputs(recipe, prompts__rows=2).prompts] == ["t0/1", "t0/2", "t1/1", "t1/2"]


def test_traces_of_one_turn_get_a_word(recipe: Path) -> None:
    rows = [{"id": f"o{n}", "prompt": f"wake me at {n}", "reference": "{}"} for n in range(12)]
    (recipe.parent / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any('"answer" does the same' in line for line in refuse(inputs(recipe, prompts__files=["one.jsonl"])))


def test_what_is_not_defined_for_traces_is_refused(recipe: Path) -> None:
    for changes, message in (
        ({"distill.on_policy": 0.5, "score.kind": "dense"}, "nothing executes"),
        ({"distill.loss.divergence": "uld", "score.kind": "dense"}, "a trace has several"),
        ({"baselines": {"few_shot": 2}}, r"baselines\.few_shot puts single answers"),
        ({"distill.think_weight": 2.0}, "think_weight needs"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, {**STYLE, **changes})


def test_calls_that_no_template_writes_are_refused_by_key(recipe: Path) -> None:
    from tests.unit.formats.gguf.conftest import TEMPLATE as PLAIN

    with pytest.raises(RecipeError, match="row 't0': the chat template does not write tool_calls") as error:
        inputs(recipe, PLAIN)
    assert error.value.key == "prompts.files"
    record = trace("t0")
    record["messages"][1] = {"role": "assistant", "content": CALL}
    (recipe.parent / "traces.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({**record, "id": "t0/1"}) + "\n")
    with pytest.raises(RecipeError, match=r"row 't0/1' has tools|has tools, and the chat template"):
        refuse(inputs(recipe, PLAIN, suites={}))


def test_a_question_holds_the_tools_and_what_a_message_says_beside_its_text(recipe: Path) -> None:
    row = inputs(recipe).prompts[1]
    messages, tools = conversation(asked(row))
    assert messages == list(row.messages) and tools == [TOOL]
    assert messages[2] == {"role": "tool", "content": "rain, 6 degrees", "tool_call_id": "c1"}


def test_a_question_without_tools_is_the_one_that_was_stored_before() -> None:
    from edgedistill.data.prompts import parse_row

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    row = parse_row({"id": "a", "messages": messages}, "x:1")
    assert asked(row) == (("system", "s"), ("user", "hi"))
    sampling = (("style", "answer"), ("temperature", 0.0))
    question = Question(teacher="t", messages=asked(row), sampling=sampling, seed=0)
    assert question.key == "c1b3914276297647146d5f49d608faceacc10271c52f76501476b0c900c9b62b"
    assert conversation(asked(row)) == (messages, [])


class Replayed:
    """A runner that makes every call, and calls once more in the last turn of the first trace."""

    def describe(self) -> dict[str, Any]:
        return {}

    def answer(self, rows: Any, **_: Any) -> list[Answer]:
        texts = {row.id: CALL if row.id.endswith("/1") or row.id == "s0/2" else "It will." for row in rows}
        return [Answer(id=r.id, text=texts[r.id], token_ids=(1,), seconds=0.0, finish="stop") for r in rows]


def test_calls_are_scored_by_turn_and_by_whole_trace(recipe: Path) -> None:
    result = evaluate(Replayed(), inputs(recipe).suites["calls"], "tool-calls")  # pyright: ignore[reportArgumentType]
    assert (result.score.value, result.n) == (pytest.approx(5 / 6), 6)
    assert result.by_tag["turn 1"].value == 1.0 and result.by_tag["turn 2"].value == pytest.approx(2 / 3)
    whole = result.by_tag[WHOLE_TRACES]
    assert (whole.value, whole.n) == (pytest.approx(2 / 3), 3)
    assert result.by_function["weather"].n == 3
