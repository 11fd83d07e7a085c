"""Each kind of augmenter: what the teacher is asked, what is read in its answer, and what is dropped."""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from edgedistill.data.augmenters import (
    CASES,
    EVOLVE,
    GUIDANCE,
    KINDS,
    NEW,
    STANCES,
    TRIES,
    Ask,
    Said,
    draw,
    expected,
    failed,
    instruction,
    malformed,
    numbered,
    some_of,
    turns,
    unquoted,
    vary,
)
from edgedistill.data.new_prompts import Pool, last_said
from edgedistill.data.prompts import Row, parse_row
from edgedistill.recipe_prompts import Augment


def rows(*texts: str, **more: Any) -> list[Row]:
    return [parse_row({"id": f"r{at}", "prompt": text, **more}, f"x:{at}") for at, text in enumerate(texts)]


def made(seeds: Sequence[Row], answer: Callable[[Ask], str | Said], **table: Any) -> tuple[Pool, list[list[Ask]]]:
    """Run an augmenter with a teacher that is a function."""
    pool, settings = Pool(table["kind"], seeds, {}), Augment(**table).settings()
    asking = KINDS[table["kind"]](settings, seeds, 0, pool)
    asks, rounds = next(asking, None), []
    while asks is not None:
        rounds.append(asks)
        found = [answer(ask) for ask in asks]
        try:
            asks = asking.send([one if isinstance(one, Said) else Said(text=one, ended=True) for one in found])
        except StopIteration:
            asks = None
    return pool, rounds


def whys(pool: Pool) -> list[str]:
    return [one["why"] for one in pool.dropped]


SEEDS = rows("Set an alarm for seven tomorrow", "How do I boil an egg", "Text my sister that I am late")


def test_the_recipe_names_what_there_is() -> None:
    fields = Augment.model_fields
    assert set(typing.get_args(fields["kind"].annotation)) == {"variations", *KINDS} == set(Augment.OWN)
    assert fields["ways"].default == tuple(EVOLVE) and fields["cases"].default == tuple(CASES)
    assert set(fields["balance"].default) == set(STANCES) == set(GUIDANCE)


def test_variations_put_an_instruction_after_the_prompt() -> None:
    pool = Pool("variations", SEEDS[:1], {})
    vary(Augment(kind="variations", to=("a beginner", "in detail", "Use no jargon.")).settings(), SEEDS[:1], pool)
    assert [last_said(child) for child in pool.children] == [
        "Set an alarm for seven tomorrow\n\nAnswer for a beginner.",
        "Set an alarm for seven tomorrow\n\nAnswer in detail.",
        "Set an alarm for seven tomorrow\n\nUse no jargon.",
    ]
    assert (
        instruction("An expert") == "Answer for An expert." and instruction("antonyms only") == "Answer antonyms only."
    )


def test_a_paraphrase_says_the_same_in_other_words() -> None:
    seeds = rows(
        "Wake me at 7 and again at 8", "Play some jazz for me", "Call mum", "Order the pizza now please", "Turn it down"
    )
    said = {
        "r0": "Please ring at 7 and once more later",
        "r1": '"Put on a few jazz tunes"',
        "r2": "I'm sorry, but I can't help with that.",
        "r3": "Order the pizza now, please!",
        "r4": Said(text="Make it more qu", ended=False),
    }
    pool, ((*asks,),) = made(seeds, lambda ask: said[ask.parent.id], kind="paraphrase")
    assert [last_said(child) for child in pool.children] == ["Put on a few jazz tunes"]
    assert whys(pool) == ["lost a number", "refused", "nothing new", "did not end"]
    assert "Wake me at 7 and again at 8" in asks[0].text
    _, ((*asks,),) = made(seeds[:1], lambda ask: "x", kind="paraphrase", n=3)
    assert [ask.sample for ask in asks] == [0, 1, 2]  # three draws, not one three times


