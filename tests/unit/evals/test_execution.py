"""An answer's code is found, run with the row's tests, and judged by them alone; rows without tests are told of in time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.prompts import Row, load_rows, parse_row, rows_digest
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import execution
from edgedistill.evals.execution import code_of
from edgedistill.evals.metrics import find_metric
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_thinking import ThinkingFilter
from tests.unit.test_plan import make

TESTS = "assert add(2, 3) == 5"
GOOD, BAD = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
HANGS, PROBLEM = "while True: pass\n", {"tests": TESTS}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure!\n```python\nx = 1\n```\nThat is it.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nold\n```\nBetter:\n```Python title=a\nnew\n```\n```\nIt prints 3\n```", "new\n"),
        ("```bash\npip install x\n```\n~~~\nx = 1\n~~~", "x = 1\n"),
        ("```json\n{}\n```", ""),
        ("```python\nx = 1", "x = 1"),  # cut, or the end was forgotten
        ('````python\nx = """\n```\n"""\n````', 'x = """\n```\n"""\n'),
        ("1. So:\n   ```python\nx = '```'\n   ```", "x = '```'\n"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer: str, code: str) -> None:
    assert code_of(answer) == code


@pytest.mark.sandbox
def test_code_is_judged_by_the_rows_tests() -> None:
    metric = find_metric("execution")
    cases = [GOOD, f"So:\n```python\n{GOOD}```", BAD, "no code here!", "```json\n{}\n```", "import os; os._exit(0)"]
    scores = metric.score_all(("row", (answer, "a reference", PROBLEM)) for answer in cases)
    assert [score.value for score in scores] == [1, 1, 0, 0, 0, 0]
    why = [score.details.get("why") for score in scores]
    assert why == [None, None, "AssertionError", "SyntaxError", "no code", "ended before its tests"]
    assert execution.verdict(HANGS, TESTS, timeout=0.5) == "timed out"
    assert execution.verdict("x = bytearray(200 << 20)", "", memory=100) == "memory"
    thinking = find_metric("think:execution")
    assert thinking(f"<think>\nBAD = ```\n</think>\n{GOOD}", "", PROBLEM).value == 1
    assert thinking(f"<think>\n{GOOD}</think>\n{BAD}", "", PROBLEM).value == 0
    with pytest.raises(UsageError, match="the row has no tests") as error:
        metric(GOOD, "", None)
    assert '"tests": "assert' in error.value.hint


def test_tests_are_a_field_of_a_row(tmp_path: Path) -> None:
    bare, tested = (parse_row({"id": "a", "prompt": "Add.", **more}, "x:1") for more in ({}, {"tests": TESTS}))
    assert (bare.tests, bare.problem, tested.tests, tested.problem) == (None, None, TESTS, PROBLEM)
    assert "tests" not in bare.to_json()
    assert parse_row(tested.to_json(), "x:1") == tested
    assert rows_digest([bare]) != rows_digest([tested])
    both = parse_row({"prompt": "x", "tests": TESTS, "reasoning_gym": {"answer": "1"}}, "x:1")
    assert both.problem == {"answer": "1", "tests": TESTS}
    with pytest.raises(UsageError, match="x:1: tests must be a string, not a list"):
        parse_row({"prompt": "x", "tests": [TESTS]}, "x:1")
    with pytest.raises(UsageError, match="x:1: unknown field 'test'"):
        parse_row({"prompt": "x", "test": TESTS}, "x:1")
    file = tmp_path / "rows.jsonl"
    for wrong, message in (
        ({}, r"rows\.jsonl:2: row 'b' has no tests"),
        ({"tests": " "}, r"rows\.jsonl:2: row 'b' has no tests"),
        (
            {"tests": "x = 1\nassert add(2, 3 == 5"},
            r"rows\.jsonl:2: the tests of row 'b' are no Python: .*, line 2 of it",
        ),
        ({"tests": "return 1"}, r"rows\.jsonl:2: the tests of row 'b' are no Python: 'return' outside function"),
        ({"tests": "x\0"}, r"rows\.jsonl:2: the tests of row 'b' are no Python"),
    ):
        lines = [{"id": "a", "prompt": "x", "tests": TESTS}, {"id": "b", "prompt": "x", **wrong}]
        file.write_text("".join(json.dumps(one) + "\n" for one in lines))
        with pytest.raises(UsageError, match=message):
            load_rows(file, need_tests=True)
        assert len(load_rows(file)) == 2  # only where they are run


@pytest.mark.sandbox
@pytest.mark.parametrize("style", ["answer", "think"])
def test_a_filter_runs_the_answers(tmp_path: Path, style: str) -> None:
    block = "<think>\nAdd them, of course.\n</think>\n" if style == "think" else ""
    texts = {"a": [GOOD, BAD, GOOD], "b": [HANGS, "import nowhere"], "c": [f"```python\n{GOOD}```"]}
    answers = [
        {"id": row, "text": block + text, "finish": "stop", "row": f"{row}{n}", "logprob": 0.0}
        for row, found in texts.items()
        for n, text in enumerate(found)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    rows = tuple(parse_row({"id": row, "prompt": row, "tests": TESTS, "reference": GOOD}, "x:1") for row in texts)
    seen: list[tuple[int, int]] = []
    ctx: Any = SimpleNamespace(
        path=lambda key, name: tmp_path / name,
        out=tmp_path,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    fields: dict[str, Any] = {
        "answers": Key("a" * 64),
        "rows_digest": "",
        "filters": ({"kind": "execution", "otherwise": "gold", "timeout": 1.0},),
        "rows": rows,
    }
    stage = ThinkingFilter(**fields, style=style) if style == "think" else Filter(**fields)
    facts = stage.run(ctx)
    assert facts["yields"][1] == {"filter": "execution", "in": 6, "out": 3}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(one["row"], one["why"]) for one in rejected] == [
        ("a1", "execution: AssertionError"),
        ("b0", "execution: timed out"),
        ("b1", "execution: ModuleNotFoundError"),
    ]
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    told = [(one["id"], one["source"]) for one in kept]
    assert told == [("a", "teacher"), ("a#1", "teacher"), ("b", "gold"), ("c", "teacher")]
    assert seen == [(n, 5) for n in range(1, 6)]  # the same text of a row runs once


@pytest.mark.sandbox
def test_plan_wants_tests_and_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    rows: list[dict[str, Any]] = [
        {"id": f"t{n}", "prompt": f"Write add, {n}.", "reference": GOOD, "tests": TESTS} for n in range(12)
    ]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows[2]["tests"]
    (folder / "bad.jsonl").write_text("".join(json.dumps({**row, "id": f"b{row['id']}"}) + "\n" for row in rows))

    def plan(name: str, **more: Any) -> Any:
        suites = {"code": {"files": [name], "metric": "execution"}}
        return make(folder, suites=suites, gates={}, teacher__min_score={}, **more)

    (step,) = plan("good.jsonl").match("evaluate/student")
    assert step.stage.fields()["suites"][0].metric == "execution"
    with pytest.raises(UsageError, match=r"bad\.jsonl:3: row 'bt2' has no tests"):
        plan("bad.jsonl")
    with pytest.raises(UsageError, match=r"train\.jsonl:1: row '.*' has no tests"):
        make(folder, filter=[{"kind": "execution"}])
    with pytest.raises(RecipeError, match=r'timeout: this is for kind = "execution"'):
        make(folder, filter=[{"kind": "pii", "timeout": 3.0}])

    def key(**more: Any) -> str:
        told: dict[str, Any] = {"prompts": {"files": ["good.jsonl"]}, "filter": [{"kind": "execution", **more}]}
        return make(folder, **told).match("filter")[0].key

    assert key() == key(timeout=10.0, memory=512)
    assert len({key(), key(timeout=3.0), key(memory=100)}) == 3

    def nothing() -> str:
        raise UsageError("no sandbox works here", "apt install bubblewrap")

    monkeypatch.setattr("edgedistill.refusals.find_engine", nothing)
    with pytest.raises(RecipeError, match=r"suites\.code\.metric: no sandbox works here") as error:
        plan("good.jsonl")
    assert error.value.hint == "apt install bubblewrap"


def test_a_row_tells_its_tests_only_where_it_has_some() -> None:
    row = Row(id="a", messages=({"role": "user", "content": "x"},))
    assert row.to_json() == {"id": "a", "messages": [{"role": "user", "content": "x"}]}
