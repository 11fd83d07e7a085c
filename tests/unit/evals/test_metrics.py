"""Metrics: one answer against one reference."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.evals.metrics import METRICS, find_metric, parse_json, same_json

CALL = '{"name":"set_timer","arguments":{"minutes":5,"label":"tea"}}'


@pytest.mark.parametrize(
    ("answer", "value", "valid"),
    [
        (CALL, 1, True),
        (' {"arguments": {"label": "tea", "minutes": 5}, "name": "set_timer"}\n', 1, True),
        (CALL.replace("5", '"5"'), 0, True),
        (CALL.replace("5", "5.0"), 0, True),
        (CALL.replace("5", "true"), 0, True),
        (CALL.replace("set_timer", "set_alarm"), 0, True),
        (CALL.replace(',"label":"tea"', ""), 0, True),
        (CALL.replace("}}", ',"x":1}}'), 0, True),
        (CALL + " Done!", 0, False),
        ("```json\n" + CALL + "\n```", 0, False),
        (CALL[:-1], 0, False),
        (CALL.replace("5", "NaN"), 0, False),
        (CALL.replace('"minutes":5', '"minutes":4,"minutes":5'), 0, False),
        ("", 0, False),
        ("[" * 100_000, 0, False),
    ],
)
def test_json_exact(answer: str, value: int, valid: bool) -> None:
    score = find_metric("json-exact")(answer, CALL)
    assert (score.value, score.details["valid_json"], score.details["function"]) == (value, valid, "set_timer")
    if answer.strip().startswith('{"name":"set_alarm"'):
        assert score.details["called"] == "set_alarm"


def test_a_reference_that_is_no_json_is_the_users_error() -> None:
    with pytest.raises(UsageError, match="reference is not JSON"):
        find_metric("json-exact")("{}", "five minutes")


def test_a_reference_without_a_name_compares_the_value() -> None:
    score = find_metric("json-exact")("[1, 2]", "[1,2]")
    assert score.value == 1
    assert score.details["function"] is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_a_value_equals_itself_however_it_is_written(value: Any) -> None:
    compact, spaced = json.dumps(value), json.dumps(value, indent=3, sort_keys=True, ensure_ascii=False)
    assert find_metric("json-exact")(compact, spaced).value == 1
    assert same_json(value, parse_json(compact)[1])


@given(JSON, JSON)
def test_equal_with_types_is_equal_text(a: Any, b: Any) -> None:
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert same_json(a, b) == (same or (a == b and type(a) is type(b) is float))


def test_exact_and_contains() -> None:
    assert find_metric("exact")(" Paris\n", "Paris").value == 1
    assert find_metric("exact")("paris", "Paris").value == 0
    assert find_metric("contains")("It is  PARIS, of course", "is paris").value == 1
    assert find_metric("contains")("Lyon", "Paris").value == 0


def test_perplexity_scores_no_answers() -> None:
    metric = find_metric("perplexity")
    assert metric.kind == "likelihood"
    assert not metric.higher_is_better
    with pytest.raises(UsageError, match="scores likelihoods"):
        metric("a", "b")


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match="unknown metric 'json_exact'") as caught:
        find_metric("json_exact")
    assert "Did you mean 'json-exact'" in caught.value.hint
    assert all(name in caught.value.hint for name in METRICS)


def test_after_thinking_only_the_answer_counts() -> None:
    metric = find_metric("think:json-exact")
    assert metric.name == "think:json-exact"
    found = metric('<think>\nan alarm, so set it\n</think>\n\n{"name": "a"}', '<think>why</think>{"name": "a"}')
    assert found.value == 1.0
    assert found.details["thinking_words"] == 5
    assert metric('{"name": "a"}', '{"name": "a"}').details["thinking_words"] is None
    assert metric('<think>{"name": "a"}', '{"name": "a"}').value == 0.0
    with pytest.raises(UsageError, match="unknown metric"):
        find_metric("think:perplexity")


WEATHER = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ('{"arguments": {"days": 2, "city": "Oslo"}, "name": "weather"}', WEATHER, 1.0),
        (f"I look.\n<tool_call>\n{WEATHER}\n</tool_call>", WEATHER, 1.0),
        (WEATHER, f"<tool_call>{WEATHER}</tool_call>", 1.0),
        ('{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}', WEATHER, 1.0),  # Llama's word for arguments
        (WEATHER.replace("2", '"2"'), WEATHER, 0.0),  # another type
        (f"[{WEATHER}, {WEATHER}]", WEATHER, 0.0),
        (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{WEATHER}</tool_call>", f"[{WEATHER}, {WEATHER}]", 1.0),
        (f"<tool_call>{WEATHER[:-1]}</tool_call>", WEATHER, 0.0),
        (WEATHER[:-1], WEATHER, 0.0),
        ("It rains.", WEATHER, 0.0),
        ('{"name": "now"}', '{"name": "now", "arguments": {}}', 1.0),
        # no call is due: any answer that calls nothing
        ("It will rain.", "Yes, take an umbrella.", 1.0),
        ('{"city": "Oslo"}', "Yes.", 1.0),  # JSON, and no call
        (WEATHER, "Yes, take an umbrella.", 0.0),
        (WEATHER[:-1], "Yes, take an umbrella.", 0.0),
        ("", "Yes.", 1.0),
    ],
)
def test_calls_are_compared_and_wording_is_not(answer: str, reference: str, value: float) -> None:
    assert find_metric("tool-calls")(answer, reference).value == value


def test_calls_are_told_by_name_and_broken_references_refused() -> None:
    found = find_metric("tool-calls")(f"<tool_call>{WEATHER}", WEATHER.replace("weather", "rain"))
    assert found.details == {"valid_json": True, "function": "rain", "called": "weather"}
    assert find_metric("tool-calls")("{", WEATHER).details["valid_json"] is False
    with pytest.raises(UsageError, match="cannot be read"):
        find_metric("tool-calls")("", "<tool_call>{}</tool_call>")