def test_self_instruct_goes_on_until_there_are_enough_new_ones() -> None:
    seeds = rows(*(f"Tell me about the {word} of the house" for word in "roof door cellar garden stairs walls".split()))

    def answer(ask: Ask) -> str:
        unlike = [f"{ask.sample}{at} wholly{ask.sample}{at} unlike{at}{ask.sample} words" for at in range(3)]
        return "Here they are:\n1. " + "\n2) ".join(unlike) + "\n- Tell me about the attic of the house\n4. why?"

    pool, rounds = made(seeds, answer, kind="self-instruct", total=10, shown=4)
    assert len(pool.children) == 10 and len({last_said(child) for child in pool.children}) == 10
    assert [len(asks) for asks in rounds] == [2, 1, 1]  # 3 of 8 are new, so two questions bring 6, and so on
    assert Counter(whys(pool)) == {"nothing new": 3, "too short": 3}  # the fourth answer is left where there are enough
    assert all(ask.text.count("Tell me about the") == 4 for asks in rounds for ask in asks)
    assert {child.seed_id for child in pool.children} <= {seed.id for seed in seeds}


def test_self_instruct_gives_up_on_a_teacher_that_has_nothing_new() -> None:
    pool, rounds = made(SEEDS, lambda ask: "I do not know.", kind="self-instruct", total=NEW + 1)
    assert sum(map(len, rounds)) == TRIES * 2 and not pool.children
    assert set(whys(pool)) == {"no list"}


def test_what_is_shown_together_is_of_one_split_and_system_message() -> None:
    seeds = [
        parse_row(
            {
                "id": f"{split}{at}",
                "messages": [
                    {"role": "system", "content": split},
                    {"role": "user", "content": f"{split} request {at}"},
                ],
                "split": split,
            },
            "x:1",
        )
        for split in ("train", "valid")
        for at in range(6)
    ]
    pool, rounds = made(
        seeds, lambda ask: f"1. w{ask.sample}a w{ask.sample}b w{ask.sample}c", kind="self-instruct", total=12
    )
    for ask in (ask for asks in rounds for ask in asks):
        other = "valid" if ask.parent.split == "train" else "train"
        assert f"{ask.parent.split} request" in ask.text and f"{other} request" not in ask.text
    assert {(child.split, child.messages[0]["content"]) for child in pool.children} == {
        ("train", "train"),
        ("valid", "valid"),
    }


def test_evolution_goes_from_what_the_last_round_left() -> None:
    def answer(ask: Ask) -> str:
        if ask.parent.seed_id is None and ask.parent.id == "r1" and ask.sample == 0:
            return "#Rewritten Prompt#: how do I boil two eggs at once on a mountain"
        extra = "and then write a long careful list of everything that could go wrong there"
        return f"{last_said(ask.parent)} {extra} {ask.sample}"

    pool, rounds = made(SEEDS, answer, kind="evol-instruct", rounds=2, ways=("depth", "constraints"))
    assert [len(asks) for asks in rounds] == [3, 3]
    assert [(child.id, child.seed_id, child.evolution) for child in pool.children] == [
        ("r0+evol-instruct1", "r0", 1),
        ("r2+evol-instruct1", "r2", 1),
        ("r0+evol-instruct2", "r0", 2),
        ("r1+evol-instruct1", "r1", 1),
        ("r2+evol-instruct2", "r2", 2),
    ]
    assert whys(pool) == ["copies the instruction"]
    assert last_said(pool.children[0]) in rounds[1][0].text
    assert {ask.way for asks in rounds for ask in asks} == {"depth", "constraints"}
    again, _ = made(SEEDS, answer, kind="evol-instruct", rounds=2, ways=("depth", "constraints"))
    assert again.children == pool.children  # nothing is drawn anew


def test_a_textbook_is_asked_for_by_topic() -> None:
    def answer(ask: Ask) -> str:
        return "1. **Boiling points**.\n2. Egg whites: what they are made of, and why this long topic is none at all\n3. heat"

    pool, _ = made(SEEDS[:2], answer, kind="textbook", n=3, audiences=("a cook",), exercises=4)
    assert [last_said(child) for child in pool.children] == [
        "Write a section of a textbook for a cook on this topic: Boiling points. Explain it step by step, work through an example, "
        "and end with exercises and their solutions (number of exercises: 4).",
        "Write a section of a textbook for a cook on this topic: heat. Explain it step by step, work through an example, and end "
        "with exercises and their solutions (number of exercises: 4).",
    ]
    assert whys(pool) == ["no topic", "repeated", "no topic", "repeated"]


