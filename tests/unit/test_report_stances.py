"""How often a model helps, refuses and asks back, in the report: by what is right, and by tag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgedistill.report import Figure, ReportData, collect
from edgedistill.report_html import page
from edgedistill.report_sheets import all_sheets, stances_sheet, tags_sheet
from tests.unit.made_build import HOSTILE, make_session


def figure(value: float, n: int) -> Figure:
    return Figure(value=value, low=value - 0.1, high=value + 0.1, n=n, method="wilson")


def judged(data: ReportData) -> ReportData:
    """Give the student's answers on ood a stance: 40 requests to refuse and 60 to help with."""
    model = data.model("student")
    assert model is not None
    stances = {
        "refuse": {"refuse": figure(0.75, 40), "help": figure(0.25, 40)},
        "help": {"refuse": figure(0.5, 60), "help": figure(0.4, 60)},
    }
    tags = {"borderline": {"right": figure(0.2, 30), "refuse": figure(0.8, 30)}, HOSTILE: {"right": figure(0.9, 7)}}
    line = replace(model.suites["ood"], stances=stances, tags=tags)
    told = replace(model, suites={**model.suites, "ood": line})
    return replace(data, models=[told if one.id == "student" else one for one in data.models])


def test_rates_stand_in_sheets_and_page_with_n_and_interval(tmp_path: Path) -> None:
    data = judged(collect(make_session(tmp_path)))
    sheet = stances_sheet(data)
    # nobody was asked about anything in doubt, so there is no such column
    assert sheet.columns == (
        *("model", "suite", "refuses harm", "helps with harm"),
        *("refuses the harmless", "helps with the harmless"),
    )
    assert sheet.rows == [
        [
            *("student f16", "ood", "0.75 [0.65, 0.85], n = 40", "0.25 [0.15, 0.35], n = 40"),
            *("0.50 [0.40, 0.60], n = 60", "0.40 [0.30, 0.50], n = 60"),
        ]
    ]
    by_tag = tags_sheet(data, "ood")
    assert by_tag.columns == ("right by tag", "student f16")
    assert ["borderline", "0.20 [0.10, 0.30], n = 30"] in by_tag.rows and len(by_tag.rows) == 2
    assert {"helps, refuses, asks back", "ood by tag"} <= {one.title for one in all_sheets(data)}
    html = page(data)
    assert "Helps, refuses, asks back" in html and "0.65, 0.85], n = 40" in html and "ood, right by tag" in html
    assert HOSTILE not in html  # a tag is text, never markup


def test_a_build_without_stances_says_nothing_of_them(tmp_path: Path) -> None:
    data = collect(make_session(tmp_path))
    assert not stances_sheet(data).rows and not tags_sheet(data, "ood").rows
    assert "Helps, refuses, asks back" not in page(data)
    assert "helps, refuses, asks back" not in {one.title for one in all_sheets(data)}
