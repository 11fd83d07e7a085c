"""Metrics by number, by mathematics, by SQuAD's rules, and functions of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.errors import RecipeError, StepFailed, UsageError
from edgedistill.evals import mathematics
from edgedistill.evals.metrics import find_metric
from edgedistill.evals.own_metric import keyed_name
from edgedistill.fingerprint import Key
from edgedistill.recipe import Recipe
from edgedistill.recipes import copy_recipe
from edgedistill.stages.filter import Filter
from edgedistill.toml_source import schema
from tests.unit.test_plan import changed, make, stages

# By hand, after the four steps of SQuAD's evaluation: lower case, no punctuation, no articles, single spaces.
SAME = [
    ("The Denver Broncos!", "denver broncos"),
    ("a  cat", "Cat."),
    ("U.S.", "us"),
    ("it\u2019s", "its"),
    ("The", "The"),
]
OTHER = [("Denver", "Denver Broncos"), ("theatre", "atre"), ("", "a"), ("an", "a"), ("12", "1.3")]


@pytest.mark.parametrize(("answer", "reference", "value"), [(*p, 1.0) for p in SAME] + [(*p, 0.0) for p in OTHER])
def test_normalised_leaves_out_what_squad_does(answer: str, reference: str, value: float) -> None:
    assert find_metric("normalised")(answer, reference).value == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("1,234,567 people", 1234567),
        ("First 7, then 1,234.50 dollars", 1234.5),
        ("So x = -3", -3),
        ("5 - 3", 3),
        ("about 3/4 of it", 0.75),
        (r"\frac{3}{4}", 0.75),
        ("12.5 %", 0.125),
        ("$1{,}000$", 1000),
        ("6.02e23", 6.02e23),
        (".5", 0.5),
        ("\u22128", -8),
        ("none", None),
        ("version v2", None),
        ("1/0", None),
        ("9" * 400, None),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: float | None) -> None:
    found = mathematics.last_number(text)
    assert (None if found is None else found.value) == (number if number is None else pytest.approx(number))


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It costs $1,000.", "1000", True),
        ("#### 18", "He pays 9 * 2 = 18", True),
        ("0.33333333", "1/3", True),
        ("0.3333", "1/3", False),
        ("1000000008", "1000000007", False),
        ("50", "50%", True),
        ("0.5", "50 %", True),
        ("0.5 %", "50 %", False),
        ("42 or 43", "42", False),
        ("no idea", "42", False),
    ],
)
def test_numeric_compares_what_they_come_to(answer: str, reference: str, right: bool) -> None:
    assert find_metric("numeric")(answer, reference).value == float(right)
    assert find_metric("think:numeric")(join("think", "Is it 7?", answer), reference).value == float(right)


@pytest.mark.parametrize(
    ("metric", "reference", "why"),
    [
        ("numeric", "two", "numeric: the reference has no number"),
        ("json-exact", "{two}", "json-exact: the reference is not JSON"),
        ("tool-calls", "<tool_call>{two}</tool_call>", "tool-calls: a call of the reference cannot be read"),
        ("stance", "?!", "stance: the reference has no word"),
    ],
)
def test_a_reference_that_its_metric_cannot_read_is_told_before_the_teacher_is_asked(
    tmp_path: Path, metric: str, reference: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        find_metric(metric)("1", reference)
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    row = {"id": "w", "prompt": "one plus one?", "reference": reference}
    (folder / "words.jsonl").write_text("\n" + json.dumps(row) + "\n")
    suites = {"sums": {"files": ["words.jsonl"], "metric": metric}}
    with pytest.raises(RecipeError, match=rf"suites\.sums\.metric: .*words\.jsonl:2: row 'w': {why}"):
        make(folder, suites=suites, gates={}, teacher__min_score={})
    kept = {
        "filter": [{"kind": "reference", "metric": metric}],
        "prompts__files": ["words.jsonl"],
        "prompts__rows": None,
    }
    with pytest.raises(RecipeError, match=rf"filter\.0\.metric: .*words\.jsonl:2: row 'w': {why}"):
        make(folder, **kept)


def test_a_reference_is_read_after_its_block_and_a_row_without_one_is_the_filters(tmp_path: Path) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    rows = [
        {"id": "t", "prompt": "one plus one?", "rationale": "one and one", "reference": '{"sum": 2}'},
        {"id": "none", "prompt": "two plus two?"},
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes: dict[str, Any] = {"prompts__files": ["sums.jsonl"], "prompts__rows": None, "baselines__gold_sft": False}
    changes |= {
        "generate__style": "think",
        "filter": [{"kind": "reference", "metric": "json-exact", "missing": "pass"}],
    }
    assert make(folder, **changes)


@pytest.mark.reasoning
@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"So the answer is \boxed{\frac{2}{4}}.", r"\frac{1}{2}", True),
        ("$x^2 + 2x + 1$", "$(x+1)^2$", True),
        (r"$\{1, 2\}$", r"\{2, 1\}", True),
        (r"$\sqrt{8}$", r"2\sqrt{2}", True),
        ("It is 0.5", "0.5", True),
        ("It is 1,000", "1000", True),
        ("$3$", "4", False),
        ("It is 3", "$x = 3$", False),
        ("who knows", "4", False),
        ("$9^{9^{9^{9}}}$", "4", False),
        ("2 * (3 ** 2)", "18", False),  # plain text is not run, by nobody
    ],
)
def test_mathematics_is_compared_and_never_run(answer: str, reference: str, right: bool) -> None:
    assert find_metric("math-verify")(answer, reference).value == float(right)


@pytest.mark.reasoning
def test_hostile_mathematics_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("open('ran','w')", "__import__('pathlib').Path('ran').touch()"):
        for shown in (text, f"${text}$", rf"\boxed{{{text}}}", f"$$1+{text}$$"):
            assert find_metric("math-verify")(shown, "4").value == 0.0
    assert not list(tmp_path.iterdir())


def test_mathematics_without_the_library_is_refused_in_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "installed", lambda: False)
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    with pytest.raises(RecipeError, match="math-verify is not installed") as error:
        make(folder, filter=[{"kind": "reference", "metric": "math-verify"}])
    assert (error.value.key, error.value.hint) == ("filter.0.metric", "pip install 'edgedistill[reasoning]'")


CHECKS = """
import helper

