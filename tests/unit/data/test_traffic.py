"""How far prompts are from traffic: against counting by hand, and on made traffic of which it is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.data.filters import words_of
from edgedistill.data.prompts import Row
from edgedistill.data.traffic import FEWEST, NEAR, auc, compare, enough, load_traffic, near, told_apart
from edgedistill.errors import UsageError

NAMES = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "me", "ra", "so", "ti") for b in ("n", "rk", "st", "mp", "l")]


def row(name: str, text: str, *tags: str, seed: str | None = None) -> Row:
    return Row(id=name, messages=({"role": "user", "content": text},), tags=tags, seed_id=seed)


def drawn(seed: int, n: int, favoured: float = 0.0) -> list[str]:
    """Draw n texts of 4 to 12 words; the first five words come more often by ``favoured``."""
    rng = np.random.default_rng(seed)
    shares = np.ones(len(NAMES))
    shares[:5] += favoured
    return [" ".join(rng.choice(NAMES, rng.integers(4, 13), p=shares / shares.sum())) for _ in range(n)]


def test_the_interval_holds_one_half_where_there_is_no_difference() -> None:
    found = [told_apart(drawn(2 * at, 60), drawn(2 * at + 1, 60), range(120)) for at in range(25)]
    assert sum(one.low <= 0.5 <= one.high for one in found) >= 20  # of 95 in 100, fewer come in 1 of 1000 runs
    assert abs(np.mean([one.value for one in found]) - 0.5) < 0.04


def test_a_difference_is_found_and_grows() -> None:
    slight, great = (told_apart(drawn(1, 300), drawn(2, 300, by), range(600)) for by in (2.0, 20.0))
    assert 0.5 < slight.low < slight.value < great.low


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=12),
    st.lists(st.integers(0, 6), min_size=2, max_size=12),
)
def test_the_auc_is_the_share_of_pairs_that_are_in_order(one: list[int], zero: list[int]) -> None:
    scores, side = np.array([*one, *zero], dtype=float), np.repeat([1, 0], [len(one), len(zero)])
    found = auc(scores, side, np.arange(len(scores)))
    wanted = np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(one, zero)])
    assert found.value == pytest.approx(wanted)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_is_as_wide_as_resampling_says_and_copies_do_not_narrow_it() -> None:
    rng = np.random.default_rng(0)
    one, zero = rng.normal(0.6, 1, 150), rng.normal(0, 1, 120)
    scores, side = np.concatenate([one, zero]), np.repeat([1, 0], [150, 120])
    found = auc(scores, side, np.arange(270))
    resampled = [np.mean(rng.choice(one, 150)[:, None] > rng.choice(zero, 120)[None]) for _ in range(800)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.012) and found.high == pytest.approx(high, abs=0.012)
    thrice = auc(np.tile(scores, 3), np.tile(side, 3), np.tile(np.arange(270), 3))
    assert (thrice.low, thrice.high) == pytest.approx((found.low, found.high), abs=1e-3)


@settings(max_examples=60)
@given(*[st.lists(st.text("abc 7", min_size=1, max_size=14), min_size=1, max_size=8)] * 2)
def test_the_nearest_is_that_of_all_pairs(own: list[str], theirs: list[str]) -> None:
    def runs(text: str) -> set[str]:
        plain = f" {' '.join(words_of(text) or [text.strip()])} "
        return {plain[at : at + 4] for at in range(max(1, len(plain) - 3))}

    for text, (share, best) in zip(theirs, near(own, theirs), strict=True):
        all_ = [len(runs(text) & runs(other)) / len(runs(text) | runs(other)) for other in own]
        assert share == pytest.approx(max(all_))
        assert best == (all_.index(max(all_)) if max(all_) else -1)


def test_what_no_prompt_is_like_is_named_once() -> None:
    prompts = [row(f"p{at}", f"set an alarm for {at} o'clock please") for at in range(60)]
    traffic = [row(f"t{at}", f"set an alarm for {at + 2} o'clock please") for at in range(57)]
    traffic += [row(name, "why does my bicycle squeak?") for name in ("odd", "odder", "oddest")]
    found = compare(prompts, traffic)
    assert found["without_near"]["value"] == pytest.approx(3 / 60)
    assert found["without_near"]["high"] > 0.14  # of three copies of one question
    (odd,) = found["least_like"]
    assert (odd["text"], odd["times"]) == ("why does my bicycle squeak?", 3) and odd["likeness"] < NEAR
    assert found["prompts_without_near"]["value"] == 0
    assert (found["n"], found["different"]) == (60, 58)
    assert found["tags"] == []


def test_the_same_texts_are_not_told_apart_and_are_as_long() -> None:
    texts = drawn(3, 80)
    found = compare(
        [row(f"p{at}", text) for at, text in enumerate(texts)], [row(f"t{at}", t) for at, t in enumerate(texts)]
    )
    assert found["apart"]["value"] == found["longer"]["value"] == pytest.approx(0.5)
    assert found["without_near"]["value"] == 0


def test_prompts_of_one_seed_are_one_sample() -> None:
    """One prompt in ninety wordings is one prompt: nothing is learnt of the others by one half of them."""
    prompts = [row(f"p{at}", text, seed="only") for at, text in enumerate(drawn(4, 90))]
    found = compare(prompts, [row(f"t{at}", text) for at, text in enumerate(drawn(5, 90))])
    assert found["apart"] is None and found["why"].startswith("1 different prompts are too few")
    assert str(enough(0.05)) in found["why"]
    ids = [row("p0", text) for text in drawn(5, 90)]  # a user's, and the same as a prompt's: of no consequence
    assert compare([row(f"p{at}", text) for at, text in enumerate(drawn(4, 90))], ids)["different"] == 1


def test_few_rows_are_compared_as_far_as_that_goes() -> None:
    found = compare([row("a", "hello there")], [row("b", "hello there!"), row("c", "other words, and more of them")])
    assert found["apart"] is None and str(FEWEST) in found["why"]
    assert found["without_near"]["n"] == 2 and found["longer"]["value"] == 0.75


def test_tags_are_compared_by_their_shares() -> None:
    prompts = [row("a", "x", "one"), row("b", "y", "one"), row("c", "z", "two")]
    (first, *_) = compare(prompts, [row("d", "x", "three"), row("e", "q", "two")])["tags"]
    assert (first["tag"], first["prompts"]["value"], first["traffic"]["value"]) == ("one", pytest.approx(2 / 3), 0.0)


def test_traffic_may_repeat_ids_and_end_with_an_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": "Nothing."}]
    lines = [{"prompt": "hi"}, {"prompt": "hi"}, {"id": "u1", "messages": turns}, {"id": "u1", "prompt": "bye"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [one.id for one in load_traffic(tmp_path / "t.jsonl")][2:] == ["u1", "u1"]
    assert len(load_traffic(tmp_path / "t.jsonl")) == 4


def test_traffic_of_which_a_character_was_cut_in_two_can_be_told_of(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"id": "u\ud83d", "prompt": "send it \ud83d", "tags": ["\ude00"]}) + "\n"
    )
    found = compare([row("a", "x")], load_traffic(tmp_path / "t.jsonl"))
    assert found["least_like"][0]["text"] == "send it \ufffd"
    json.dumps(found, ensure_ascii=False).encode()  # as data stats prints it


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no rows"),
        ('{"messages": [{"role": "assistant", "content": "Hello?"}]}\n', "no user says anything in these 1 rows"),
        ('{"messages": "hello"}\n', r"t.jsonl:1: .*messages"),
    ],
)
def test_a_file_that_is_no_traffic_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        load_traffic(tmp_path / "t.jsonl")
    assert caught.value.hint
