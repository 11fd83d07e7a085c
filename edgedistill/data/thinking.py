"""Thinking beside the answer: how a text is put together, and taken apart again.

The ways to teach it (``generate.style``). ``think`` and ``plan``: the student writes a block and then the answer, as reasoning
models do. ``rationale``: it learns two tasks, the answer alone and, when asked, why, so that it answers as fast as before
("Distilling Step-by-Step", Hsieh et al. 2023, arXiv:2305.02301). ``explanation`` and ``verification``: the answer first, then a
block that says why (Orca, arXiv:2306.02707), or checks it; who needs the answer alone stops before the block. In all of them the
teacher writes block and answer, answers are judged without their block, and a row's ``rationale`` is what a gold block holds.

No torch: ``plan`` and the filters read this.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from edgedistill.data.prompts import Row, appended

BLOCKS: dict[str, tuple[str, str]] = {
    "think": ("<think>", "</think>"),
    "plan": ("<plan>", "</plan>"),
    "rationale": ("<think>", "</think>"),
    "explanation": ("<why>", "</why>"),
    "verification": ("<check>", "</check>"),
}
"""The tags of each style that has a block."""
AFTER = ("explanation", "verification")
"""Those whose block stands after the answer."""
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Thai, Japanese, Chinese, Korean
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
LEAST_WORDS = 3
"""A block of fewer words is empty: "OK." is no thought."""
REQUEST = "Explain how to get to the answer."
"""What is added to a prompt to ask for the rationale alone."""
COLLAPSED = 0.5
"""Share of empty blocks beyond which thinking has collapsed."""


class Thought(NamedTuple):
    """A text in two parts. ``thinking`` is None where there is no block; its characters are those from ``start`` to ``end``."""

    thinking: str | None
    answer: str
    start: int
    end: int

    @property
    def after(self) -> bool:
        """Tell whether the block stands after an answer."""
        return self.thinking is not None and self.start > 0

    @property
    def words(self) -> int:
        """Count the words of the block; in scripts without spaces, the characters."""
        return len(WORD.findall(self.thinking or ""))

    @property
    def empty(self) -> bool:
        """Tell whether nothing was thought: no block, or one of a few words."""
        return self.words < LEAST_WORDS


def join(style: str, thinking: str, answer: str) -> str:
    """Put a block before an answer, or after it."""
    opening, closing = BLOCKS[style]
    if style in AFTER:
        return f"{answer}\n\n{opening}\n{thinking.strip()}\n{closing}"
    return f"{opening}\n{thinking.strip()}\n{closing}\n\n{answer}"


def split(text: str) -> Thought:
    """Take a text apart, whatever the style. A block before the answer that is not closed leaves none; one after it may be cut
    short, and the answer stands.

    Some chat templates open the block in the prompt: a text that only closes one begins inside it.
    """
    start = len(text) - len(text.lstrip())
    for opening, closing in dict.fromkeys(tags for style, tags in BLOCKS.items() if style not in AFTER):
        opened = text.startswith(opening, start)
        at = text.find(closing)
        if at < 0 and opened:
            return Thought(text[start + len(opening) :].strip(), "", 0, len(text))
        if at >= 0:
            end = at + len(closing)
            end += len(text[end:]) - len(text[end:].lstrip())
            return Thought(text[start + len(opening) * opened : at].strip(), text[end:], 0, end)
    for opening, closing in (BLOCKS[style] for style in AFTER):
        answer, opened, rest = text.partition(opening)
        if opened:
            answer = answer.rstrip()
            return Thought(rest.partition(closing)[0].strip(), answer, len(answer), len(text))
    return Thought(None, text, 0, 0)


def with_block(rows: Iterable[Row], style: str) -> tuple[Row, ...]:
    """Return the rows with their rationale as a block of the reference, where the style has one."""
    if style not in BLOCKS:
        return tuple(rows)
    return tuple(
        dataclasses.replace(row, reference=join(style, row.rationale, row.reference), rationale=None)
        if row.rationale and row.reference is not None
        else row
        for row in rows
    )


def two_tasks(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the rows as they are learnt in the style ``rationale``: the answer alone, and the rationale when asked for it."""
    found = []
    for row in rows:
        found.append(dataclasses.replace(row, rationale=None))
        if row.rationale:
            messages = tuple(asking_why(row.messages))
            why = dataclasses.replace(
                row, id=f"{row.id}+why", messages=messages, reference=row.rationale, rationale=None
            )
            found.append(why)
    return tuple(found)


def asking_why(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation with the request for a rationale at the end of its last message."""
    return appended(messages, REQUEST)


def share_of_empty(texts: Sequence[str]) -> float:
    """Return the share of texts without a thought; 0 of no texts."""
    return sum(split(text).empty for text in texts) / len(texts) if texts else 0.0
