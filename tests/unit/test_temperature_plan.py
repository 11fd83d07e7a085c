"""A fitted temperature in the plan and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import EdgeDistillError
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect, write_html
from edgedistill.report_sheets import temper_sheet
from tests.tuned import TUNE
from tests.unit.made_build import make_session
from tests.unit.test_plan import changed, make

WHOLE = {"student.ffn": None, "student.vocabulary": None}  # a family that cannot be cut is refused for that first
FILES = {"files": ["data/train.jsonl"], "skip": 1200, "rows": 200}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def test_all_that_is_made_of_the_student_is_made_of_the_tempered_one(folder: Path) -> None:
    plain, plan = make(folder, tune=TUNE), make(folder, tune=TUNE, temperature=FILES)
    temper, merge = (next(step for step in plan.steps if name in step.ids) for name in ("temper", "merge"))
    assert temper.stage.inputs() == (merge.key,)
    for name in ("convert/student", "quantize/laptop-x86-onnx", "tune/phone-midrange"):
        assert temper.key in plan.match(name)[0].stage.inputs()
    names = changed(plain, plan)
    assert "temper" in names and "package/phone-midrange" in names
    kept = {
        "merge",
        "distill/1",
        "heal",
        "distill/gold-sft",
        "evaluate/gold-sft",
        "evaluate/teacher",
        "convert/teacher",
    }
    assert names.isdisjoint(kept)
    assert changed(plan, make(folder, temperature={**FILES, "rows": 201})) >= {"temper", "convert/student"}


@pytest.mark.parametrize(
    ("section", "student", "message"),
    [
        ({"files": ["data/train.jsonl"], "rows": 200}, {}, "200 of 200 rows of .temperature. are taught before"),
        (FILES, {"architecture": "gpt2"}, "cannot be folded into the final norm of gpt2"),
        ({"files": ["data/holdout.jsonl"]}, {}, "stands in the training rows and in the suite"),
        ({**FILES, "rows": [1, 2]}, {}, r"temperature\.rows has 2 counts for 1 files"),
        ({**FILES, "skip": [1, 2]}, {}, r"temperature\.skip has 2 counts for 1 files"),
        ({**FILES, "skip": 99999}, {}, r"temperature\.skip leaves out 99999 rows"),
    ],
)
def test_what_cannot_work_is_refused(
    folder: Path, section: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgeDistillError, match=message):
        make(folder, student=student, temperature=section, tune=None, **WHOLE)


def test_the_report_says_how_sure_the_student_is(tmp_path: Path) -> None:
    data = collect(make_session(tmp_path, temperature=FILES))
    sheet = temper_sheet(data)
    assert [row[0] for row in sheet.rows] == ["before", "after"]
    assert sheet.rows[0][1:] == [
        "0.0410 [0.0350, 0.0470]",
        "0.0120 [0.0060, 0.0180]",
        "0.0100 [0.0040, 0.0160]",
        "2400",
        "100",
    ]
    assert sheet.notes[0].startswith("T = 1.300, fitted on 100 other rows and folded into the final norm")
    write_html(data, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "One temperature" in html and "folded into the final norm" in html
    assert temper_sheet(collect(make_session(tmp_path / "plain"))).rows == []