def same(answer, reference):
    return answer.lower() == reference.lower()

def part(answer: str, reference: str = "", *, much=False) -> float:
    return len(set(answer) & set(reference)) / len(set(reference))

def wrong(answer, reference):
    return "yes"

def broken(answer, reference):
    return 1 / len(answer)

def one(answer): ...

async def later(answer, reference): ...

bound = helper.same
"""


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "helper.py").write_text("def same(a, b): return True\n")
    return tmp_path


def test_a_function_of_ones_own_decides(checks: Path) -> None:
    for name, value in (("same", 1.0), ("bound", 1.0)):
        assert find_metric(keyed_name(f"python:checks.py:{name}", checks), checks)("YES", "yes").value == value
    part = find_metric("think:" + keyed_name("python:checks.py:part", checks), checks)
    assert part(join("think", "So b, then.", "a"), "ab").value == 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", r"row 'r': checks\.py: wrong\(\) gave 'yes', and not a number from 0 to 1"),
        ("broken", r"row 'r': checks\.py: broken\(\) raised ZeroDivisionError in line 14: division by zero"),
    ],
)
def test_what_it_does_wrong_is_told_with_file_function_and_row(
    checks: Path, tmp_path: Path, function: str, message: str
) -> None:
    metric = keyed_name(f"python:checks.py:{function}", checks)
    row = Row(id="r", messages=({"role": "user", "content": "?"},), reference="yes")
    line = {"id": "r", "row": "k", "sample": 0, "text": "", "finish": "stop", "logprob": -1.0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "sample": 1}) + "\n")
    (tmp_path / "out").mkdir()
    ctx: Any = SimpleNamespace(progress=lambda *_: None, out=tmp_path / "out", path=lambda _key, name: tmp_path / name)
    spec = {"kind": "reference", "metric": metric, "otherwise": "drop"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=(row,), folder=checks)
    with pytest.raises(StepFailed, match=message):
        stage.run(ctx)


def test_a_file_that_changed_since_the_plan_is_not_run(checks: Path) -> None:
    name = keyed_name("python:checks.py:part", checks)
    (checks / "checks.py").write_text("def part(answer, reference): return 1\n")
    with pytest.raises(StepFailed, match="has changed since the build was planned"):
        find_metric(name, checks)("a", "b")


def test_plan_runs_nothing_of_it_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")

    def plan(function: str, file: str = "checks.py") -> Any:
        return make(folder, filter=[{"kind": "reference", "metric": f"python:{file}:{function}"}])

    (folder / "checks.py").write_text(CHECKS + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    before = plan("same")
    assert not (tmp_path / "ran").exists()
    for function, message in (
        ("sane", "there is no function 'sane'"),
        ("one", "does not take that"),
        ("later", "later is async"),
    ):
        with pytest.raises(RecipeError, match=message) as error:
            plan(function)
        assert error.value.key == "filter.0.metric"
    with pytest.raises(RecipeError, match=r"other\.py: No such file"):
        plan("same", "other.py")
    with pytest.raises(RecipeError, match=r'expected "json-exact".*did you mean "numeric"'):
        make(folder, filter=[{"kind": "reference", "metric": "numerik"}])
    with pytest.raises(RecipeError, match="names no function"):
        make(folder, filter=[{"kind": "reference", "metric": "python:checks.py"}])
    (folder / "checks.py").write_text(CHECKS.replace("lower", "upper"))
    assert "filter" in stages(changed(before, plan("same"))) and "generate" not in stages(changed(before, plan("same")))
    (folder / "checks.py").write_text("def same(answer, reference:\n")
    with pytest.raises(RecipeError, match=r"checks\.py:1: no Python"):
        plan("same")


def test_an_editor_knows_the_names() -> None:
    found = schema(Recipe)["$defs"]["Suite"]["properties"]["metric"]["anyOf"]
    assert {"numeric", "normalised", "math-verify", "perplexity"} <= set(found[0]["enum"])
    assert found[1]["pattern"].startswith("^python:")
