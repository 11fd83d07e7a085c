"""Forms of others turned into ours, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.forms import exported
from edgedistill.data.prompts import parse_row
from edgedistill.errors import UsageError

SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "f"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": what} for who, what in said]


CALLING = turns(("human", "a"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"))
FORMS: list[tuple[dict[str, Any], list[dict[str, Any]], str | None]] = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2")], "3"),
    ({"instruction": "Add.", "input": "", "output": "3", "text": "own"}, [user("Add.")], "3"),
    ({"instruction": "Add.", "input": None, "output": ""}, [user("Add.")], None),
    (
        {"instruction": "b", "input": "", "output": "c", "system": "Be brief.", "history": [["a", "A"]]},
        [SYSTEM, user("a"), assistant("A"), user("b")],
        "c",
    ),
    ({"conversations": turns(("human", "a"), ("gpt", "b"))}, [user("a")], "b"),
    ({"conversations": turns(("system", "Be brief."), ("human", "a"))}, [SYSTEM, user("a")], None),
    ({"conversations": turns(("human", "a"), ("gpt", "b")), "system": "Be brief."}, [SYSTEM, user("a")], "b"),
    ({"conversations": [user("a"), assistant("b")]}, [user("a")], "b"),
    (
{"conversations": [*CALLING, *turns(("gpt", "b"))]},
        [
            user("a"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
            {"role": "tool", "content": "1"},
        ],
        "b",
    ),
    (
        {"conversations": turns(("human", "a"), ("function_call", "f(1)"), ("tool", "1"))},
        [user("a"), assistant("f(1)"), {"role": "tool", "content": "1"}],
        None,
    ),
    ({"messages": [SYSTEM, user("a"), assistant("b")]}, [SYSTEM, user("a")], "b"),
    ({"messages": json.dumps([user("a"), assistant("b")])}, [user("a")], "b"),
    ({"prompt": "a", "completion": "b"}, [user("a")], "b"),
    ({"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]}, [SYSTEM, user("a")], "b"),
    ({"question": "a", "answer": "b"}, [user("a")], "b"),
    ({"question": "a", "reference": "b"}, [user("a")], "b"),
    ({"prompt": "a", "reference": "b", "question": "own", "answer": "own"}, [user("a")], "b"),
    ({"prompt": "a", "reference": "b", "completion": "own"}, [user("a")], "b"),
    ({"messages": [user("a")], "prompt": None, "reference": "b"}, [user("a")], "b"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "messages", "reference"), FORMS)
def test_a_form_is_told_by_its_fields(record: dict[str, Any], messages: list[Any], reference: str | None) -> None:
    row = parse_row({"id": "x", **record}, "x:1")
    assert list(row.messages) == messages
    assert row.reference == reference


WRONG = [
    ({"prompt": "a", "question": "b", "answer": "c"}, "two forms in one row: prompt, question and answer"),
    ({"instruction": "a", "input": "", "conversations": turns(("human", "b"))}, "two forms in one row"),
    ({"instruction": "a", "output": "b", "reference": "c"}, "has a reference, and output says what it is, too"),
    ({"question": "a", "answer": "b", "reference": "c"}, "has a reference, and answer says"),
    ({"instruction": "", "input": "x", "output": "b"}, "instruction is empty"),
    ({"instruction": "a", "output": 3}, "output must be a string"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list of pairs"),
    ({"conversations": []}, "conversations must be a list of turns"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: not a turn"),
    ({"conversations": turns(("human", "a"), ("bot", "b"))}, r"conversations\[1\]: wrong speaker 'bot'"),
    ({"conversations": turns(("system", "a"), ("human", "b")), "system": "c"}, "a system column, and a first turn"),
    ({"prompt": [user("a")], "completion": "b"}, "completion is none"),
    ({"prompt": "a", "tools": "[x"}, "tools is a text that is no JSON"),
    ({"messages": [user("a"), assistant(" ")]}, "nothing to answer"),
    ({"messages": [assistant("a")]}, "nothing to answer"),
    ({"messages": [user("a"), assistant("a")], "reference": "b"}, "nothing to answer"),
    ({"messages": [user("a"), {**assistant("a"), "text": "b"}]}, "unknown field 'text'"),
    ({"instruction": "a", "response": "b"}, "no messages"),  # Dolly's: its columns need a template
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_what_is_of_no_form_or_of_two_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^x:1: .*{message}") as caught:
        parse_row(record, "x:1")
    assert caught.value.hint


def test_traces_stay_whole() -> None:
    calls = turns(("human", "a"), ("function_call", '{"name": "f"}'), ("observation", "1"), ("gpt", "b"))
    row = parse_row({"conversations": calls, "tools": json.dumps([TOOL])}, "x:1", traces=True)
    assert [one["role"] for one in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.reference is None and row.tools == (TOOL,)


said = st.text(min_size=1, max_size=8).filter(str.strip)
pairs = st.lists(st.tuples(said, said), max_size=2)


@pytest.mark.parametrize("form", ["alpaca", "sharegpt"])
@given(before=pairs, asked=said, told=said, system=st.none() | said)
def test_a_conversation_comes_back(form: str, before: Any, asked: str, told: str, system: str | None) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for one, other in before:
        messages += [user(one), assistant(other)]
    row = {"id": "x", "messages": [*messages, user(asked)], "reference": told}
    (written,) = exported([row], form)
    assert parse_row(written, "x:1").to_json() == row


def test_tools_go_by_sharegpt_alone() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    row = {"id": "x", "messages": messages, "reference": "b", "tools": [TOOL]}
    (written,) = exported([row], "sharegpt")
    assert parse_row(written, "x:1").to_json() == row
    with pytest.raises(UsageError, match="row 'x': Alpaca's form has no tools"):
        exported([row], "alpaca")
