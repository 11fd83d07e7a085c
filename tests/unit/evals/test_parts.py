"""Answers in parts: a suite that was cut off goes on, and ends as it would have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.evals.parts import MOST, TOKENS, answer_in_parts, cut
from edgedistill.evals.runners.base import Answer

BUDGET = TOKENS // 4  # parts of four rows
ROWS = [Row(id=f"r{at}", messages=({"role": "user", "content": str(at)},)) for at in range(10)]


class Counting:
    """Answers with how many rows it was given at once, so that other parts would show; dies before its ``left`` + 1st part."""

    def __init__(self, left: int = 99) -> None:
        self.left, self.asked, self.told = left, list[str](), list[tuple[str, str | None]]()

    def answer(
        self, rows: Sequence[Row], *, max_new_tokens: int, grammar: Any = None, progress: Any = None
    ) -> list[Answer]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [row.id for row in rows]
        if progress:
            progress(len(rows), len(rows), "answers")
        return [
            Answer(
                id=row.id, text=f"\ud83d {len(rows)} {grammar}", token_ids=(len(rows), at), seconds=0.25, finish="stop"
            )
            for at, row in enumerate(rows)
        ]

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: Any = None
    ) -> None:
        assert max_new_tokens == BUDGET and [one.id for one in answers] == [row.id for row in rows]
        self.told += [(row.id, grammar) for row in rows]


def run(runner: Any, kept: Path | None, **more: Any) -> list[Answer]:
    return answer_in_parts(runner, ROWS, max_new_tokens=BUDGET, kept=kept, **more)


@given(st.integers(0, 5000), st.integers(1, 200_000))
def test_every_row_is_in_one_part_and_no_part_is_too_long(count: int, budget: int) -> None:
    rows = [ROWS[0]] * count
    parts = cut(rows, budget)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == count and (not sizes or max(sizes) - min(sizes) <= 1 <= min(sizes))
    assert all(size <= MOST and (size == 1 or size * budget <= TOKENS) for size in sizes)


def test_one_that_was_cut_off_goes_on_and_ends_as_it_would_have(tmp_path: Path) -> None:
    whole = run(Counting(), None)
    assert [one.id for one in whole] == [row.id for row in ROWS] and {one.token_ids[0] for one in whole} == {3, 4}
    for after in (1, 2):
        kept = tmp_path / str(after) / "suite"
        kept.parent.mkdir()
        with pytest.raises(KeyboardInterrupt):
            run(Counting(left=after), kept)
        second, seen = Counting(), list[tuple[int, int]]()
        assert run(second, kept, progress=lambda done, total, note, seen=seen: seen.append((done, total))) == whole
        assert [name for name, _ in second.told] + second.asked == [row.id for row in ROWS] and second.told
        assert seen[0][0] > len(second.told) and seen[-1] == (10, 10)
        third = Counting(left=0)
        assert run(third, kept) == whole


def test_under_a_grammar_they_are_others(tmp_path: Path) -> None:
    free = run(Counting(), tmp_path / "suite")
    bound = run(Counting(), tmp_path / "suite.grammar", grammar="root ::= [a]")
    assert free != bound == run(Counting(left=0), tmp_path / "suite.grammar", grammar="root ::= [a]")


@pytest.mark.parametrize("broken", ["", "{", "[]\n", '{"id": "r0"}\n', "null\n"])
def test_a_part_that_cannot_be_read_is_answered_again(tmp_path: Path, broken: str) -> None:
    whole = run(Counting(), tmp_path / "suite")
    part = sorted(tmp_path.iterdir())[1]
    part.write_text(broken)
    again = Counting()
    assert run(again, tmp_path / "suite") == whole
    assert again.asked == ["r3", "r4", "r5"]
