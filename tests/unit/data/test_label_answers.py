"""What a teacher says of all labels is read strictly, and shares follow it: they sum to 1, and more is never less."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.label_answers import (
    ask_ranking,
    ask_scores,
    ranking_schema,
    read_ranking,
    read_scores,
    rotated,
    scores_schema,
    shortest,
)
from edgedistill.data.labels import mean_shares, ranking_shares, score_shares, without_small
from edgedistill.data.thinking import join

NAMES = ("log in", "Billing", "1")
SCORES = {"log in": 2.0, "Billing": 7.5, "1": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        '{"log in": 2, "Billing": 7.5, "1": 0}',
        ' {"1": 0.0, "BILLING": 7.5,\n "Log  in": 2}\n',
        '```json\n{"log in": 2, "Billing": 7.5, "1": 0}\n```',
        join("think", '{"log in": 9, "Billing": 9, "1": 9}', '{"log in": 2, "Billing": 7.5, "1": 0}'),
    ],
)
def test_scores_are_read(text: str) -> None:
    found, why = read_scores(text, NAMES)
    assert (found, why) == (SCORES, "")
    assert list(found) == list(NAMES)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Billing", "no JSON object of scores"),
        ('{"log in": 2, "Billing": 7.5, "1": 0', "no JSON object of scores"),
        ('Sure: {"log in": 2, "Billing": 7.5, "1": 0}', "no JSON object of scores"),
        ('[{"log in": 2, "Billing": 7.5, "1": 0}]', "no JSON object of scores"),
        ("[" * 100_000, "no JSON object of scores"),
        ("", "no JSON object of scores"),
        ("{}", "no score for log in"),
        ('{"log in": 2, "1": 0}', "no score for Billing"),
        ('{"log in": 2, "Billing": 7.5, "1": 0, "other": 1}', "no label: other"),
        ('{"log in": 2, "Billing": 7.5, "1": 0, "billing": 1}', "two scores for Billing"),
        ('{"log in": 2, "log in": 3, "Billing": 7.5, "1": 0}', "two scores for log in"),
        ('{"log in": "2", "Billing": 7.5, "1": 0}', "no number for log in"),
        ('{"log in": true, "Billing": 7.5, "1": 0}', "no number for log in"),
        ('{"log in": null, "Billing": 7.5, "1": 0}', "no number for log in"),
        ('{"log in": 2, "Billing": 10.5, "1": 0}', "a score for Billing that is not from 0 to 10"),
        ('{"log in": 2, "Billing": -1, "1": 0}', "a score for Billing that is not from 0 to 10"),
        ('{"log in": 2, "Billing": NaN, "1": 0}', "a score for Billing that is not from 0 to 10"),
        ('{"log in": 2, "Billing": 1' + 400 * "0" + "}", "a score for Billing that is not from 0 to 10"),
    ],
)
def test_what_are_no_scores_is_told(text: str, why: str) -> None:
    assert read_scores(text, NAMES) == ({}, why)


@pytest.mark.parametrize(
    "text",
    [
        '["Billing", "1", "log in"]',
        '```json\n["billing", "1", "Log in"]\n```',
        '["Billing", 1, "log in"]',
        "Billing > 1 > log in",
        " Billing\n1\nlog in\n",
        "1. Billing\n2. 1\n3. log in",
        "- Billing\n\n- 1.\n- log in.",
        "Billing >\n1 >\nlog in",
        join("think", "log in > 1 > Billing", "Billing > 1 > log in"),
    ],
)
def test_an_order_is_read(text: str) -> None:
    assert read_ranking(text, NAMES) == (("Billing", "1", "log in"), "")
    assert read_ranking(text, NAMES, 2) == (("Billing", "1"), "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no order of labels"),
        ("[]", "no order of labels"),
        ("Billing", "an order of 1 of 3 labels"),
        ('["Billing", "1"]', "an order of 2 of 3 labels"),
        ('["Billing", "1", "billing"]', "Billing twice"),
        ('["Billing", "1", "other"]', "no label: other"),
        ('["Billing", {"label": "1"}, "log in"]', "no label: {…}"),
        ("I would say: Billing > 1 > log in", "no label: I would say: Billing"),
        ("1. Billing is best\n2. 1\n3. log in", "no label: Billing is best"),
    ],
)
def test_what_is_no_order_is_told(text: str, why: str) -> None:
    assert read_ranking(text, NAMES) == ((), why)


def test_labels_with_marks_of_an_order_in_them_are_still_read() -> None:
    names = ("x > y", "1. FC", "-")
    assert read_ranking("x > y\n1. FC\n-", names) == (names, "")
    assert read_ranking("1. x > y\n2. 1. FC\n3. -", names) == (names, "")


def test_what_is_asked_names_each_label_as_the_recipe_does() -> None:
    assert '{"log in": N, "Billing": N, "1": N}' in ask_scores(NAMES)
    assert '["log in", "Billing", "1"]' in ask_ranking(NAMES)
    assert "the 2 of these" in ask_ranking(NAMES, 2)


def test_a_rotation_puts_every_label_once_in_every_place() -> None:
    assert [rotated(NAMES, places) for places in range(4)] == [
        ("log in", "Billing", "1"),
        ("Billing", "1", "log in"),
        ("1", "log in", "Billing"),
        ("log in", "Billing", "1"),
    ]


@pytest.mark.parametrize("first", [0, 2])
def test_the_schemas_allow_what_is_read_and_no_more(first: int) -> None:
    from jsonschema import Draft202012Validator

    scores, order = Draft202012Validator(scores_schema(NAMES)), Draft202012Validator(ranking_schema(NAMES, first))
    for value, good in (
        ({"log in": 0, "Billing": 10, "1": 3}, True),
        ({"log in": 0, "Billing": 11, "1": 3}, False),
        ({"log in": 0, "1": 3}, False),
        ({"log in": 0, "Billing": 1, "1": 3, "other": 1}, False),
    ):
        assert scores.is_valid(value) == good == (not read_scores(json.dumps(value), NAMES)[1])
    assert order.is_valid(["1", "Billing", "log in"][: first or 3])
    assert not order.is_valid(["1"]) and not order.is_valid(["1", "other", "log in"][: first or 3])
    read = read_ranking if first else lambda text, names, _: read_scores(text, names)
    text = shortest(NAMES, "ranking" if first else "scores", first)
    assert not read(text, NAMES, first)[1]


# ── shares ──


LABELS = ("a", "b", "c", "d")
scores_of_all = st.fixed_dictionaries({name: st.floats(0, 10) for name in LABELS})
scales = st.floats(0.05, 100)


def summed(found: dict[str, float]) -> float:
    return math.fsum(found.values())


def test_two_points_more_are_e_times_the_share_at_the_default() -> None:
    found = score_shares([{"a": 9, "b": 7, "c": 1}, {"a": 7, "b": 5, "c": 1}], 2.0)  # means 8, 6, 1
    total = 1 + math.exp(-1) + math.exp(-3.5)
    assert found == pytest.approx({"a": 1 / total, "b": math.exp(-1) / total, "c": math.exp(-3.5) / total})
    assert score_shares([], 2.0) == {}


@given(st.lists(scores_of_all, min_size=1, max_size=5), scales)
def test_shares_of_scores_sum_to_one_and_follow_the_means(found: list[dict[str, float]], scale: float) -> None:
    shares = score_shares(found, scale)
    assert summed(shares) == pytest.approx(1.0)
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in LABELS}
    for one in LABELS:
        for other in LABELS:
            if means[one] >= means[other]:
                assert shares[one] >= shares[other] * (1 - 1e-12)


@given(scores_of_all, st.sampled_from(LABELS), st.floats(0.01, 10), scales)
def test_a_higher_score_is_a_higher_share_and_the_others_are_lower(
    one: dict[str, float], name: str, more: float, scale: float
) -> None:
    before, after = score_shares([one], scale), score_shares([{**one, name: one[name] + more}], scale)
    assert after[name] >= before[name]
    assert all(after[other] <= before[other] for other in LABELS if other != name)


@given(scores_of_all, st.floats(-5, 5), scales)
def test_points_for_all_change_nothing(one: dict[str, float], more: float, scale: float) -> None:
    shifted = {name: score + more for name, score in one.items()}
    assert score_shares([shifted], scale) == pytest.approx(score_shares([one], scale), rel=1e-6, abs=1e-9)


orders = st.permutations(LABELS).flatmap(lambda order: st.integers(1, 4).map(lambda first: tuple(order[:first])))
decays = st.floats(0.01, 0.99)


def test_each_place_is_half_of_the_one_before_it() -> None:
    assert ranking_shares([("b", "a", "c")], LABELS, 0.5) == pytest.approx({"b": 4 / 7, "a": 2 / 7, "c": 1 / 7})
    both = ranking_shares([("b", "a"), ("c", "b")], LABELS, 0.5)
    assert both == pytest.approx({"a": 1 / 6, "b": 1 / 2, "c": 1 / 3})
    assert ranking_shares([], LABELS, 0.5) == {}


@given(st.lists(orders, min_size=1, max_size=5), decays)
def test_shares_of_orders_sum_to_one_over_what_is_ordered(found: list[tuple[str, ...]], decay: float) -> None:
    shares = ranking_shares(found, LABELS, decay)
    assert summed(shares) == pytest.approx(1.0)
    assert set(shares) == {name for order in found for name in order}


@given(orders, decays)
def test_a_place_further_down_is_a_smaller_share(order: tuple[str, ...], decay: float) -> None:
    shares = ranking_shares([order], LABELS, decay)
    for one, other in itertools.pairwise(order):
        assert shares[other] == pytest.approx(decay * shares[one])


@given(st.dictionaries(st.sampled_from(LABELS), st.floats(0, 1), min_size=1), st.floats(0, 0.99))
def test_small_shares_go_to_the_others(weights: dict[str, float], least: float) -> None:
    top = max(weights.values())
    if top == 0 or summed(weights) < 1e-300:
        return
    kept = without_small(weights, least)
    assert summed(kept) == pytest.approx(1.0)
    assert set(kept) == {name for name, share in weights.items() if share > 0 and share >= least * top}
    assert mean_shares([weights, weights]) == pytest.approx(
        {name: one / summed(weights) for name, one in weights.items()}
    )


said = st.one_of(
    st.text(),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.sampled_from(NAMES), st.text(max_size=3)),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    ).map(json.dumps),
)


@given(said, st.integers(0, 3))
def test_whatever_is_said_is_read_or_told(text: str, first: int) -> None:
    scores, why = read_scores(text, NAMES)
    assert (list(scores) == list(NAMES) and not why) or (not scores and why)
    order, why = read_ranking(text, NAMES, first)
    assert (len(order) == len(set(order)) == (first or 3) and not why) or (not order and why)


@given(st.permutations(NAMES), st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_what_is_written_is_read_back(order: list[str], values: list[float]) -> None:
    written: dict[str, Any] = dict(zip(order, values, strict=True))
    assert read_scores(json.dumps(written), NAMES) == (pytest.approx(written), "")
    for text in (json.dumps(order), " > ".join(order), "\n".join(f"{at}) {name}" for at, name in enumerate(order, 1))):
        assert read_ranking(text, NAMES) == (tuple(order), "")