def test_edge_cases_differ_in_kind_and_may_differ_little() -> None:
    pool, ((*asks,),) = made(
        SEEDS[:1], lambda ask: f"Set an alarm for {ask.way} tomorow", kind="edge-cases", n=len(CASES) + 1
    )
    assert len({ask.way for ask in asks}) == len(CASES) and (asks[0].way, asks[-1].sample) == (asks[-1].way, 1)
    assert len(pool.children) == len(CASES) and whys(pool) == ["repeated"]
    pool, _ = made(SEEDS[:1], lambda ask: last_said(ask.parent), kind="edge-cases")
    assert whys(pool) == ["nothing new"]


def test_red_team_prompts_are_balanced_and_guide_the_teacher() -> None:
    seeds = rows(*(f"{word} request of an ordinary kind" for word in "one two three four five six".split()))
    # what is right of a parent is not what is right of its children
    seeds = [replace(row, tags=(*row.tags, "red-team:refusing")) for row in seeds]
    pool, ((*asks,),) = made(
        seeds,
        lambda ask: f"message {ask.parent.id} {ask.sample} by way of {ask.way} quite unlike it",
        kind="red-team",
        n=2,
        balance={"helpful": 1, "refusing": 2, "nuanced": 0},
    )
    tags = Counter(tag for child in pool.children for tag in child.tags)
    assert (tags["red-team"], tags["red-team:helpful"], tags["red-team:refusing"]) == (12, 4, 8)
    assert tags["red-team:nuanced"] == tags["red-team:ambiguous"] == 0
    for child in pool.children:
        stance = "helpful" if "red-team:harmless" in child.tags else "refusing"
        assert f"red-team:{stance}" in child.tags and child.guidance == GUIDANCE[stance]
    assert tags["red-team:jailbreak"] + tags["red-team:social-engineering"] == 8
    assert all(last_said(ask.parent) in ask.text for ask in asks)


def test_the_parts() -> None:
    assert numbered(Said(text="Sure:\n1. one\n   more\n 2) two\n- three", ended=True)) == ["one more", "two", "three"]
    assert numbered(Said(text="1. one\n2. tw", ended=False)) == ["one"]
    assert numbered(Said(text="In 1990 it was so.", ended=True)) == []
    assert (
        unquoted(' "Say "hi"" ') == '"Say "hi""' and unquoted("\u201cSay it\u201d") == "Say it" and unquoted('"') == '"'
    )
    assert [
        malformed(text) for text in ("go on", "x " * 151, ": what now then", "a a a a a a a a", "¿Qué hora es?")
    ] == [
        "too short",
        "too long",
        "begins with punctuation",
        "repeats itself",
        "",
    ]
    assert failed("Say sorry to Ann", "Write a letter that says sorry to Ann and her brother") == ""
    assert failed("Write to Ann", "Sorry, what do you mean?") == "refused" and failed("x", "?!") == "empty"
    assert failed("Boil an egg", "Here is the given prompt, rewritten: boil two eggs") == "copies the instruction"
    assert turns({"a": 1, "b": 1}, 3) == ["a", "b", "a"] and turns({"a": 0.5, "b": 1.5}, 8).count("b") == 6
    assert {draw(3, "x", at) for at in range(50)} == {0, 1, 2} and draw(9, 1, "y") == draw(9, 1, "y")
    drawn = some_of(SEEDS, 5, "z")
    assert sorted(row.id for row in drawn) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("table", "asks", "new"),
    [
        ({"kind": "variations", "to": ("x", "y")}, 0, 20),
        ({"kind": "paraphrase", "n": 3}, 30, 30),
        ({"kind": "self-instruct", "total": 17}, 3, 17),
        ({"kind": "evol-instruct", "rounds": 2}, 20, 20),
        ({"kind": "textbook", "n": 2}, 10, 20),
    ],
)
def test_what_is_expected(table: dict[str, Any], asks: int, new: int) -> None:
    assert expected(Augment(**table).settings(), 10) == (asks, new)
