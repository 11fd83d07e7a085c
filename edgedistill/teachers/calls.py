"""Calls of tools as a server speaks of them, and as the student learns them: the text that its chat template makes.

A server is sent the calls of earlier turns as OpenAI's API has them (``tool_calls``, and their results by id), and answers so. What
is stored is that answer; the text is made of it where it is read, so that another student's template writes it in its own way. No
torch: ``plan`` looks whether all of it can be written.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgedistill.data.prompts import Message, Row
from edgedistill.data.traces import Render, written
from edgedistill.errors import UsageError
from edgedistill.evals.metrics import read_calls

BLOCK = re.compile(r"\s*<tool_call>.*\Z", re.DOTALL)
NO_CALL = "no call"
"""Why an answer ended whose call cannot be read."""


def read_reply(message: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """Return the calls of a server's message as (name, arguments), both as it wrote them. Raises the errors of a message of another
    form (KeyError, TypeError, AttributeError).
    """
    return tuple(
        {"name": str(call["function"]["name"]), "arguments": _as_text(call["function"].get("arguments"))}
        for call in message.get("tool_calls") or ()
    )


def _as_text(arguments: Any) -> str:
    """Return arguments as JSON: most servers write it into a string, which may be empty where a function takes none."""
    return arguments.strip() or "{}" if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def write_calls(
    messages: Sequence[Message],
    tools: Sequence[Message],
    content: str,
    calls: Sequence[Mapping[str, str]],
    render: Render,
) -> tuple[str, bool]:
    """Return the text that the chat template makes of an answer with calls, and whether they are calls: arguments that are no JSON
    object are written as they came, and no app could use them.
    """
    try:
        made = [{"type": "function", "function": {"name": call["name"], "arguments": _object(call)}} for call in calls]
        turn = {"role": "assistant", "content": content, "tool_calls": made}
        return written([*messages, turn], tools, render)["content"], True
    except UsageError:
        raw = [
            f'<tool_call>\n{{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"]}}}\n</tool_call>'
            for call in calls
        ]
        return "\n".join([*([content] if content else []), *raw]), False


def _object(call: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(call["arguments"])
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"the arguments of {call['name']!r} are no JSON object")
    return found


def as_sent(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation as a server wants it: calls that stand in the text of a turn whose results follow become
    ``tool_calls``.

    Raises UsageError for results that no call before them asked for.
    """
    found: list[Message] = []
    names = itertools.count(1)
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        results = list(itertools.takewhile(lambda one: one["role"] == "tool", messages[at:]))
        if message["role"] == "tool" or (results and message["role"] != "assistant"):
            raise UsageError("a result of a tool follows no call", "put the assistant's turn that calls before it")
        if not results:
            found.append(message)
            continue
        at += len(results)
        content, calls = _told(message)
        if len(calls) != len(results):
            raise UsageError(
                f"a turn of the assistant's makes {len(calls)} calls that can be read, and {len(results)} results follow",
                'write calls into "tool_calls", or as {"name": "...", "arguments": {...}}, alone or in <tool_call> blocks',
            )
        given = [one.get("tool_call_id") for one in results]
        ids = given if all(given) and len(set(given)) == len(given) else [f"call_{next(names)}" for _ in results]
        made = [
            {"id": name, "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for name, call in zip(ids, calls, strict=True)
        ]
        found.append({"role": "assistant", "content": content or None, "tool_calls": made})
        found += [{**one, "tool_call_id": name} for name, one in zip(ids, results, strict=True)]
    return found


def _told(message: Message) -> tuple[str, Sequence[Mapping[str, str]]]:
    """Return what a turn says beside its calls, and those."""
    text = message.get("content") or ""
    if message.get("tool_calls"):
        return text, read_reply(
            {"tool_calls": [{"function": one.get("function", one)} for one in message["tool_calls"]]}
        )
    calls = [{"name": one["name"], "arguments": _as_text(one["arguments"])} for one in read_calls(text) or ()]
    return BLOCK.sub("", text) if "<tool_call>" in text else "", calls


def tools_sent(tools: Iterable[Message]) -> list[Message]:
    """Return tools as OpenAI's API wants them."""
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def check_rows(rows: Iterable[Row], render: Render) -> None:
    """Refuse rows that a server cannot be sent, and tools whose calls the student's template does not write. Raises UsageError."""
    seen: set[str] = set()
    for row in rows:
        try:
            as_sent(row.messages)
            if row.tools and (tools := json.dumps(row.tools)) not in seen:
                seen.add(tools)
                for tool in tools_sent(row.tools):
                    call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": {"x": 1}}}
                    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
                    written([{"role": "user", "content": "Hi"}, turn], row.tools, render)
        except (KeyError, TypeError, AttributeError):
            raise UsageError(
                f"row {row.id!r}: a tool, or a call, has no name", "write it as OpenAI's API wants it"
            ) from None
        except UsageError as error:
            raise UsageError(f"row {row.id!r}: {error.message}", error.hint) from None
