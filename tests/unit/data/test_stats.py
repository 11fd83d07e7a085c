"""Figures of what there is to learn from, by hand and against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.data.stats import by_difficulty, distance, leaked, lengths, prompt_of, repeats, spread


def row(name: str, text: str, *tags: str) -> Row:
    return Row(id=name, messages=({"role": "user", "content": text},), tags=tags)


def kept(name: str, source: str = "teacher", text: str = "fine", prompt: str = "q") -> dict[str, Any]:
    return {"id": name, "source": source, "text": text, "messages": [{"role": "user", "content": prompt}]}


def test_what_recovery_brings_is_told_by_tag_and_by_length() -> None:
    rows = [row("a", "x", "easy"), row("b", "x y z", "hard"), row("c", "x y z " * 9, "hard"), row("d", "x y", "easy")]
    lines = [kept("a"), kept("a#1"), kept("b", "second"), kept("c", "gold"), kept("d+why")]
    found = {one["of"]: (one["prompts"], one["before"], one["after"]) for one in by_difficulty(rows, lines, ["second"])}
    assert found["easy"] == (2, 2, 2)
    assert found["hard"] == (2, 0, 1)  # gold is no teacher's
    assert found["shortest prompts"] == (1, 1, 1)
    assert found["longest prompts"] == (2, 0, 1)
    assert prompt_of("a#1+fix2", {"a"}) == "a"
    assert prompt_of("c++#1", {"c++", "c"}) == "c++"
    assert prompt_of("x+before", {"a"}) == ""


@given(st.lists(st.integers(0, 1000), max_size=50))
def test_spreads_are_those_of_the_sorted_list(values: list[int]) -> None:
    found = spread(values)
    assert found["n"] == len(values)
    if values:
        assert found["max"] == max(values)
        assert found["p95"] == np.percentile(values, 95, method="inverted_cdf")
        assert found["median"] == sorted(values)[len(values) // 2]


def test_lengths_repeats_and_leaks() -> None:
    copied = "please wake me at seven tomorrow and tell Anna about it"
    lines = [kept("a", prompt=copied), kept("b", prompt=copied + "!"), kept("c", prompt="something else entirely here")]
    assert lengths([row("a", "one two"), row("b", "one two three four")], lines)["prompt"]["max"] == 4
    assert repeats(lines) == 1
    assert leaked(lines, {"test": [row("t", copied)]}) == {"test": 2}
    assert leaked(lines[2:], {"test": [row("t", copied)]}) == {}


@given(*[st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40)] * 2)
def test_the_distance_is_the_entropy_of_the_mixture_over_the_means(one: list[str], other: list[str]) -> None:
    names = sorted({*one, *other})
    p, q = (np.array([words.count(name) / len(words) for name in names]) for words in (one, other))

    def entropy(shares: np.ndarray) -> float:
        found = shares[shares > 0]
        return float(-(found * np.log2(found)).sum())

    wanted = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    found = distance([" ".join(one)], [" ".join(other)])
    assert found["divergence"] == pytest.approx(wanted, abs=1e-9)
    assert found["unknown_words"] == pytest.approx(sum(word not in one for word in other) / len(other))


def test_the_same_traffic_is_as_near_as_chance() -> None:
    texts = [f"set an alarm for {hour} {part}" for hour in range(1, 13) for part in ("am", "pm")]
    found = distance(texts, texts)
    assert found["divergence"] == pytest.approx(0.0, abs=1e-12)
    assert 0 < found["by_chance"] < 0.5
    assert found["unknown_words"] == 0
