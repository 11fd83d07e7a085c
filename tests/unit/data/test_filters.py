"""What makes an answer not worth learning from, beside being wrong."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.filters import (
    PERMUTATIONS,
    Contamination,
    Seen,
    agreeing,
    band_rows,
    domains,
    malformed,
    personal,
    refuses,
    schema_validator,
    supports,
)
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.errors import UsageError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["set_alarm", "call"]}, "arguments": {"type": "object"}},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "form", "why"),
    [
        ("hello", {"min_chars": 5, "max_chars": 5}, ""),
        ("  hi \n", {"min_chars": 3}, "under 3 characters"),
        ("hello there", {"max_chars": 5}, "over 5 characters"),
        ("the answer is 42.", {"pattern": r"\d+\.$"}, ""),
        ("the answer is unknown.", {"pattern": r"\d+\.$"}, "does not have the pattern"),
    ],
)
def test_form(text: str, form: dict[str, object], why: str) -> None:
    assert malformed(text, **form) == why  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"name": "call", "arguments": {}}', ""),
        ('{"name": "call", "arguments": {}', "no JSON"),
        ('{"name": "dance", "arguments": {}}', "not by the schema at name: enum"),
        ('{"name": "call"}', "not by the schema: required"),
        ("[]", "not by the schema: type"),
    ],
)
def test_an_answer_is_valid_under_the_schema(text: str, why: str) -> None:
    assert malformed(text, validator=schema_validator(SCHEMA)) == why


def test_what_is_no_schema_is_refused() -> None:
    with pytest.raises(UsageError, match="no JSON Schema"):
        schema_validator({"type": "objekt"})
    for wrong in ("#/$defs/x", "https://example.com/schema.json"):
        with pytest.raises(UsageError, match="leads nowhere"):
            schema_validator({"$ref": wrong})
    assert schema_validator({"$ref": "#/$defs/x", "$defs": {"x": {"type": "array"}}})("[" * 5000) == "no JSON"


REFUSED = (
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I cannot assist with this request.",  # noqa: RUF001
    "Sorry, I can't do that.",
    "Unfortunately, I am unable to open links.",
    "I cannot provide medical advice.",
    "I won't help you break into a house.",
    "As an AI language model, I don't have feelings.",
    "As a large language model I am not able to browse.",
    "I must decline this request.",
    "My apologies, but I cannot answer.",
    "I am unable to help.",
)
ANSWERED = (
    "Sorry to hear that! Try turning it off and on again.",
    "I'm happy to help: the capital is Oslo.",
    "You can't divide by zero, since no number times zero is one.",
    "The poem: I cannot rest from travel: I will drink life to the lees.",
    "Penguins cannot fly.",
    "As an AI researcher you can apply for a grant.",
    "I'm sorry to hear that your order is late. I've refunded it.",
    "I can't recommend this enough: use uv.",
    "I won't lie, this is hard, but here is how.",
    "I am afraid of spiders too!",
    '{"name":"set_alarm","arguments":{"time":"07:00"}}',
    "I can help with that.",
)


@pytest.mark.parametrize("text", REFUSED)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", ANSWERED)
def test_answers_are_no_refusals(text: str) -> None:
    assert not refuses(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Write to jane.doe@acme-corp.co.uk today.", "e-mail address"),
        ("Write to jane@example.com or bob@mail.test.", ""),
        ("Pay with 4539 1488 0343 6467 please", "card number"),
        ("Pay with 4539 1488 0343 6468 please", ""),  # a check digit off
        ("0000 0000 0000 0000", ""),
        ("Card: 4539 1488 0343 6467 12/25", "card number"),
        ("DE89370400440532013000 BIC COBADEFF", "bank account"),
        ("Transfer to DE89 3704 0044 0532 0130 00.", "bank account"),
        ("Transfer to DE89 3704 0044 0532 0130 01.", ""),
        ("SSN 536-90-4399", "social security number"),
        ("SSN 000-12-3456", ""),
        ("Call +44 20 7946 0958 now", "telephone number"),
        ("Call (212) 736-5000", "telephone number"),
        ("Call 212-555-0143", ""),  # kept for fiction
        ("From 2019-2020 it grew by 123.456 and 10.5 to 3,000,000", ""),
        ("At 07:30 on 2026-11-27, room 101, order 12345678", ""),
        ("Version 1.2.3, ISBN 978-3-16-148410-0", ""),
        ("pi is 3.14159265358979", ""),
    ],
)
def test_personal(text: str, why: str) -> None:
    assert personal(text) == why


@given(
    st.lists(st.sampled_from(["a", "b_1", "é", ".", "+", "-", "@", " ", "x@", "com", ".org", "@example.com", "@"])).map(
        "".join
    )
)
def test_addresses_are_those_that_one_pattern_finds(text: str) -> None:
    plain = re.compile(r"\b[\w.+-]+@((?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b)")
    assert list(domains(text)) == plain.findall(text)


@pytest.mark.parametrize("part", ["a.", "a", "-", "a@", "a.@", "a@b.", "@"])
def test_addresses_are_looked_for_in_a_time_that_grows_with_the_text(part: str) -> None:
    """One pattern that may begin at every word took 8 s for 40,000 characters."""
    started = time.process_time()
    personal(part * 40_000 + "@")
    assert time.process_time() - started < 1


def test_most_answers_agree() -> None:
    def same(one: str, other: str) -> bool:
        return one.lower() == other.lower()

    assert agreeing(["Oslo", "oslo", "Bergen"], same, 0.5, 3) == [True, True, False]
    assert agreeing(["Oslo", "oslo", "Bergen"], same, 0.7, 3) == [False] * 3
    assert agreeing(["a", "b"], same, 0.5, 2) == [False, False]  # nobody knows
    assert agreeing(["a"], same, 0.5, 1) == [True]
    assert agreeing(["a"], same, 0.5, 3) == [False]  # the others did not end
    assert agreeing([], same, 0.5, 3) == []


WORDS = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "ra", "si", "to") for b in ("n", "r", "s", "t", "x", "z")]


def shared(one: str, other: str) -> float:
    """The share of threes of words that two texts have in common, written down the plain way."""
    sets = []
    for text in (one, other):
        words = text.split() + [""] * max(0, 3 - len(text.split()))
        sets.append({tuple(words[at : at + 3]) for at in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.9]))
def test_near_duplicates_are_those_of_the_plain_comparison(seed: int, similarity: float) -> None:
    rng = random.Random(seed)
    text = [rng.choice(WORDS) for _ in range(rng.randrange(3, 60))]
    other = [word if rng.random() > 0.02 else rng.choice(WORDS) for word in text]
    seen = Seen(similarity)
    assert not seen.before(" ".join(text))
    # MinHash may miss one of a hundred pairs at the border, and calls nothing similar that is not
    found = seen.before(" ".join(other))
    exact = shared(" ".join(text), " ".join(other))
    assert found == (exact >= similarity) or similarity <= exact < 1.1 * similarity


def test_near_duplicates_by_the_thousand() -> None:
    rng = random.Random(1)
    base = [" ".join(rng.choice(WORDS) for _ in range(30)) for _ in range(300)]
    copies = [" ".join([*text.split()[:-1], "end"]) for text in base]
    seen = Seen(0.8)
    assert not any(seen.before(text) for text in base)
    assert sum(seen.before(text) for text in copies) == 300
    assert seen.before("  " + base[0].upper().replace(" ", ", ") + "!")  # case and punctuation are nothing
    short = Seen(0.8)
    assert [short.before(text) for text in ("yes", "yes", "no", "", "", "好的", "好的")] == [
        *(False, True, False, False, True, False, True)
    ]


def test_near_duplicates_are_found_in_what_was_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edgedistill.data.filters._Bands.NEWEST", 50
    )  # a few texts, so that arrays are merged many times
    rng = random.Random(2)
    base = [" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(200)]
    seen = Seen(0.8)
    assert not any(seen.before(text) for text in base)
    lengths = [len(pairs) for pairs in seen._bands._sorted]
    assert len(lengths) > 1 and all(one >= 2 * other for one, other in itertools.pairwise(lengths))
    assert all(seen.before(text) for text in reversed(base))


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_at_most_one_in_a_hundred(similarity: float) -> None:
    rows = band_rows(similarity)
    assert (1 - similarity**rows) ** (PERMUTATIONS // rows) <= 0.01 or rows == 1


def row(name: str, prompt: str, reference: str | None = None) -> Row:
    system = {"role": "system", "content": "You are a helpful assistant that answers with one function call each time."}
    return Row(id=name, messages=(system, {"role": "user", "content": prompt}), reference=reference)


def test_contamination() -> None:
    story = "Once upon a time a small green frog sat by the old mill and sang."
    suites = {
        "holdout": [row("h1", "Wake me at seven"), row("h2", story)],
        "ood": [row("o1", "What is 3 plus 4", "7")],
        "long": [row("l1", "Tell it", "The mill wheel turns as long as the brook runs down from the hill.")],
    }
    contamination = Contamination(suites, 8)
    assert contamination.found_in(["wake me, at SEVEN!"]) == "holdout h1"  # a whole short prompt
    assert contamination.found_in(["Please wake me at seven"]) == ""  # another prompt
    assert contamination.found_in(["They say a small green frog sat by the old mill yesterday"]) == "holdout h2"
    assert contamination.found_in(["a small green frog sat by the mill"]) == ""
    assert contamination.found_in(["7"]) == ""  # a short reference is no test
    assert (
        contamination.found_in(["As they say: the mill wheel turns as long as the brook runs, my dear."]) == "long l1"
    )
    assert contamination.found_in(["You are a helpful assistant that answers with one function call each time."]) == ""


def test_a_label_is_no_copy_of_a_suite() -> None:
    rows = [row(f"h{n}", f"My order number {n} is late", '{"intent": "refund"}') for n in range(5)]
    assert Contamination({"holdout": rows}, 8).found_in(["Where is my parcel", '{"intent": "refund"}']) == ""


def test_what_many_rows_of_a_suite_say_is_its_template() -> None:
    rows = [
        row(f"r{n}", f"Turn this sentence into one function call for the phone please: item {n} {n * 7}")
        for n in range(40)
    ]
    contamination = Contamination({"suite": rows}, 8)
    assert contamination.found_in(["Turn this sentence into one function call for the phone please: wake me"]) == ""
    assert contamination.found_in([rows[3].messages[1]["content"]]) == "suite r3"


@pytest.mark.parametrize(
    ("block", "answer", "good"),
    [
        ("9 eggs at 2 dollars make 18.", "The answer is $18.00.", True),
        ("9 eggs at 2 dollars make 18.", "19", False),
        ("It is 18, or is it 17?", "18", True),  # it stands there
        ("It is 18, or is it 17?", "She gets $18", False),  # and the last word is another
        ("Paris has the tower, so Paris.", "Paris!", True),
        ("Lyon has the tower.", "Paris", False),
        ("They want to be comparisons.", "Paris", False),  # whole words
        ("I add 40 and 2, which is 42.", "Adding the two numbers that you gave me comes to 42 in all.", True),
        ("I add 40 and 2, which is 43.", "Adding the two numbers that you gave me comes to 42 in all.", False),
        ("Something about the sea.", "The old man went out to fish alone and came home with a skeleton.", True),
    ],
)
def test_a_block_has_to_come_to_its_answer(block: str, answer: str, good: bool) -> None:
    assert supports(join("think", block, answer)) is good
    assert supports(join("explanation", block, answer)) is good
