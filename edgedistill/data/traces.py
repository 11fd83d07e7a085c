"""Traces of tool use: a conversation in which the assistant calls, reads the result, and goes on.

One line is one trace; ``messages`` hold all of it, and end with the assistant's last turn (or this is the ``reference``)::

    {"id": "t1", "messages": [{"role": "user", "content": "Will it rain in Oslo?"},
      {"role": "assistant", "content": "{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}"},
      {"role": "tool", "content": "rain, 6 degrees"}, {"role": "assistant", "content": "Yes, take an umbrella."}]}

A trace becomes one row for each turn of the assistant's, with all that was recorded before it: the first call after the
request, the next after the recorded result, and so on. That is a replay. No tool is executed: the teacher writes every turn
after what was recorded, and so does a model that is evaluated. What follows a call that differs from the recorded one is
therefore neither learnt nor scored. Training puts the turns together again (``training/traces.py``).

Calls may also stand in ``tool_calls``, as in OpenAI's API: they become the text that the teacher's chat template makes of
them. No torch: ``plan`` reads this.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

from edgedistill.data.prompts import Message, Row
from edgedistill.errors import UsageError

Render = Callable[[Sequence[Message], Sequence[Message], bool], str]
"""(messages, tools, whether to end where the model starts to write) -> the text that a model reads."""
MARK = "xyzzy"


def turns(rows: Iterable[Row], render: Callable[[], Render]) -> tuple[Row, ...]:
    """Return one row for each turn of the assistant's: ``<id>/1``, ``<id>/2``, …, tagged with its number.

    ``render`` gives the chat template; it is asked for only where a row has ``tool_calls``. Raises UsageError, naming the
    row, for calls that the template cannot write.
    """
    found: list[Row] = []
    for row in rows:
        messages = [*row.messages]
        if row.reference is not None:
            messages.append({"role": "assistant", "content": row.reference})
        if messages[0]["role"] == "assistant" or [one["role"] for one in messages[:2]] == ["system", "assistant"]:
            raise UsageError(f"row {row.id!r}: the assistant speaks first", "Begin with a message of the user's.")
        number = 0
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if message.get("tool_calls"):
                try:
                    message = messages[at] = written(messages[: at + 1], row.tools, render())
                except UsageError as error:
                    raise UsageError(f"row {row.id!r}: {error.message}", error.hint) from None
            number += 1
            found.append(_turn(row, number, messages[:at], message["content"]))
        if messages[-1]["role"] != "assistant":  # the teacher is to write the last turn, and nothing says how
            found.append(_turn(row, number + 1, messages, None))
    return tuple(found)


def _turn(row: Row, number: int, messages: Sequence[Message], reference: str | None) -> Row:
    return dataclasses.replace(
        row,
        id=f"{row.id}/{number}",
        messages=tuple(messages),
        reference=reference,
        tags=(*row.tags, f"turn {number}"),
        trace=row.id,
    )


def written(messages: Sequence[Message], tools: Sequence[Message], render: Render) -> Message:
    """Return the last message with its calls as text: what the template prints between the start and the end of the turn. Raises
    UsageError for what is no call, and a template that writes it otherwise.
    """
    *before, message = messages
    calls = [_call(call) for call in message["tool_calls"]]
    prompt = render(before, tools, True)
    whole = render([*before, {**message, "content": message.get("content") or "", "tool_calls": calls}], tools, False)
    end = render([*before, {"role": "assistant", "content": MARK}], tools, False).rpartition(MARK)[2]
    text = whole.removeprefix(prompt).removesuffix(end)
    written = {"role": "assistant", "content": text}
    if (
        len(text) + len(prompt) + len(end) != len(whole)
        or not all(call["function"]["name"] in text for call in calls)
        or render([*before, written], tools, False) != whole
    ):
        raise UsageError(
            "the chat template does not write tool_calls as the text of a turn",
            'Write the calls into "content" as the student is to write them, or take a teacher whose template knows calls.',
        )
    return written


def _call(call: Message) -> Message:
    """Return a call with its arguments as an object: OpenAI's API gives them as JSON in a string, templates want neither."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(
            "a call has no name", 'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}.'
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise UsageError(f"the arguments of {function['name']!r} are no JSON", "Correct the call.") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
