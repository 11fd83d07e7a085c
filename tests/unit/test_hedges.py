"""``otherwise = "hedge"``: where no answer of the teacher passes, the student learns to say that it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgedistill.data.pairs import preference_pairs
from edgedistill.errors import RecipeError
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect
from edgedistill.report_sheets import details_sheet
from edgedistill.stages.filter import Filter
from edgedistill.stages.score import Score
from edgedistill.training.recipe import load_kept
from edgedistill.training.targets import read_targets
from tests.unit.formats.gguf.conftest import TEXT, make_model
from tests.unit.made_build import FUNCTIONS, make_session
from tests.unit.stages.test_filter import CALL, rows, run
from tests.unit.test_plan import changed, make

HEDGE = "I am not sure what you want."
SPEC = {"kind": "reference", "metric": "json-exact", "otherwise": "hedge", "hedge": HEDGE}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_a_prompt_that_the_teacher_fails_is_hedged(tmp_path: Path) -> None:
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(SPEC,), rows=rows("a", "b", "c"))
    facts, read = run(tmp_path, stage, [("a", CALL, "stop"), ("a", "{}", "stop"), ("b", "no", "stop")])
    # c has no answer at all: nobody knows whether the teacher would have failed it
    assert [(one["id"], one["text"], one["source"]) for one in read("kept.jsonl")] == [
        ("a", CALL, "teacher"),
        ("b", HEDGE, "hedge"),
    ]
    assert (facts["kept"], facts["teacher"], facts["gold"], facts["hedged"]) == (2, 1, 0, 1)
    pairs = preference_pairs(tmp_path / "out")
    assert [(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in pairs] == [
        (CALL, "{}"),
        (HEDGE, "no"),
    ]


def test_a_hedge_is_certain_in_the_targets_and_the_rest_is_the_teachers(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    lines = [
        {"id": str(at), "messages": [{"role": "user", "content": text}], "text": text[:20], "source": source}
        for at, (text, source) in enumerate(zip(TEXT, ("teacher", "hedge", "gold", "hedge"), strict=False))
    ]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    ctx: Any = SimpleNamespace(
        out=out, work=work, path=lambda _key, name: tmp_path / name, progress=lambda *_: None,
        entries={Key("a" * 64): SimpleNamespace(digest="d")},
    )  # fmt: skip
    Score(teacher=Key("a" * 64), kept=Key("b" * 64), kind="sampled", n=12, temperature=1.0, seed=0).run(ctx)
    examples, _ = load_kept(tmp_path / "kept.jsonl", model)
    found = read_targets((out / "targets").iterdir(), examples)
    for line, example, targets in zip(lines, examples, found, strict=True):
        for temperature in (1.0, 1.3):
            p = targets.probabilities(temperature)
            sure = targets.ids.tolist() == list(example.completion_ids) and bool(np.all(p == 1.0))
            assert sure == (line["source"] == "hedge"), (line, temperature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": [{**SPEC, "hedge": None}]}, "set both"),
        ({"filter": [{**SPEC, "otherwise": "gold"}]}, "set both"),
        ({"filter": [SPEC], "score__kind": "top-k"}, "the teacher does not hedge"),
        ({"filter": [SPEC], "generate__style": "think"}, "a hedge is a whole answer"),
        ({"filter": [SPEC, {"kind": "reference", "otherwise": "gold"}]}, "gold, or one hedge"),
        ({"filter": [SPEC, {**SPEC, "hedge": "Pardon?"}]}, "gold, or one hedge"),
    ],
)
def test_what_cannot_be_hedged_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(folder, **changes)


def test_a_hedge_asks_the_teacher_nothing_anew(folder: Path) -> None:
    names = changed(make(folder), make(folder, filter=[SPEC]))
    assert {"filter", "score", "distill/1"} <= names
    assert "shape" in names  # a trimmed vocabulary has to spell the hedge
    assert names.isdisjoint({"generate", "adapt", "evaluate/teacher"})


def test_the_report_tells_how_much_is_hedged_and_how_right_the_rest_is(tmp_path: Path) -> None:
    hedge = json.dumps({"name": FUNCTIONS[0], "arguments": {"n": -1}})  # what made answers say where they are wrong
    session = make_session(tmp_path, filter=[{**SPEC, "hedge": hedge}])
    data = collect(session)
    student = data.model("student")
    assert student is not None
    line = student.suites["holdout"]
    assert line.hedged and line.answered and line.score and line.score.n and line.hedged.n == line.score.n
    assert line.answered.n == round(line.score.n * (1 - line.hedged.value)) < line.score.n
    assert line.answered.value == pytest.approx(line.score.value / (1 - line.hedged.value))
    sheet = details_sheet(data)
    assert {"hedged", "right where answered"} <= set(sheet.columns)
    assert "hedged" not in details_sheet(collect(make_session(tmp_path / "plain"))).columns
