"""reasoning-gym's problems and verdicts: right is what its verifier says, and no answer is ever run."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.data.prompts import load_rows, parse_row, rows_digest
from edgedistill.data.thinking import join
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import reasoning
from edgedistill.evals.metrics import find_metric
from edgedistill.evals.reasoning import SEEDS, TASKS, check_entry, credit, make_rows
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.stages.filter import Filter
from tests.unit.test_plan import make

ENTRY: dict[str, Any] = {"question": "1 + 999?", "answer": "1000", "metadata": {"source_dataset": "chain_sum"}}


@pytest.mark.reasoning
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_what_its_seed_makes_and_judges_without_running_an_answer(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(make_rows(task, 12, 7, {}))
    assert rows == list(make_rows(task, 12, 7, {})) != list(make_rows(task, 12, 8, {}))
    assert [row["id"] for row in rows] == [f"{task}-7-{n}" for n in range(12)]
    monkeypatch.chdir(tmp_path)
    hostile = (
        "__import__('pathlib').Path('ran').touch()",
        "open('ran', 'w')",
        "[open('ran','w')]",
        "{open('ran','w')}",
    )
    for row in map(lambda one: parse_row(one, "x:1"), rows):
        assert row.reasoning_gym is not None and row.reference is not None
        assert credit(f" {row.reference}\n", row.reasoning_gym) == 1.0
        for answer in (*hostile, "certainly not that", "", "9" * 5000, "(" * 3000, "\x00", "[[a,b]", "1e999", "nan"):
            assert credit(answer, row.reasoning_gym) != 1.0
    assert not list(tmp_path.iterdir())
    library: Any = reasoning._library()
    verifier = inspect.getsource(library.get_score_answer_fn(task))
    assert not re.search(r"\b(eval|exec|parse_expr|sympify|compile)\s*\(", verifier)


@pytest.mark.reasoning
def test_two_seeds_share_no_problems() -> None:
    one, other = ({row["prompt"] for row in make_rows("chain_sum", 40, seed, {"min_digits": 4})} for seed in (1, 2))
    assert len(one) == len(other) == 40 and not one & other
    assert list(make_rows("dice", 2, SEEDS - 1, {}))


@pytest.mark.reasoning
def test_the_verifier_decides_and_not_the_spelling() -> None:
    metric = find_metric("reasoning-gym")
    assert metric("1,000.0", "1000", ENTRY).value == 1.0
    wrong = metric("1001", "1000", ENTRY)
    with pytest.raises(UsageError, match="cannot judge a problem of number_format"):
        credit("12", {**ENTRY, "metadata": {"source_dataset": "number_format"}})
    assert wrong.value == 0.0 and wrong.details["credit"] < 1.0
    thinking = find_metric("think:reasoning-gym")
    assert thinking(join("think", "It is 1001? No.", "01000"), "1000", ENTRY).value == 1.0
    assert thinking(join("explanation", "999 and 1.", "1000"), "1000", ENTRY).value == 1.0
    spec = {"kind": "reference", "metric": "reasoning-gym", "otherwise": "drop"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=())
    assert stage.passes(spec, "1,000", "1000", ENTRY) and not stage.passes(spec, "10", "1000", ENTRY)


@pytest.mark.reasoning
def test_rows_are_made_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    command = ["data", "make", "chain_sum", "--rows", "4", "--seed", "3", "--set", "max_terms=2", "-o", str(path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = load_rows(path, need_reference=True)
    assert len(rows) == 4 and all(row.tags == ("chain_sum",) for row in rows)
    assert all(row.reasoning_gym and row.reasoning_gym["metadata"]["num_terms"] == 2 for row in rows)
    for arguments, message in (
        (["chain_summ"], "Did you mean 'chain_sum'"),
        (["countdown"], "never run an answer"),
        (["chain_sum", "--set", "max_term=2"], "refuses these settings of chain_sum"),
        (["chain_sum", "--set", "max_terms=1"], "refuses these settings of chain_sum"),
    ):
        told = CliRunner().invoke(app, ["data", "make", *arguments])
        assert isinstance(told.exception, UsageError)
        assert message in f"{told.exception.message} {told.exception.hint}"


def test_a_problem_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_entry(ENTRY) == "chain_sum"
    for entry in (None, {}, {"metadata": {}}, {"metadata": {"source_dataset": "chain_sum"}}, {**ENTRY, "answer": 3}):
        with pytest.raises(UsageError, match="must be what the library made"):
            check_entry(entry)
    with pytest.raises(UsageError, match="'countdown' is no task that is verified here"):
        check_entry({**ENTRY, "metadata": {"source_dataset": "countdown"}})
    with pytest.raises(UsageError, match="holds no problem") as error:
        find_metric("reasoning-gym")("1", "1")
    assert "data make" in (error.value.hint or "")
    with pytest.raises(UsageError, match="x:1: reasoning_gym is a text that is no JSON"):
        parse_row({"prompt": "x", "reasoning_gym": "chain_sum"}, "x:1")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning._verifier.cache_clear()
    with pytest.raises(UsageError, match="cannot be imported") as error:
        credit("1", ENTRY)
    assert error.value.hint == "pip install 'edgedistill[reasoning]'"


def test_a_problem_is_part_of_what_a_row_says() -> None:
    bare, made = (
        parse_row({"id": "a", "prompt": "1 + 999?", **more}, "x:1") for more in ({}, {"reasoning_gym": ENTRY})
    )
    assert rows_digest([bare]) != rows_digest([made])
    assert parse_row(made.to_json(), "x:1") == made


def test_plan_refuses_what_cannot_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    rows = [{"id": f"g{n}", "prompt": f"{n} + 999?", "reference": "1", "reasoning_gym": ENTRY} for n in range(12)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows[2]["reasoning_gym"]
    (folder / "bad.jsonl").write_text("".join(json.dumps({**row, "id": f"b{row['id']}"}) + "\n" for row in rows))

    def plan(name: str) -> Any:
        suites = {"sums": {"files": [name], "metric": "reasoning-gym"}}
        return make(folder, suites=suites, gates={}, teacher__min_score={})

    monkeypatch.setattr(reasoning, "installed", lambda: True)
    (step,) = plan("good.jsonl").match("evaluate/student")
    assert step.stage.fields()["suites"][0].metric == "reasoning-gym"
    with pytest.raises(RecipeError, match="row 'bg2': reasoning_gym must be") as error:
        plan("bad.jsonl")
    assert error.value.key == "suites.sums.metric"
    with pytest.raises(RecipeError, match=r"row '(drills|train)") as error:
        make(folder, filter=[{"kind": "reference", "metric": "reasoning-gym"}])
    assert error.value.key == "filter.0.metric"
    monkeypatch.setattr(reasoning, "installed", lambda: False)
    with pytest.raises(RecipeError, match="reasoning-gym is not installed") as error:
        plan("good.jsonl")
    assert error.value.hint == "pip install 'edgedistill[reasoning]'"
