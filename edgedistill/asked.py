"""Questions and answers as the row store has them: rows of prompts on one side, a teacher's answers on the other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgedistill.data.prompts import Row, guided
from edgedistill.fingerprint import canonical_json
from edgedistill.rows import Answered

if TYPE_CHECKING:
    from edgedistill.teachers.protocol import Answer


def asked(row: Row) -> tuple[tuple[Any, ...], ...]:
    """Return a row as the row store keys it: (role, content) of each message, then as JSON what else it holds, before them
    ("tools", JSON) where there are any.
    """
    found: list[tuple[Any, ...]] = [("tools", canonical_json(row.tools))] if row.tools else []
    for message in guided(row.messages, row.guidance):
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        found.append((message["role"], message.get("content"), *([canonical_json(more)] if more else [])))
    return tuple(found)


def conversation(asked: tuple[tuple[Any, ...], ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return messages and tools of what ``asked`` wrote."""
    tools: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    for role, content, *more in asked:
        if role == "tools":
            tools = json.loads(content)
        else:
            messages.append({"role": role, "content": content, **(json.loads(more[0]) if more else {})})
    return messages, tools


def stored_answer(answer: Answer, key: str) -> Answered:
    """Return a teacher's answer as the row store keeps it under ``key``."""
    return Answered(
        key=key,
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        finish=answer.finish_reason,
        logprob=float(answer.logprob),
        tokens=answer.tokens,
        calls=answer.calls,
    )
