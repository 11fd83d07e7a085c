"""Lessons in correcting a wrong answer: it stands in the conversation, the user objects, and what comes next is learnt.

What comes next is the text that was kept, or, with ``analysis``, what the teacher writes when it is told that its answer is wrong:
where the mistake is, and another answer (error-analysis traces; Learning from Mistakes, An et al. 2023, arXiv:2310.20689).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from edgedistill.data.prompts import Message, Row
from edgedistill.data.thinking import split

WRONG = "That is not right. Find the mistake and answer again."
"""What the user says to a wrong answer."""


def wrong_answers(
    rejected: Iterable[Mapping[str, Any]], most: int, shown: Callable[[str], str]
) -> dict[str, list[str]]:
    """Return, by row, what users see (``shown``) of the answers that missed the reference: the first ``most`` that differ."""
    found: dict[str, dict[str, None]] = {}
    for answer in rejected if most else ():
        if answer["why"].startswith("reference") and len(texts := found.setdefault(answer["id"], {})) < most:
            texts[shown(answer["text"])] = None
    return {row_id: list(texts) for row_id, texts in found.items()}


def objection(messages: Sequence[Message], shown: str) -> list[Message]:
    """Return the conversation after a wrong answer and the objection to it."""
    return [*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": WRONG}]


def to_analyse(rows: Iterable[Row], rejected: Iterable[Mapping[str, Any]], most: int) -> list[Row]:
    """Return the conversations in which the teacher is told that an answer of its own is wrong, as rows."""
    wrong = wrong_answers(rejected, most, lambda text: split(text).answer)
    return [
        dataclasses.replace(row, id=f"{row.id}+fix{number}", messages=tuple(objection(row.messages, shown)))
        for row in rows
        for number, shown in enumerate(wrong.get(row.id, ()), 1)
    ]
