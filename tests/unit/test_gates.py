"""Gates: what is green, missed or unproved, of answers and figures written down here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.evals.suites import RowResult
from edgedistill.gates import Line, check_gates, miss_hint

QUIET: dict[str, Any] = {
    "ratio": {"tg": {"value": 3.2, "low": 3.1, "high": 3.3, "n": 8}, "noise": []},
    "measurement": {
        "pp": {"median": 300.0},
        "tg": {"median": 80.0},
        "ttft_ms": {"p95": 200.0},
        "peak_rss": 2**28,
        "noise": [],
    },
}


def answers(folder: Path, right: int, of: int) -> Path:
    common: dict[str, Any] = {"text": "", "reference": "", "valid": True, "tags": (), "tokens": 1, "finish": "stop"}
    rows = [RowResult(id=f"{i:03}", score=float(i < right), **common) for i in range(of)]
    lines = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
    (folder / "answers").mkdir(parents=True)
    (folder / "answers" / "holdout.jsonl").write_text(lines)
    return folder


def lines(tmp_path: Path, *, right: int = 95, measurement: Any = QUIET, **changes: Any) -> dict[str, Line]:
    """Check a student with ``right`` of 100 right answers, whose teacher has 100, at the f16 student's 96."""
    given: dict[str, Any] = {
        "gates": {},
        "limits": {},
        "size": 20,
        "reference_size": 100,
        "evaluation": answers(tmp_path / "student", right, 100),
        "teacher": answers(tmp_path / "teacher", 100, 100),
        "student": answers(tmp_path / "f16", 96, 100),
        "measurement": measurement,
        "unproved": "",
    }
    return {line.name: line for line in check_gates(**{**given, **changes}).lines}


def test_the_lower_bound_of_retention_counts_not_its_value(tmp_path: Path) -> None:
    line = lines(tmp_path, gates={"min_retention": {"holdout": 0.9}})["retention holdout"]
    assert (line.found, line.n) == (0.95, 100)
    assert line.low is not None and line.low < 0.9 < 0.95
    assert line.status == "missed"


@pytest.mark.parametrize(("bound", "status"), [(0.85, "green"), (0.93, "missed")])
def test_retention(tmp_path: Path, bound: float, status: str) -> None:
    assert lines(tmp_path, gates={"min_retention": {"holdout": bound}})["retention holdout"].status == status


def test_a_drop_is_against_the_full_precision_student(tmp_path: Path) -> None:
    line = lines(tmp_path, right=90, gates={"max_drop": {"holdout": 0.05}})["drop holdout"]
    assert line.found == pytest.approx(0.06) and line.status == "missed"
    assert not lines(tmp_path / "b", student=None, gates={"max_drop": {"holdout": 0.05}})


@pytest.mark.parametrize(("size", "status"), [(20, "green"), (21, "missed")])
def test_shrink_is_against_the_teachers_file(tmp_path: Path, size: int, status: str) -> None:
    assert lines(tmp_path, size=size, gates={"min_shrink": 5.0})["shrink"].status == status


def test_a_speed_up_that_was_not_measured_is_missed(tmp_path: Path) -> None:
    assert lines(tmp_path, gates={"min_speedup": 3.0})["speedup"].status == "green"
    line = lines(tmp_path / "b", gates={"min_speedup": 3.0}, measurement={})["speedup"]
    assert line.status == "missed" and "not measured" in line.text()


def test_limits_of_another_machine_are_never_green(tmp_path: Path) -> None:
    limits = {"file_size": 19, "peak_rss": 2**29, "pp512": 200.0, "tg128": 100.0, "ttft_p95_ms": 250.0}
    here = lines(tmp_path, limits=limits)
    assert {name: line.status for name, line in here.items()} == {
        "file_size": "missed",
        "peak_rss": "green",
        "pp512": "green",
        "tg128": "missed",
        "ttft_p95_ms": "green",
    }
    there = lines(tmp_path / "b", limits=limits, unproved="aarch64 here")
    assert there.pop("file_size").status == "missed"  # bytes are the same everywhere
    assert {line.status for line in there.values()} == {"unproved"}


HINTS = ("train longer", "fewer layers", "smaller type")


def test_a_speed_missed_on_a_noisy_machine_is_still_missed_and_says_what_to_do(tmp_path: Path) -> None:
    noisy = {**QUIET, "ratio": {"tg": {"value": 2.7, "low": 2.6, "high": 2.8, "n": 8}, "noise": ["tg varies by 9.0%"]}}
    line = lines(tmp_path, gates={"min_speedup": 3.0}, measurement=noisy)["speedup"]
    assert line.status == "missed" and "a noisy one: tg varies by 9.0%" in line.why
    assert "--remeasure" in miss_hint([line], noisy)
    assert "--remeasure" not in miss_hint([line], QUIET)
    accuracy = Line(name="retention holdout", bound=0.9, found=0.8, status="missed")
    assert "--remeasure" not in miss_hint([accuracy], noisy)
    size = Line(name="shrink", bound=5, found=4, status="missed")
    told = {word: {one.name for one in (line, accuracy, size) if word in miss_hint([one], QUIET)} for word in HINTS}
    assert told == {"train longer": {"retention holdout"}, "fewer layers": {"speedup"}, "smaller type": {"shrink"}}
    assert all(word in miss_hint([line, accuracy, size], QUIET) for word in HINTS)
