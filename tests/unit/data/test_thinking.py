from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.data.thinking import AFTER, BLOCKS, asking_why, join, share_of_empty, split, two_tasks, with_block

plain = st.text(st.characters(blacklist_characters="<>", blacklist_categories=["Cs"]), max_size=40)


@given(st.sampled_from(sorted(BLOCKS)), plain, plain)
def test_what_is_joined_comes_apart_again(style: str, thinking: str, answer: str) -> None:
    text = join(style, thinking, answer)
    found = split(text)
    assert found.thinking == thinking.strip()
    if style in AFTER:
        assert found.answer == answer.rstrip() == text[: found.start] and found.end == len(text)
        assert found.after == bool(found.answer)
    else:
        assert found.answer == answer.lstrip() == text[found.end :] and found.start == 0
        assert not found.after
    assert found.words >= len(thinking.split())


@given(plain)
def test_a_text_without_a_block_is_all_answer(text: str) -> None:
    assert split(text) == (None, text, 0, 0)
    assert split(text).empty


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("  <think>\nfirst this, then that\n</think>\n\n42", "first this, then that", "42"),
        ("first this, then that</think>42", "first this, then that", "42"),  # the template opened it in the prompt
        ("<think>it never ends", "it never ends", ""),
        ("<think></think>42", "", "42"),
        ("<plan>one two three</plan>{}", "one two three", "{}"),
        ("42 <think>too late", None, "42 <think>too late"),
        ("42\n\n<why>\nfirst this, then that\n</why>", "first this, then that", "42"),
        ("42 <check>6 times 7 is", "6 times 7 is", "42"),  # cut short: the answer stands before it
        ("<why>no answer</why>", "no answer", ""),
        ("", None, ""),
    ],
)
def test_the_forms_that_models_write(text: str, thinking: str | None, answer: str) -> None:
    assert split(text)[:2] == (thinking, answer)


def test_gold_rows_get_their_rationale_as_a_block() -> None:
    message = {"role": "user", "content": "2 + 2 * 3?"}
    row = Row(id="a", messages=(message,), reference="8", rationale="2 * 3 is 6, and 2 more are 8.")
    bare = Row(id="b", messages=(message,), reference="8")
    thinking, same = with_block([row, bare], "think")
    assert thinking.reference == "<think>\n2 * 3 is 6, and 2 more are 8.\n</think>\n\n8"
    assert thinking.rationale is None
    assert same == bare
    assert with_block([row], "answer") == (row,)
    (planned,) = with_block([row], "plan")
    assert (planned.reference or "").startswith("<plan>")
    (checked,) = with_block([row], "verification")
    assert checked.reference == "8\n\n<check>\n2 * 3 is 6, and 2 more are 8.\n</check>"


def test_words_are_counted_in_scripts_without_spaces_too() -> None:
    assert split("<think>38 plus 17 is 55.</think>55").words == 5
    assert split("<think>先算三十八加十七</think>55").words == 8
    assert split("<think>OK 好</think>1").words == 2


def test_a_row_with_a_rationale_is_two_tasks() -> None:
    message = {"role": "user", "content": "2 + 2 * 3?"}
    row = Row(id="a", messages=(message,), reference="8", rationale="2 * 3 is 6.")
    answer, why = two_tasks([row])
    assert (answer.id, answer.reference, answer.messages) == ("a", "8", (message,))
    assert (why.id, why.reference) == ("a+why", "2 * 3 is 6.")
    assert why.messages[-1]["content"] != message["content"]
    bare = Row(id="b", messages=(message,), reference="8")
    assert two_tasks([bare]) == (bare,)


def test_the_request_for_a_rationale_joins_the_last_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    asked = asking_why(messages)
    assert asked[0] == messages[0]
    assert asked[1]["content"] == "2 + 2?\n\nExplain how to get to the answer."
    assert messages[1]["content"] == "2 + 2?"


def test_the_share_of_empty_blocks() -> None:
    texts = ["<think>a good long thought</think>1", "<think></think>1", "1", "<think>well, ok</think>1"]
    assert share_of_empty(texts) == 0.75
    assert share_of_empty([]) == 0.0
