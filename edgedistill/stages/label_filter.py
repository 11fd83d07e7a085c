"""filter, where the answers are labels: of each prompt every distinct label is kept once, with its share of the answers.

The share is the row's weight in the loss, which makes the student learn the distribution (``data/labels.py``). Answers that are no
label are rejected, and are no part of the shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.data.answers import Answer
from edgedistill.data.labels import entropy, most_frequent, read_label, shares
from edgedistill.data.prompts import Row
from edgedistill.data.sifting import Judged, Sieve, Tally
from edgedistill.stages.filter import Filter


@dataclass(frozen=True, kw_only=True)
class LabelFilter(Filter):
    """Filter answers that are to be one of ``labels`` each, and weigh what is left ``by`` their shares."""

    labels: tuple[str, ...]
    by: str
    smoothing: float

    def last(self) -> list[Sieve]:
        """Drop what is no label, behind the recipe's filters; a label is taught as the recipe spells it."""
        return [Sieve("labels", self.named)]

    def named(self, row: Row, found: list[Answer]) -> Judged:
        """Judge by whether an answer is one of the labels."""
        read = [(one, read_label(one["text"], self.labels)) for one in found]
        return [(one, "no label") if label is None else ({**one, "text": label}, "") for one, label in read]

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one answer of each label, with its share; smoothing adds labels that nobody gave."""
        first = {one["text"]: one for one in reversed(passed)}
        found = self.distribution(passed)
        nobody = {"source": "smoothing", "row": ""}
        return [{**first.get(name, nobody), "text": name, "weight": share} for name, share in found.items()]

    def distribution(self, passed: list[dict[str, Any]]) -> dict[str, float]:
        """Return the target of one prompt: label -> share."""
        texts = [one["text"] for one in passed]
        if self.by == "majority":
            return {most_frequent(texts): 1.0} if texts else {}
        return shares(texts, self.labels, self.smoothing)

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that nothing is left to learn from, and what to do."""
        return (
            f"no answer of {answers} passed the filters and is one of the labels",
            "name the labels in the prompt, adapt the teacher first, or look at labels.names",
        )

    def tallying(self) -> LabelTally:
        """Return what counts the targets."""
        return LabelTally(self.distribution)

    def counted(self, tally: Tally) -> dict[str, Any]:
        """Return what the targets are like: prompts, those with more than one label among their answers, mean entropy in nats, and
        the share of each label in all.
        """
        found = tally.passed
        assert isinstance(found, LabelTally)
        return {**super().counted(tally), "labels": {"by": self.by, **found.to_json(self.labels)}}


class LabelTally:
    """Adds up the targets of the prompts that have one."""

    def __init__(self, distribution: Callable[[list[Answer]], dict[str, float]]) -> None:
        self.distribution = distribution
        self.prompts = self.split = self.answers = 0
        self.entropy = 0.0
        self.shares = Counter[str]()

    def add(self, passed: list[Answer]) -> None:
        """Take the answers to one prompt."""
        target = self.distribution(passed)
        if not passed:
            return
        self.prompts += 1
        self.split += len({one["text"] for one in passed}) > 1
        self.answers += len(passed)
        self.entropy += entropy(target)
        self.shares.update(target)

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return plain values; means over the prompts."""
        count = max(1, self.prompts)
        return {
            "prompts": self.prompts,
            "split": self.split,
            "entropy": self.entropy / count,
            "answers": self.answers / count,
            "shares": {name: self.shares[name] / count for name in labels} if self.prompts else {},
        }
