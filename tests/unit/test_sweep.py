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


def swept_rows(factory: pytest.TempPathFactory, *shares: tuple[dict[str, Any], float]) -> list[str]:
    """Return the learning curve of builds with so many rows, whose phone gets such a share right."""
    points = []
    with pytest.MonkeyPatch.context() as patch:
        for values, share in shares:
            patch.setitem(FIGURES, PHONE, (share, share, *FIGURES[PHONE][2:]))
            changes = {key.replace(".", "__"): value for key, value in values.items()}
            points.append(Point(values=values, session=make_session(factory.mktemp("rows"), **changes)))
    return [told for told in learning_curve(read(points)) if told.startswith(PHONE)]


def test_the_last_step_decides_by_its_interval(tmp_path_factory: pytest.TempPathFactory) -> None:
    key = "prompts.rows"
    level = swept_rows(tmp_path_factory, ({key: 150}, 0.95), ({key: 25}, 0.60), ({key: 100}, 0.94))
    assert [told.rpartition(": ")[2] for told in level] == ["undecided"] * 2  # one count is of each of two files
    assert level[0].startswith(f"{PHONE}: the step from 200 to 300 rows brought") and f"n = {ROWS}" in level[0]
    assert {"on holdout", "on ood"} == {f"on {told.split(' on ')[1].split(',')[0]}" for told in level}
    worse = swept_rows(tmp_path_factory, ({key: 25}, 0.95), ({key: 100}, 0.60))
    assert all(told.endswith("more would not") for told in worse)


def test_rows_that_are_not_there_are_not_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    key = "prompts.rows"
    most = swept_rows(tmp_path_factory, ({key: 100}, 0.60), ({key: 10**6}, 0.94), ({key: 10**7}, 0.94))
    assert all("from 200 to" in told and "0000" not in told and told.endswith("likely help") for told in most)


def test_each_combination_of_other_keys_has_its_curve(tmp_path_factory: pytest.TempPathFactory) -> None:
    def at(rows: int, rank: int) -> dict[str, Any]:
        return {"distill.lora.rank": rank, "prompts.rows": rows}

    curves = swept_rows(
        tmp_path_factory, (at(25, 8), 0.60), (at(100, 8), 0.94), (at(25, 16), 0.94), (at(100, 16), 0.95)
    )
    assert [(told.split(")")[0] + ")", told.rpartition(": ")[2]) for told in curves if "on holdout" in told] == [
        (f"{PHONE} (distill.lora.rank = 8)", "more would likely help"),
        (f"{PHONE} (distill.lora.rank = 16)", "undecided"),
    ]


def test_other_sweeps_have_no_learning_curve(lines: list[Line]) -> None:
    assert learning_curve(lines) == [] == learning_curve([])


def test_a_point_without_its_artifact_has_no_line(tmp_path: Path) -> None:
    session = make_session(tmp_path, keep=lambda name: not name.startswith("evaluate/"))
    assert read([Point(values={"distill.lr": 1e-4}, session=session)]) == []
