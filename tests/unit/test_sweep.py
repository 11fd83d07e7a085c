"""A sweep's combinations, its lines and its verdicts, over made builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill import tables
from edgedistill.errors import UsageError
from edgedistill.sweep import Line, Point, combinations, learning_curve, parse_all_over, parse_over, read, sheet
from tests.unit.made_build import FIGURES, ROWS, make_session

PHONE = "phone-midrange"


def test_every_combination_once_the_last_key_fastest() -> None:
    found = combinations({"distill.lr": [1e-4, 2e-4], "distill.lora.rank": (8, 16)})
    assert [tuple(one.values()) for one in found] == [(1e-4, 8), (1e-4, 16), (2e-4, 8), (2e-4, 16)]
    assert list(found[0]) == ["distill.lr", "distill.lora.rank"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "nothing to sweep over"),
        ({"distill.lr": []}, "no values"),
        ({"a": range(9), "b": range(9)}, "81 combinations, at most 64"),
    ],
)
def test_what_is_no_sweep_is_refused(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combinations(sweep)


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("distill.lora.rank=8,16", "distill.lora.rank", [8, 16]),
        ("distill.lr=1e-4,2e-4", "distill.lr", [1e-4, 2e-4]),
        ("score.kind=sampled,dense", "score.kind", ["sampled", "dense"]),
        ("heal.rows=[100, 200],[300, 400]", "heal.rows", [[100, 200], [300, 400]]),
        ('score.kind="sampled"', "score.kind", ["sampled"]),
    ],
)
def test_over_is_a_key_and_its_values(text: str, key: str, values: list[Any]) -> None:
    assert parse_over(text) == (key, values)


def test_a_key_is_swept_once() -> None:
    assert parse_all_over(["a=1,2", "b=3"]) == {"a": [1, 2], "b": [3]}
    with pytest.raises(UsageError, match="--over a is given twice"):
        parse_all_over(["a=1", "a=2"])


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Three builds whose phone gets 0.94 right, then 0.70 at the same size and speed, then 0.94 with other answers."""
    points = []
    with pytest.MonkeyPatch.context() as patch:
        for rank, share in ((8, 0.94), (16, 0.70), (32, 0.94)):
            patch.setitem(FIGURES, PHONE, (share, *FIGURES[PHONE][1:]))
            folder = tmp_path_factory.mktemp(f"rank-{rank}")
            session = make_session(folder, distill__lora__rank=rank)
            points.append(Point(values={"distill.lora.rank": rank}, session=session))
    return read(points)


def test_lines_are_paired_with_the_first_and_judged_by_the_interval(lines: list[Line]) -> None:
    of_phone = [line for line in lines if line.target == PHONE]
    assert [line.point.values["distill.lora.rank"] for line in of_phone] == [8, 16, 32]
    first, worse, alike = of_phone
    assert first.difference is None and first.verdict == ""
    assert worse.difference is not None and worse.difference.n == ROWS
    assert worse.verdict == "hurt" and worse.difference.high < 0
    assert alike.verdict == "undecided"
    assert first.best and not worse.best


def test_the_table_and_its_json(lines: list[Line], capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(sheet(lines))
    text = capsys.readouterr().out
    assert "distill.lora.rank" in text and "hurt" in text and f"n = {ROWS} rows" in text
    assert len({line.target for line in lines}) == 3 and PHONE in text
    data = json.loads(json.dumps([line.to_json() for line in lines]))
    assert {one["verdict"] for one in data} >= {"", "hurt"}
    assert all(one["scores"]["holdout"]["n"] == ROWS for one in data)


def test_a_sweep_over_rows_says_whether_more_would_help(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = []
    for rows, share in (([50, 50], 0.60), ([150, 250], 0.94)):
        monkeypatch.setitem(FIGURES, PHONE, (share, *FIGURES[PHONE][1:]))
        session = make_session(tmp_path_factory.mktemp("rows"), prompts__rows=rows)
        points.append(Point(values={"prompts.rows": rows}, session=session))
    (first, *_) = learning_curve(read(points))
    assert first.startswith(f"{PHONE}: the step from 100 to 400 rows brought +0.") and "more would likely help" in first


def test_other_sweeps_have_no_learning_curve(lines: list[Line]) -> None:
    assert learning_curve(lines) == [] == learning_curve([])


def test_a_point_without_its_artifact_has_no_line(tmp_path: Path) -> None:
    session = make_session(tmp_path, keep=lambda name: not name.startswith("evaluate/"))
    assert read([Point(values={"distill.lr": 1e-4}, session=session)]) == []
