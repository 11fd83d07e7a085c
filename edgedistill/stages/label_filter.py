"""filter, where the answers are labels: of each prompt every distinct label is kept once, with its share of the answers.

The share is the row's weight in the loss, which makes the student learn the distribution (``data/labels.py``). Answers that are no
label are rejected, and are no part of the shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from edgedistill.data.labels import entropy, most_frequent, read_label, shares
from edgedistill.stages.filter import Filter, Place, Sifted
from edgedistill.step import Progress


@dataclass(frozen=True, kw_only=True)
class LabelFilter(Filter):
    """Filter answers that are to be one of ``labels`` each, and weigh what is left ``by`` their shares."""

    labels: tuple[str, ...]
    by: str
    smoothing: float

    def sift(
        self,
        answers: Mapping[str, list[dict[str, Any]]],
        place: Place,
        progress: Progress = lambda done, total, what: None,
    ) -> Sifted:
        """Apply the recipe's filters, then drop what is no label; a label is taught as the recipe spells it."""
        found = super().sift(answers, place, progress)
        before = sum(map(len, found.alive.values()))
        alive: dict[str, list[dict[str, Any]]] = {}
        rejected = list(found.rejected)
        for row_id, passed in found.alive.items():
            named = [(one, read_label(one["text"], self.labels)) for one in passed]
            rejected += [{**one, "why": "no label"} for one, label in named if label is None]
            alive[row_id] = [{**one, "text": label} for one, label in named if label is not None]
        line = {"filter": "labels", "in": before, "out": sum(map(len, alive.values()))}
        return found._replace(alive=alive, rejected=rejected, yields=[*found.yields, line])

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

    def counted(
        self, answers: Mapping[str, list[Any]], passed: Mapping[str, list[Any]], carried: list[Any]
    ) -> dict[str, Any]:
        """Return what the targets are like: prompts, those with more than one label among their answers, mean entropy in nats, and
        the share of each label in all.
        """
        targets = [self.distribution(found) for found in passed.values() if found]
        split = sum(len({one["text"] for one in found}) > 1 for found in passed.values())
        total = Counter[str]()
        for target in targets:
            total.update(target)
        return {
            **super().counted(answers, passed, carried),
            "labels": {
                "by": self.by,
                "prompts": len(targets),
                "split": split,
                "entropy": fmean(map(entropy, targets)) if targets else 0.0,
                "answers": fmean(len(found) for found in passed.values() if found) if targets else 0.0,
                "shares": {name: total[name] / len(targets) for name in self.labels} if targets else {},
            },
        }
