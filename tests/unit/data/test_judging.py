"""Verdicts are read strictly, and places of answers cancel out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgedistill.data.grades import GradeTable, histogram, judged, read_grades, told, write_grades
from edgedistill.data.judging import grades, result_of, score_of, to_judge
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Good.\nScore: 4", 4),
        ("Good.\n\n**Score: 4/5**\n", 4),
        ("score : 1.", 1),
        ('{"reason": "good", "score": 3}', 3),
        ('```json\n{"score": 3}\n```', 3),
        (join("think", "Score: 1", "Score: 5"), 5),
        ("Score: 4\nBut then again, no.", None),
        ("Score: 6", None),
        ("Score: 45", None),
        ("Score: 4 or 5", None),
        ("The score is 4", None),
        ('{"score": "4"}', None),
        ('{"score": true}', None),
        ("", None),
        ("<think>Score: 5", None),
    ],
)
def test_a_score_stands_in_the_last_line_or_is_none(verdict: str, score: int | None) -> None:
    assert score_of(verdict) == score


@pytest.mark.parametrize(
    ("verdict", "first", "second"),
    [
        ("Winner: 1", 1.0, 0.0),
        ("So.\n**Winner: Answer 2**", 0.0, 1.0),
        ("Winner: tie", 0.5, 0.5),
        ('{"winner": 2}', 0.0, 1.0),
        ("Winner: 3", None, None),
        ("I like both.", None, None),
    ],
)
def test_a_winner_is_told_by_its_place(verdict: str, first: float | None, second: float | None) -> None:
    assert (result_of(verdict, "1"), result_of(verdict, "2")) == (first, second)


def test_both_orders_are_asked_and_the_worse_result_counts() -> None:
    row = Row(id="r", messages=({"role": "user", "content": "Say ha."},), reference=join("think", "So.", "ha"))
    answers = [
        {"id": "r", "row": "k", "text": join("think", "Hm.", "ho"), "finish": "stop"},
        {"id": "r", "row": "cut", "text": "h", "finish": "length"},
    ]
    one, other = to_judge([row], answers, "Is it right?", against=True)
    assert (one.id, other.id) == ("k/1", "k/2")
    texts = [str(asked.messages[0]["content"]) for asked in (one, other)]
    assert all("[user]\nSay ha." in text and "Is it right?" in text and "Hm." not in text for text in texts)
    assert [text.index("\nho\n") < text.index("\nha\n") for text in texts] == [True, False]

    def grade(first: str, second: str) -> float | None:
        return grades(answers, {"k/1": first, "k/2": second}, against=True)["k"]

    assert grade("Winner: 1", "Winner: 2") == 1.0
    assert grade("Winner: 1", "Winner: tie") == 0.5
    assert grade("Winner: 1", "Winner: 1") == grade("Winner: 2", "Winner: 1") == 0.0  # the place wins, or the reference
    assert grade("Winner: 1", "?") is None
    (alone,) = to_judge([row], answers, "Is it right?")
    assert alone.id == "k" and "Hm." in str(alone.messages[0]["content"])  # a rubric may ask about the block


def test_rows_of_one_prompt_are_compared_each_with_its_own_reference(tmp_path: Path) -> None:
    """The row store has one answer to both."""
    asked = ({"role": "user", "content": "Say ha or ho."},)
    rows = [Row(id=name, messages=asked, reference=name) for name in ("ha", "ho")]
    rows += [Row(id="hi", messages=({"role": "user", "content": "Say hi."},), reference="hi")]
    answers = [
        {"id": name, "row": "k" if name != "hi" else "j", "text": "ha", "finish": "stop"} for name in ("ha", "ho", "hi")
    ]
    questions = to_judge(rows, answers, "Is it right?", against=True)
    assert len({one.id for one in questions}) == len(questions) == 6
    assert [one.id for one in questions[4:]] == ["j/1", "j/2"]  # as ever where one row asks so

    def says(text: str) -> str:
        first, second = re.findall(r"<answer>\n(.*)\n</answer>", text)
        return "Winner: tie" if first == second else "Winner: 2"

    verdicts = {one.id: says(str(one.messages[0]["content"])) for one in questions}
    found = grades(answers, verdicts, against=True)
    write_grades(tmp_path / "grades.jsonl", found)
    spec = {"kind": "judge", "against": "reference"}
    for table in (found, GradeTable([tmp_path / "grades.jsonl"])):
        assert [judged(spec, table, [one])[0][1] for one in answers] == ["", *["judge: loses to the reference"] * 2]
    before = {"k": 1.0, "j": 1.0}  # an entry of before, of rows that no other is like
    assert judged(spec, before, [answers[0]])[0][1] == ""


def test_grades_are_kept_and_told(tmp_path: Path) -> None:
    found = {"b": 2.0, "a": None, "c": 1.0, "d": 9.5}
    write_grades(tmp_path / "grades.jsonl", found)
    assert read_grades(tmp_path / "grades.jsonl") == found
    with (tmp_path / "grades.jsonl").open("a") as file:
        file.write('{"row": "e", "gra')  # killed while it was written
    assert read_grades(tmp_path / "grades.jsonl", partial=True) == found
    spread = told(found)
    assert (spread["n"], spread["none"], spread["min"], spread["max"]) == (3, 1, 1.0, 9.5)
    assert spread["quantiles"]["0.5"] == 2.0
    assert histogram(found) == {"1": 1, "2": 1, "9.5": 1, "none": 1}


def test_the_best_that_differ_stay_and_the_first_of_equals() -> None:
    found = [{"row": str(at), "text": text} for at, text in enumerate("xyyzz")]
    marks = dict(zip("01234", (1.0, 3.0, 3.0, 2.0, None), strict=True))
    spec = {"kind": "reward", "keep": 2, "min": 1.5}
    assert [why for _, why in judged(spec, marks, found)] == [
        "reward: 1 under 1.5",
        "",
        "reward: not among the best 2",
        "",
        "reward: longer than the model's context",
    ]
