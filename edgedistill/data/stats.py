"""What there is to learn from, in figures: what answers cost, what the filters left of them, and how the rows are made up."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from edgedistill.data.filters import COPIED_WORDS, SIMILARITY, Contamination, Seen, asked_in, words_of
from edgedistill.data.prompts import Row
from edgedistill.data.recovery import NO_TEACHER

THIRDS = ("shortest prompts", "middle prompts", "longest prompts")
FEW_TAGS = 30


def prompt_of(name: str, prompts: Collection[str]) -> str:
    """Return the prompt that a kept line answers, "" where it is none of these: a second text of one has the id ``ID#1``, a lesson
    ``ID+why``, and an id may hold such a sign itself.
    """
    while name and name not in prompts:
        name = name[: max(name.rfind("#"), name.rfind("+"), 0)]
    return name


def answered(kept: Iterable[Mapping[str, Any]], prompts: Collection[str], without: Collection[str] = ()) -> set[str]:
    """Return which of the prompts have a kept answer of a teacher, one of those ``without`` left out."""
    written = (line["id"] for line in kept if line["source"] not in (*NO_TEACHER, *without))
    return {prompt_of(name, prompts) for name in written} - {""}


def spread(values: Iterable[int]) -> dict[str, int]:
    """Return n, median, 95th percentile and the greatest of some numbers; zeros where there are none."""
    found = sorted(values)
    if not found:
        return {"n": 0, "median": 0, "p95": 0, "max": 0}
    return {
        "n": len(found),
        "median": found[len(found) // 2],
        "p95": found[min(len(found) - 1, math.ceil(0.95 * len(found)) - 1)],
        "max": found[-1],
    }


def lengths(rows: Sequence[Row], kept: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how long what users say, and what is taught, is: in words."""
    return {
        "prompt": spread(sum(len(words_of(text)) for text in asked_in(row)) for row in rows),
        "taught": spread(len(words_of(line["text"])) for line in kept),
    }


def by_difficulty(
    rows: Sequence[Row], kept: Sequence[Mapping[str, Any]], recovering: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Return, of the prompts with each tag and of each third by length, how many have an answer that was kept: of the teachers
    before a recovery, and of any teacher. Where the two differ from group to group, a set without the hard prompts is biased.
    """
    names = {row.id for row in rows}
    first, any_ = answered(kept, names, tuple(recovering)), answered(kept, names)
    groups: dict[str, list[str]] = {}
    for row in rows:
        for tag in row.tags:
            groups.setdefault(tag, []).append(row.id)
    common = sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:FEW_TAGS]
    order = sorted(rows, key=lambda row: (sum(map(len, asked_in(row))), row.id))
    cuts = [len(order) * at // 3 for at in range(4)]
    thirds = [(name, [row.id for row in order[cuts[at] : cuts[at + 1]]]) for at, name in enumerate(THIRDS)]
    return [
        {"of": name, "prompts": len(ids), "before": len(first & set(ids)), "after": len(any_ & set(ids))}
        for name, ids in (*common, *thirds)
        if ids
    ]


def repeats(kept: Sequence[Mapping[str, Any]], similarity: float = SIMILARITY) -> int:
    """Return how many kept rows are nearly one before (`Seen`): what users say and what is taught."""
    seen = Seen(similarity)
    return sum(seen.before("\n".join([*_asked(line), line["text"]])) for line in kept)


def leaked(
    kept: Sequence[Mapping[str, Any]], suites: Mapping[str, Sequence[Row]], words: int = COPIED_WORDS
) -> dict[str, int]:
    """Return how many kept rows have text of each suite (`Contamination`)."""
    tested = Contamination(suites, words)
    places = (tested.found_in([*_asked(line), line["text"]]) for line in kept)
    return dict(Counter(place.partition(" ")[0] for place in places if place))


def distance(prompts: Sequence[str], others: Sequence[str]) -> dict[str, float]:
    """Return how far two sets of texts are from each other by their words: the Jensen-Shannon divergence in bits (0: the same, 1:
    no word in common; Lin 1991), that of two random halves of ``prompts`` as what chance alone gives, and the share of the
    others' words that no prompt has.
    """
    order = sorted(prompts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    own, theirs = _counts(prompts), _counts(others)
    half = len(order) // 2
    return {
        "divergence": _divergence(own, theirs),
        "by_chance": _divergence(_counts(order[:half]), _counts(order[half:])),
        "unknown_words": sum(n for word, n in theirs.items() if word not in own) / max(1, theirs.total()),
    }


def _asked(line: Mapping[str, Any]) -> list[str]:
    return [str(message.get("content") or "") for message in line["messages"] if message["role"] == "user"]


def _counts(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in words_of(text))


def _divergence(one: Counter[str], other: Counter[str]) -> float:
    if not one or not other:
        return 0.0 if one == other else 1.0
    n, m = one.total(), other.total()
    total = 0.0
    for word in one.keys() | other.keys():
        p, q = one[word] / n, other[word] / m
        middle = (p + q) / 2
        total += sum(share * math.log2(share / middle) / 2 for share in (p, q) if share)
    return max(0.0, total)
