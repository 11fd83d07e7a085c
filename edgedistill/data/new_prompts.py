"""What becomes of the prompts that an augmenter writes: kept as rows beside their seeds, or dropped and why.

Nothing is dropped in silence: an empty text, a prompt that is there already, one that says nearly what another does (ROUGE-L, Lin
2004), and one that stands in a suite, whose score would prove nothing afterwards.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.data.filters import COPIED_WORDS, Contamination, asked_in, words_of
from edgedistill.data.prompts import Row, prompt_key


def last_said(row: Row) -> str:
    """Return the user's last message, which augmenters write anew; "" where a row ends with a tool's result."""
    last = row.messages[-1]
    return str(last.get("content") or "") if last["role"] == "user" else ""


def common_words(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words, a bit for each word of ``one`` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(one)) - 1
    free = every  # a zero for each word of `one` that ends a longer subsequence than the word before it
    for word in other:
        met = free & places.get(word, 0)
        free = (free + met | free - met) & every
    return len(one) - free.bit_count()


def rouge_l(one: str, other: str) -> float:
    """Return the F measure of ROUGE-L of two texts: twice their common words in order over all their words."""
    a, b = words_of(one), words_of(other)
    return 2 * common_words(a, b) / (len(a) + len(b)) if a and b else 0.0


class Nearest:
    """Find texts that are near one by ROUGE-L. Those that share none of its rarer words cannot be, and are not compared."""

    def __init__(self) -> None:
        self._texts: list[list[str]] = []
        self._with: dict[str, list[int]] = {}  # word -> texts

    def add(self, text: str) -> None:
        """Take in a text."""
        words = words_of(text)
        for word in dict.fromkeys(words):
            self._with.setdefault(word, []).append(len(self._texts))
        self._texts.append(words)

    def reaches(self, text: str, similarity: float) -> bool:
        """Tell whether a text taken in is at least so similar."""
        words = words_of(text)
        # 2 common >= similarity (words + other) and other >= common: so many words are common at least. Two texts that have so many
        # in common share one of any words that are not fewer than all but so many and one.
        common = max(1, math.ceil(similarity / (2 - similarity) * len(words) - 1e-9))
        rare = sorted(words, key=lambda word: len(self._with.get(word, ())))[: len(words) - common + 1]
        for at in {at for word in dict.fromkeys(rare) for at in self._with.get(word, ())}:
            other = self._texts[at]
            least = similarity * (len(words) + len(other))
            if 2 * min(len(words), len(other)) >= least and 2 * common_words(words, other) >= least:
                return True
        return False


class Pool:
    """Rows and the new ones that come of them. ``kind`` and, where there is one, its way become tags; ``suites`` stay unseen."""

    def __init__(self, kind: str, rows: Sequence[Row], suites: Mapping[str, Sequence[Row]]) -> None:
        self.kind, self.rows = kind, tuple(rows)
        self.children: list[Row] = []
        self.dropped: list[dict[str, Any]] = []
        self._ids = {row.id for row in rows}
        self._said = {prompt_key(row) for row in rows}
        self._contamination = Contamination(suites, COPIED_WORDS)
        self._tested = {prompt_key(row): f"{name} {row.id}" for name, tested in suites.items() for row in tested}

    def drop(self, parent: Row, text: str, why: str, way: str = "") -> None:
        """Note what is not used."""
        self.dropped.append({"id": parent.id, "kind": self.kind, "way": way, "text": text, "why": why})

    def offer(
        self,
        parent: Row,
        text: str,
        *,
        way: str = "",
        of: Row | None = None,
        alone: bool = False,
        evolution: int | None = None,
        guidance: str | None = None,
        tags: Sequence[str] = (),
    ) -> Row | None:
        """Make a row of a new prompt, or drop it. It is put where ``parent`` has its last message, or stands ``alone``; ``of`` is
        the row that it is named after, the parent when left out.
        """
        messages = ({"role": "user", "content": text},)
        if not alone:
            messages = (*parent.messages[:-1], *messages)
        named = of or parent
        row = Row(
            id=self._name(named.id),
            messages=messages,
            tags=tuple(dict.fromkeys((*parent.tags, self.kind, *([f"{self.kind}:{way}"] if way else []), *tags))),
            tools=() if alone else parent.tools,
            split=parent.split,
            seed_id=parent.seed_id or parent.id,
            evolution=parent.evolution if evolution is None else evolution,
            guidance=guidance or parent.guidance,
        )
        why = self._flaw(row, text)
        if why:
            self.drop(parent, text, why, way)
            return None
        self._ids.add(row.id)
        self._said.add(prompt_key(row))
        self.children.append(row)
        return row

    def reasons(self) -> dict[str, int]:
        """Count what was dropped, by the first words of why."""
        return dict(Counter(one["why"].partition(":")[0] for one in self.dropped))

    def lines(self) -> str:
        """Return all rows as JSONL, the new ones last."""
        return "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in (*self.rows, *self.children))

    def _flaw(self, row: Row, text: str) -> str:
        if not text.strip():
            return "empty"
        key = prompt_key(row)
        if key in self._said:
            return "repeated"
        where = self._tested.get(key) or self._contamination.found_in(asked_in(row))
        return f"contaminated: as in {where}" if where else ""

    def _name(self, row_id: str) -> str:
        number = 1
        while (name := f"{row_id}+{self.kind}{number}") in self._ids:
            number += 1
        return name
