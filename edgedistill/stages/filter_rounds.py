"""filter, in a round: few of the answers to a prompt are kept, and rows that were taught before may stand beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgedistill.data.answers import evenly
from edgedistill.data.sifting import Tally, best
from edgedistill.fingerprint import Key
from edgedistill.jsonl import each_line
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_thinking import ThinkingFilter
from edgedistill.step import Context


@dataclass(frozen=True, kw_only=True)
class RoundFilter(Filter):
    """Filter the answers of a round, written by the teacher or the student (``by``): of each prompt the first ``keep`` texts that
    pass and differ stay. Samples are independent draws, so the first is a fair draw from those that pass.

    A share ``replay`` of the rows that were taught ``before``, evenly spaced, stands beside them.
    """

    by: str
    keep: int
    before: Key | None
    replay: float

    def writer(self) -> str:
        """Return who wrote the answers."""
        return self.by

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first ``keep`` of those whose texts differ."""
        return best(passed, self.keep, "drawn")

    @property
    def estimates(self) -> bool:
        """Say nothing of the others: other answers were shown. Where one is word for word the same, its verdict counts."""
        return False

    def carried(self, ctx: Context) -> Iterable[dict[str, Any]]:
        """Yield the rows that are taught again, under ids of their own: their prompts may be answered anew."""
        if self.before is not None:
            file = ctx.path(self.before, "kept.jsonl")
            for text in evenly(each_line(file), self.replay, sum(1 for _ in each_line(file))):
                line = json.loads(text)
                yield {**line, "id": f"{line['id']}+before"}

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that the round teaches nothing, and what to do."""
        if answers:
            return super().nothing(answers)
        return "the student fails none of the prompts: this round has nothing to teach", "take the [[round]] out"

    def counted(self, tally: Tally) -> dict[str, Any]:
        """Return how many prompts were put, how many of them have an answer that passes, and how many rows were carried over."""
        return {
            "asked": tally.answers,
            "prompts": tally.prompts,
            "good": tally.good,
            "replayed": tally.carried,
        }


@dataclass(frozen=True, kw_only=True)
class ThinkingRoundFilter(ThinkingFilter, RoundFilter):
    """Filter the answers of a round that think first."""
