"""Labels: a closed set of answers, and what several answers to one prompt say of them as a distribution.

Where a teacher gives no logits, so many samples of each prompt are an empirical distribution over the labels. The cross-entropy of
that distribution q under the student is the sum over labels of q(label) x the negative log-likelihood of the label as a whole
answer: each label is a row of its own, and q(label) is the row's weight in the loss. That is exact, and so is its gradient.
"""

from __future__ import annotations

import functools
import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "\u2018\u2019\u201c\u201d\u2013\u2014\u2026")


def label_key(text: str) -> str:
    """Return a text without case, punctuation and spaces beyond one between words; one of nothing else as it is. Unlike
    ``normalised_text`` it keeps articles: "a" may be a label.
    """
    plain = " ".join(text.casefold().translate(_NO_PUNCTUATION).split())
    return plain or text.strip()


def read_label(text: str, names: Sequence[str]) -> str | None:
    """Return which label a text is; None where it is none."""
    return _by_key(tuple(names)).get(label_key(text))


@functools.lru_cache(maxsize=16)
def _by_key(names: tuple[str, ...]) -> dict[str, str]:
    # an answer about n labels is read n times: without this that took n² keys
    return {label_key(name): name for name in reversed(names)}


def shares(found: Sequence[str], names: Sequence[str], smoothing: float = 0.0) -> dict[str, float]:
    """Return the distribution that samples give: (count + smoothing) / (samples + smoothing x labels), in the order of ``names``;
    labels without a share are left out. {} where there are no samples: what is smoothed then is nothing.
    """
    if not found:
        return {}
    counts, total = Counter(found), len(found) + smoothing * len(names)
    return {name: (counts[name] + smoothing) / total for name in names if counts[name] + smoothing > 0}


def most_frequent(found: Sequence[str]) -> str:
    """Return the label that most samples have; among equals the one that was drawn first, which is a fair draw."""
    counts = Counter(found)
    return max(dict.fromkeys(found), key=lambda name: counts[name])


def score_shares(found: Sequence[Mapping[str, float]], scale: float) -> dict[str, float]:
    """Return the distribution that scores give, one mapping a sample with the same labels in each: in proportion to
    exp(mean score / scale). {} of no samples.
    """
    if not found:
        return {}
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in found[0]}
    top = max(means.values())
    return _normalised({name: math.exp((mean - top) / scale) for name, mean in means.items()})


def ranking_shares(found: Sequence[Sequence[str]], names: Sequence[str], decay: float) -> dict[str, float]:
    """Return the mean over samples of the distribution that an order gives: in proportion to 1, decay, decay^2, ... from the best;
    labels that are in no order are left out. {} of no samples.
    """
    shares = dict.fromkeys(names, 0.0)
    for order in found:
        for name, share in _normalised({name: decay**at for at, name in enumerate(order)}).items():
            shares[name] += share / len(found)
    return {name: share for name, share in shares.items() if share > 0}


def mean_shares(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of distributions over the same labels, each normalised. {} of none."""
    whole = [_normalised(one) for one in found]
    return {name: math.fsum(one[name] for one in whole) / len(whole) for name in whole[0]} if whole else {}


def without_small(distribution: Mapping[str, float], least: float) -> dict[str, float]:
    """Return a distribution without the labels whose share is under ``least`` times the largest."""
    top = max(distribution.values(), default=0.0)
    return _normalised({name: share for name, share in distribution.items() if share > 0 and share >= least * top})


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def entropy(distribution: Mapping[str, float]) -> float:
    """Return the entropy in nats."""
    return -math.fsum(share * math.log(share) for share in distribution.values() if share > 0)
