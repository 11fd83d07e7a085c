"""A trace becomes one row for each turn of the assistant's, after what was recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgedistill.chat import Chat
from edgedistill.data.prompts import Message, Row, load_rows, parse_row, rows_digest
from edgedistill.data.traces import turns
from edgedistill.errors import UsageError
from tests.unit.tool_template import CALL, TEMPLATE, TOOL, trace

CHAT = Chat(source="x", template=TEMPLATE, for_tools=TEMPLATE, bos="", eos="")


def never() -> Any:
    raise AssertionError("the template is not needed")


def read(record: dict[str, Any]) -> Row:
    return parse_row(record, "x:1", traces=True)


def test_every_turn_of_the_assistants_is_a_row_after_what_was_recorded() -> None:
    first, last = turns([read(trace(tags=["rain"]))], lambda: CHAT.render)
    assert (first.id, first.trace, first.tags, first.reference) == ("t/1", "t", ("rain", "turn 1"), CALL)
    assert [message["role"] for message in first.messages] == ["user"]
    assert (last.id, last.trace, last.tags) == ("t/2", "t", ("rain", "turn 2"))
    assert last.reference == "Yes, take an umbrella."
    assert last.messages[1] == {"role": "assistant", "content": CALL}
    assert last.messages[2]["content"] == "rain, 6 degrees"
    assert first.tools == last.tools == (TOOL,)


def test_calls_as_text_need_no_template_and_the_last_turn_may_be_a_reference() -> None:
    record = trace()
    record["messages"][1] = {"role": "assistant", "content": CALL}
    whole = turns([read(record)], never)
    *asked, answer = record["messages"]
    assert turns([read({**record, "messages": asked, "reference": answer["content"]})], never) == whole


def test_a_trace_without_its_end_leaves_the_last_turn_to_the_teacher() -> None:
    record = trace()
    record["messages"] = record["messages"][:3]
    first, last = turns([read(record)], lambda: CHAT.render)
    assert first.reference == CALL and last.reference is None and last.id == "t/2"


def test_what_the_student_writes_is_what_the_template_makes_of_the_calls() -> None:
    """The text in place of the calls gives the very conversation that the calls give."""
    record = trace()
    record["messages"][1]["content"] = "Let me look."
    record["messages"][1]["tool_calls"] *= 2
    (first, _) = turns([read(record)], lambda: CHAT.render)
    assert first.reference == f"Let me look.\n{CALL}\n{CALL}"
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}] * 2
    before = record["messages"][:1]
    both = [
        CHAT.render([*before, {"role": "assistant", **message}], [TOOL], False)
        for message in ({"content": "Let me look.", "tool_calls": calls}, {"content": first.reference})
    ]
    assert both[0] == both[1]


def plain(messages: Sequence[Message], tools: Sequence[Message], generation: bool) -> str:
    """ChatML that knows no calls."""
    text = "".join(f"<{message['role']}>{message['content']}<end>" for message in messages)
    return text + ("<assistant>" if generation else "")


def rewriting(messages: Sequence[Message], tools: Sequence[Message], generation: bool) -> str:
    """A template that writes calls at the end of the conversation and text at its start."""
    return "calls" * sum("tool_calls" in message for message in messages) + plain(messages, tools, generation)


@pytest.mark.parametrize(
    ("change", "render", "message"),
    [
        ({}, plain, "row 't': the chat template does not write tool_calls"),
        ({}, rewriting, "row 't': the chat template does not write tool_calls"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, CHAT.render, "a call has no name"),
        (
            {"tool_calls": [{"function": {"name": "weather", "arguments": "{city"}}]},
            CHAT.render,
            "arguments of 'weather' are no JSON",
        ),
    ],
)
def test_calls_that_cannot_be_written_are_refused(change: dict[str, Any], render: Any, message: str) -> None:
    record = trace()
    record["messages"][1].update(change)
    with pytest.raises(UsageError, match=message) as error:
        turns([read(record)], lambda: render)
    assert error.value.hint


def test_a_trace_begins_with_the_user() -> None:
    for before in ([], [{"role": "system", "content": "s"}]):
        messages = [*before, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
        with pytest.raises(UsageError, match="the assistant speaks first"):
            turns([read({"id": "t", "messages": messages, "reference": "x"})], never)


def test_only_traces_stay_whole_and_elsewhere_the_last_turn_is_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(trace()) + "\n")
    (row,) = load_rows(path, need_reference=True, traces=True)
    assert row.messages[-1]["role"] == "assistant" and row.reference is None
    (split,) = load_rows(path, need_reference=True)
    assert split.messages == row.messages[:-1] and split.reference == row.messages[-1]["content"]
    path.write_text(json.dumps(trace(messages=trace()["messages"][:2])) + "\n")  # ends with a call
    with pytest.raises(UsageError, match="nothing to answer") as error:
        load_rows(path)
    assert "tool-trace" in (error.value.hint or "")
    with pytest.raises(UsageError, match="there is a reference beside it"):
        read(trace(reference="No."))


def test_rows_of_no_trace_and_without_tools_have_the_digest_that_they_had() -> None:
    row = parse_row({"id": "a", "prompt": "x", "reference": "y", "tags": ["t"]}, "x:1")
    assert (
        rows_digest([row]) == "d8b99bddd60fee00a1c8cfdb98f1d32c5c27551c2a8019160448b836ea30bf22"
    )  # before there were traces
