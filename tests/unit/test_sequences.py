"""Sequences of which little is in memory say what lists would."""

from __future__ import annotations

import gc
import json
import tracemalloc
from array import array
from pathlib import Path

import pytest

from edgedistill.jsonl import Lines
from edgedistill.rows import Answered, Question, Questions, RowStore
from edgedistill.sequences import Aside, Made


def question(at: int) -> Question:
    return Question(teacher="t", messages=(("user", f"Question {at}" * 20),), sampling=(("top_p", 1.0),), seed=0)


def test_what_is_made_is_as_a_list_of_it() -> None:
    made, plain = Made(array("I", [3, 1, 4, 1, 5]), lambda at: f"<{at}>"), ["<3>", "<1>", "<4>", "<1>", "<5>"]
    assert list(made) == plain and len(made) == 5 and made[-1] == "<5>" and list(made[1:3]) == plain[1:3]
    assert made.index("<1>") == 1 and list(Made(range(0), str)) == []
    with pytest.raises(IndexError):
        made[5]


def test_bytes_that_are_put_aside_come_back(tmp_path: Path) -> None:
    aside, kept = Aside(tmp_path), [b"one", b"", bytes(100_000), b"four"]
    for raw in kept:
        aside.add(raw)
    assert [aside[at] for at in range(len(aside))] == kept
    assert not list(tmp_path.iterdir())  # it has no name, and goes with the process
    with pytest.raises(IndexError):
        aside[4]


def test_lines_by_their_numbers(tmp_path: Path) -> None:
    values = [{"a": "x\u2028y"}, [1, 2], "é\r", None]
    (tmp_path / "f").write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in values), newline="\n")
    found = Lines(tmp_path / "f")
    assert list(found) == values and found[2] == "é\r"


def test_a_question_is_made_again_with_its_key_and_little_of_it_stays() -> None:
    tracemalloc.start()
    questions = Questions(Made(range(2000), question))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 60 * len(questions)
    assert questions[7] == question(7) and questions.key(7) == questions[7].key == question(7).key
    some = questions.some(array("I", [5, 9]))
    assert list(some) == [question(5), question(9)] and list(some.keys()) == [questions.key(5), questions.key(9)]


def test_what_is_missing_is_told_once_in_the_order_in_which_it_was_asked(tmp_path: Path) -> None:
    store, keys = RowStore(tmp_path), [question(at).key for at in range(700)]
    twice = [*reversed(keys), *keys]
    assert list(store.missing(twice)) == list(range(700))
    answers = ((question(at), Answered(key=keys[at], text="", token_ids=(), finish="stop", logprob=0)) for at in (0, 3))
    store.add(answers)
    assert [twice[at] for at in store.missing(twice)] == [
        key for key in reversed(keys) if key not in (keys[0], keys[3])
    ]
    assert list(store.missing([])) == [] and list(store.missing(iter(keys[:5]))) == [1, 2, 4]
