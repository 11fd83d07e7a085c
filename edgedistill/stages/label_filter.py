"""filter, where the answers are labels: of each prompt every distinct label is kept once, with its share of the answers.

The share is the row's weight in the loss, which makes the student learn the distribution (``data/labels.py``). Answers that are no
label are rejected, and are no part of the shares. Where the teacher was asked for scores of all labels or their order, or has
probabilities of them, each answer says something of several labels, and what is kept are the labels: one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgedistill.data.answers import Answer
from edgedistill.data.label_answers import read_ranking, read_scores
from edgedistill.data.labels import (
    entropy,
    mean_shares,
    most_frequent,
    ranking_shares,
    read_label,
    score_shares,
    shares,
    without_small,
)
from edgedistill.data.prompts import Row
from edgedistill.data.sifting import Judged, Sieve, Tally
from edgedistill.errors import StepFailed
from edgedistill.stages.filter import Filter
from edgedistill.step import later

DO_AS_ASKED = (
    "take a teacher that does as it is asked, or one that can write nothing else (llama.cpp, vLLM, labels.guided), allow more "
    'generate.max_new_tokens, or set labels.by = "samples"'
)


@dataclass(frozen=True, kw_only=True)
class LabelFilter(Filter):
    """Filter answers that are one of ``labels`` each, or say something of all, and weigh the labels ``by`` their shares."""

    labels: tuple[str, ...]
    by: str
    smoothing: float
    scale: float = later(0.0)  # scores: points that are e times the share
    decay: float = later(0.0)  # ranking: the share of a label over that of the one before it
    first: int = later(0)  # ranking: labels that are ordered; 0: all
    least: float = later(0.0)  # times the largest share: a label with less has none

    @property
    def plain(self) -> bool:
        """Tell whether an answer is a label."""
        return self.by in ("samples", "majority")

    def last(self) -> list[Sieve]:
        """Drop what is no label, behind the recipe's filters; a label is taught as the recipe spells it."""
        return [Sieve("labels", self.named)]

    def named(self, row: Row, found: list[Answer]) -> Judged:
        """Judge by whether an answer is one of the labels, or says of the labels what was asked."""
        return [self.understood(one) for one in found]

    def understood(self, answer: Answer) -> tuple[Answer, str]:
        """Return an answer with the label that it has for the ``best`` one, and what it ``said`` of all; or why it says nothing."""
        if self.plain:
            label = read_label(answer["text"], self.labels)
            return (answer, "no label") if label is None else ({**answer, "text": label, "best": label}, "")
        if self.by == "ranking":
            order, why = read_ranking(answer["text"], self.labels, self.first)
            return (answer, why) if why else ({**answer, "best": order[0], "said": order}, "")
        scores, why = read_scores(answer["text"], self.labels)
        if why:
            return answer, why
        return {**answer, "best": max(scores, key=lambda name: scores[name]), "said": scores}, ""

    def chosen(self, passed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one answer of each label, with its share; smoothing adds labels that nobody gave."""
        found = self.distribution(passed)
        if self.plain:
            first, nobody = {one["text"]: one for one in reversed(passed)}, {"source": "smoothing", "row": ""}
        else:
            first, nobody = {}, passed[0] if passed else {}
        return [{**first.get(name, nobody), "text": name, "weight": share} for name, share in found.items()]

    def distribution(self, passed: list[dict[str, Any]]) -> dict[str, float]:
        """Return the target of one prompt: label -> share."""
        if self.plain:
            texts = [one["text"] for one in passed]
            if self.by == "majority":
                return {most_frequent(texts): 1.0} if texts else {}
            return shares(texts, self.labels, self.smoothing)
        said = [one["said"] for one in passed]
        if self.by == "ranking":
            found = ranking_shares(said, self.labels, self.decay)
        else:
            found = score_shares(said, self.scale) if self.by == "scores" else mean_shares(said)
        return without_small(found, self.least)

    def nothing(self, answers: int) -> tuple[str, str]:
        """Say that nothing is left to learn from, and what to do."""
        if self.plain:
            return (
                f"no answer of {answers} passed the filters and is one of the labels",
                "name the labels in the prompt, adapt the teacher first, or look at labels.names",
            )
        return (
            f'no answer of {answers} that says something of all labels (labels.by = "{self.by}") passed the filters',
            DO_AS_ASKED,
        )

    def watch(self, texts: Iterable[str]) -> dict[str, Any]:
        """Look at all answers that ended: where none says something of the labels, tell why most of them do not."""
        gold = any(spec["otherwise"] == "gold" for spec in self.filters)
        if self.plain or self.more or gold:
            return {}
        whys = Counter(self.understood({"text": text})[1] for text in texts)
        if whys and not whys[""]:
            (why, count), total = whys.most_common(1)[0], whys.total()
            raise StepFailed(
                f'none of {total} answers is what labels.by = "{self.by}" asks for; most often ({count}): {why}',
                DO_AS_ASKED,
            )
        return {}

    def tallying(self) -> LabelTally:
        """Return what counts the targets."""
        return LabelTally(self.distribution)

    def counted(self, tally: Tally) -> dict[str, Any]:
        """Return what the targets are like: prompts, those whose answers differ in their (best) label, mean entropy in nats, and
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
        self.split += len({one["best"] for one in passed}) > 1
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
