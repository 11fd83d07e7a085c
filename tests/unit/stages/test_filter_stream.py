"""The filter in little memory: what it writes is what it wrote when all answers were in memory, and memory stays where it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill.data.answers import Answers, Places, evenly
from edgedistill.data.grades import GradeTable
from edgedistill.data.prompts import Row
from edgedistill.stages.filter_rounds import RoundFilter, ThinkingRoundFilter
from tests.unit.stages.made_answers import made, outcome

RECORDED = json.loads(Path(__file__).with_name("recorded_filter.json").read_text())
"""Digests of what the filter of commit 360d299 wrote and told, which held all answers in memory."""


@pytest.mark.parametrize("tens", range(15))
def test_files_and_figures_are_those_that_were_recorded(tens: int, tmp_path: Path) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        stage, ctx = made(seed, tmp_path / str(seed), (RoundFilter, ThinkingRoundFilter))
        found = json.dumps(outcome(stage, ctx), sort_keys=True, ensure_ascii=False)
        assert hashlib.sha256(found.encode()).hexdigest()[:16] == RECORDED[str(seed)], (seed, found)


@pytest.mark.parametrize(
    ("duplicates", "most", "characters", "counts"),
    [
        (0, 110, 800, (1000, 3000)),
        (1, 300, 100, (1000, 3000)),
        pytest.param(1, 250, 600, (4000, 12_000), marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_answers_text(
    duplicates: int, most: int, characters: int, counts: tuple[int, int], tmp_path: Path
) -> None:
    peaks = []
    for count in counts:
        command = [sys.executable, "-m", "tests.unit.stages.filter_peak", *map(str, (count, characters, duplicates))]
        (tmp_path / str(count)).mkdir()
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path / str(count), check=True, env=_environment()
        )
        peaks.append(json.loads(run.stdout))
    small, large = peaks
    each = (large["peak"] - small["peak"]) / (large["answers"] - small["answers"])
    assert large["kept"] > 0.5 * large["answers"]
    assert each < most, (small, large)


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _write(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_are_found_by_prompt_in_the_files_order_and_an_answer_anew_replaces_those_before(
    tmp_path: Path,
) -> None:
    rows = [Row(id=name, messages=()) for name in "abc"]
    first = _write(tmp_path / "1", [{"id": name, "n": n} for n, name in enumerate("bacab")])
    more = _write(tmp_path / "2", [{"id": "b", "n": 5}, {"id": "c", "n": 6}])
    anew = _write(tmp_path / "3", [{"id": "c", "n": 7}, {"id": "c", "n": 8}])
    last = tmp_path / "4"
    last.write_text('{"id": "c", "n": 9}')  # without an end of line
    with Answers(rows) as answers:
        answers.add(first)
        answers.add(more, "beta")
        assert [[one["n"] for one in answers.of(name)] for name in "abc"] == [[1, 3], [0, 4, 5], [2, 6]]
        assert answers.of("b")[-1] == {"id": "b", "n": 5, "by": "beta"} and not answers.anew("c")
        answers.add(anew, "delta", anew=True)
        assert [one["n"] for one in answers.of("c")] == [7, 8] and answers.anew("c") and not answers.anew("a")
        answers.add(last, "omega", anew=True)
        assert [one["n"] for one in answers.of("c")] == [9]
        assert [one["n"] for one in answers] == list(range(10)) and len(answers) == 10
    with Answers(rows) as answers, pytest.raises(KeyError, match="d"):
        answers.add(_write(tmp_path / "5", [{"id": "d"}]))
    with Answers(rows) as answers:
        assert answers.of("a") == []


def test_places_of_keys() -> None:
    keys = [f"key {at}" for at in range(1000)]
    places = Places(keys)
    assert [places.get(key) for key in keys] == list(range(1000))
    assert places.get("another") is None and "key 7" in places and "" not in places
    assert Places(["a", "b", "a"]).get("a") == 2 and Places([]).get("a") is None


def test_grades_of_several_files(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", [{"row": "a", "grade": 1.5}, {"row": "b", "grade": None}])
    two = _write(tmp_path / "2", [{"row": "c", "grade": 3}, {"row": "a", "grade": 2.5}])
    table = GradeTable([one, two])
    assert [table[name] for name in "abc"] == [2.5, None, 3.0]
    with pytest.raises(KeyError, match="d"):
        table["d"]


@pytest.mark.parametrize(("share", "count"), [(0.0, 5), (1.0, 5), (0.5, 5), (0.34, 7), (0.5, 0), (0.9, 11)])
def test_a_share_of_lines_is_spaced_evenly(share: float, count: int) -> None:
    wanted = round(share * count)
    lines = [str(at) for at in range(count)]
    assert list(evenly(lines, share, count)) == [lines[at * count // wanted] for at in range(wanted)]
