"""ROUGE-L against a table of the textbook, and what becomes of prompts that are written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.new_prompts import Nearest, Pool, common_words, last_said, rouge_l
from edgedistill.data.prompts import Row, load_rows, parse_row

WORDS = st.lists(st.sampled_from("abcde"), max_size=90)


def longest(one: list[str], other: list[str]) -> int:
    """The table of Wagner and Fischer, row by row."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for at, met in enumerate(other):
            row.append(before[at] + 1 if word == met else max(before[at + 1], row[at]))
    return row[-1]


@given(WORDS, WORDS)
def test_common_words_are_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    assert common_words(one, other) == longest(one, other)


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 3.1: "police killed the gunman" and "police kill the gunman" have 3 of 4 words in order.
    assert rouge_l("police killed the gunman", "Police kill the gunman.") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l("wake me at seven", "wake me at seven tomorrow please") == pytest.approx(2 * 4 / 10)
    assert rouge_l("", "x") == rouge_l("...", "...") == 0.0
    assert rouge_l("a b", "a b") == 1.0


@given(st.lists(WORDS, max_size=6), WORDS, st.floats(0.05, 1.0))
def test_the_nearest_is_found_as_by_comparing_all(known: list[list[str]], new: list[str], similarity: float) -> None:
    nearest = Nearest()
    for words in known:
        nearest.add(" ".join(words))
    shares = [
        (2 * longest(words, new), len(words) + len(new)) for words in known if words and new and longest(words, new)
    ]
    assert nearest.reaches(" ".join(new), similarity) == any(twice >= similarity * every for twice, every in shares)


def row(text: str, **more: object) -> Row:
    return parse_row({"id": "a", "prompt": text, **more}, "x:1")


def test_children_inherit_and_have_names_and_no_references() -> None:
    seed = parse_row(
        {
            "id": "a",
            "messages": [{"role": "system", "content": "You act."}, {"role": "user", "content": "wake me at seven"}],
            "reference": "{}",
            "tags": ["alarm"],
            "split": "train",
            "evolution": 2,
        },
        "x:1",
    )
    pool = Pool("edge-cases", [seed], {})
    first = pool.offer(seed, "wake me at zero", way="boundary")
    second = pool.offer(seed, "wake me at ten", evolution=3, guidance="Ask back.")
    assert first and second
    assert (first.id, second.id) == ("a+edge-cases1", "a+edge-cases2")
    assert first.messages == ({"role": "system", "content": "You act."}, {"role": "user", "content": "wake me at zero"})
    assert (first.reference, first.split, first.seed_id, first.evolution) == (None, "train", "a", 2)
    assert first.tags == ("alarm", "edge-cases", "edge-cases:boundary")
    assert (second.evolution, second.guidance) == (3, "Ask back.")
    again = pool.offer(first, "wake me at noon")
    assert again and again.seed_id == "a"  # the seed, not the row between
    alone = pool.offer(seed, "Explain alarms.", alone=True)
    assert alone and alone.messages == ({"role": "user", "content": "Explain alarms."},)


def test_what_is_there_or_in_a_suite_is_dropped_and_said() -> None:
    seed = row("set the alarm for seven")
    tested = [
        parse_row({"id": "h1", "prompt": "ring me up", "reference": "x"}, "x:1"),
        parse_row(
            {"id": "h2", "prompt": "please tell the kitchen timer to go off in twenty minutes", "reference": "x"}, "x:2"
        ),
    ]
    pool = Pool("paraphrase", [seed], {"holdout": tested})
    for text in (
        " ",
        "Set the  alarm for SEVEN",
        "Ring me up!",
        "Now please tell the kitchen timer to go off in twenty seconds",
    ):
        assert pool.offer(seed, text) is None
    assert [one["why"] for one in pool.dropped] == [
        "empty",
        "repeated",
        "contaminated: as in holdout h1",
        "contaminated: as in holdout h2",
    ]
    assert pool.reasons() == {"empty": 1, "repeated": 1, "contaminated": 2}
    assert {one["id"] for one in pool.dropped} == {"a"} and pool.children == []
    assert pool.offer(seed, "ring me at nine")
    assert pool.offer(seed, "Ring me at nine") is None  # its own, too


@given(
    st.builds(
        Row,
        id=st.text("abc+#1", min_size=1, max_size=5),
        messages=st.tuples(
            st.fixed_dictionaries({"role": st.just("user"), "content": st.text(min_size=1).filter(str.strip)})
        ),
        reference=st.none() | st.text(),
        tags=st.lists(st.text(), max_size=2).map(tuple),
        split=st.none() | st.just("train"),
        seed_id=st.none() | st.just("s"),
        evolution=st.none() | st.integers(0, 5),
        guidance=st.none() | st.just("Ask back."),
    )
)
def test_rows_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, seed: Row) -> None:
    file = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    file.write_text(Pool("x", [seed], {}).lines(), encoding="utf-8")
    assert load_rows(file) == [seed]


def test_only_a_users_words_are_written_anew() -> None:
    assert last_said(row("hello")) == "hello"
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "22"},
    ]
    assert last_said(parse_row({"messages": turns}, "x:1")) == ""
    assert json.loads(Pool("x", [row("é")], {}).lines())["messages"][0]["content"] == "é"
