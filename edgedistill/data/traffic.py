"""How far prompts are from a sample of production traffic: by what tells them apart, by the nearest of them, by length and by tags.

No model is asked. A classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545): logistic regression over hashed words,
pairs of words and letters learns on one half of both which is which, and is asked on the other. Where it cannot tell, its AUC is
0.5. One cut, not several folds: their scores depend on one another, and with five of them the 95 % interval held 0.5 in 87 of 100
cases where there was no difference. Texts that are the same, and prompts that were made of one another, are on one side of the cut,
and are one sample for the interval (DeLong's variance, 1988; of clusters: Obuchowski 1997).
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgedistill.data.columns import Columns
from edgedistill.data.filters import asked_in, words_of
from edgedistill.data.prompts import Row, parse_row
from edgedistill.data.sources import records
from edgedistill.data.stats import spread
from edgedistill.errors import UsageError
from edgedistill.jsonl import whole

if TYPE_CHECKING:
    import numpy as np

    from edgedistill.evals.statistics import Estimate

FEWEST = 50
"""Different texts of each side: with fewer the interval is wider than 0.3."""
MOST = 3000
"""Texts of each side that the classifier sees, half of them to learn by: its AUC is then known to 0.02."""
WIDTH = 1 << 14
"""Features. Two that fall together cost it a little of what it could tell."""
LETTERS = 4
NEAR = 0.5
"""Share of runs of four letters that two prompts have in common (Jaccard), from which on one is near the other."""
STEPS, RIDGE = 120, 1e-3
SHOWN, SHOWN_LETTERS = 5, 160


def load_traffic(path: Path) -> list[Row]:
    """Read a sample of traffic: rows in any container and form, but here an id may come twice, for users ask the same again, and a
    conversation may end with the answer. Raises UsageError where nothing can be read, or nobody asks anything.
    """
    columns, rows = Columns(), []
    for record, spot in records(path):
        where = f"{path}:{spot}"
        rows.append(_printable(parse_row(columns.fill(record, where), where, traces=True)))
    found = [row for row in rows if asked(row).strip()]
    if not found:
        raise UsageError(
            f"{path}: no user says anything in these {len(rows)} rows" if rows else f"{path}: no rows",
            'Write one JSON object a line, such as {"prompt": "Hello"}: what users sent.',
        )
    return found


def _printable(row: Row) -> Row:
    messages = tuple({**one, "content": whole(str(one.get("content") or ""))} for one in row.messages)
    return replace(row, id=whole(row.id), tags=tuple(map(whole, row.tags)), messages=messages)


def asked(row: Row) -> str:
    """Return what users say in a row, as one text."""
    return "\n".join(asked_in(row))


def compare(prompts: Sequence[Row], traffic: Sequence[Row]) -> dict[str, Any]:
    """Return how far prompts are from traffic, as plain values; ``apart`` is None, with ``why``, where there are too few."""
    own, theirs = [asked(row) for row in prompts], [asked(row) for row in traffic]
    groups = _groups(prompts, traffic, [*own, *theirs])
    first, second = groups[: len(own)], groups[len(own) :]
    nearest = near(own, theirs)
    few = sorted(range(len(own)), key=lambda at: _order(at, own[at]))[:MOST]
    among = near(own, [own[at] for at in few], first, [first[at] for at in few])
    found: dict[str, Any] = {
        "n": len(theirs),
        "different": len(set(second)),
        "apart": None,
        "without_near": _lonely(nearest, second).to_json(),
        "prompts_without_near": _lonely(among, [first[at] for at in few]).to_json(),
        "least_like": _least_like(prompts, traffic, theirs, nearest),
        "words": spread(len(words_of(text)) for text in theirs),
        "longer": _longer(own, theirs, groups).to_json(),
        "tags": _tags(prompts, traffic),
    }
    fewest = min(len(set(first)), len(set(second)))
    if fewest < FEWEST:
        what = "prompts" if len(set(first)) == fewest else "rows of traffic"
        found["why"] = (
            f"{fewest} different {what} are too few to tell them apart by: at least {FEWEST}, better {enough(0.05)}"
        )
    else:
        found["apart"] = told_apart(own, theirs, groups).to_json()
    return found


def enough(half: float) -> int:
    """Return how many different texts of each side make the 95 % interval of an AUC of 0.5 so wide to each side (Mann-Whitney: its
    variance is (2 n + 1) / (12 n²)), half of which are asked about; rounded up to tens.
    """
    return math.ceil(2 * 1.96**2 / (6 * half**2) / 10) * 10


# ── the classifier ──


def told_apart(own: Sequence[str], theirs: Sequence[str], groups: Sequence[int]) -> Estimate:
    """Estimate the AUC of a classifier that tells others' texts from own ones: 0.5 where it cannot, 1 where it always can. Texts of
    one group count as one sample; ``groups`` are those of ``own``, then those of ``theirs``.
    """
    import numpy as np

    texts = [*own, *theirs]
    side = np.repeat([0, 1], [len(own), len(theirs)])
    every = np.asarray(groups)
    order = [_order(at, text) for at, text in enumerate(texts)]
    chosen = np.sort(np.concatenate([_some(np.flatnonzero(side == one), order) for one in (0, 1)]))
    side, group = side[chosen], every[chosen]
    features = hashed([texts[at] for at in chosen])
    held = _half(side, group, [order[at] for at in chosen])
    weights = fit(features.part(~held), side[~held])
    return auc(features.part(held).times(weights), side[held], group[held])


def _order(at: int, text: str) -> int:
    """Return what texts are drawn by: as good as random, and the same again."""
    return zlib.crc32(f"{at} {text}".encode("utf-8", "surrogatepass"))


def _some(indices: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Return at most ``MOST`` of them, by their hashes."""
    import numpy as np

    return np.asarray(sorted(indices, key=lambda at: order[at])[:MOST], dtype=np.int64)


class Hashed(NamedTuple):
    """Features of texts, as a sparse matrix [texts, WIDTH] of rows of length 1: where its numbers stand, and they."""

    texts: int
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def times(self, weights: np.ndarray) -> np.ndarray:
        """Return the matrix times [WIDTH]. By sums and no BLAS, whose threads wait for one another on a machine that is busy."""
        import numpy as np

        return np.bincount(self.rows, self.values * weights[self.columns], self.texts)

    def back(self, error: np.ndarray) -> np.ndarray:
        """Return its transpose times [texts]."""
        import numpy as np

        return np.bincount(self.columns, self.values * error[self.rows], WIDTH)

    def part(self, chosen: np.ndarray) -> Hashed:
        """Return some of the rows, by a mask."""
        import numpy as np

        kept, number = chosen[self.rows], np.cumsum(chosen) - 1
        return Hashed(int(chosen.sum()), number[self.rows[kept]], self.columns[kept], self.values[kept])


def hashed(texts: Sequence[str]) -> Hashed:
    """Return the features of texts: words, pairs of words and runs of four letters, each hashed to a column with a sign (Weinberger
    et al. 2009), by the logarithm of how often it comes.
    """
    import numpy as np

    rows, columns, values = list[int](), list[int](), list[float]()
    for row, text in enumerate(texts):
        words = words_of(text)
        pairs = (f"{a} {b}" for a, b in itertools.pairwise(words))
        found: dict[int, float] = {}
        for name, times in Counter((*words, *pairs, *(f"_{run}" for run in _runs(text)))).items():
            code = zlib.crc32(name.encode("utf-8", "surrogatepass"))
            value = (1 if code >> 31 else -1) * (1 + math.log(times))
            found[code % WIDTH] = found.get(code % WIDTH, 0.0) + value
        length = math.sqrt(sum(value**2 for value in found.values())) or 1.0
        rows += [row] * len(found)
        columns += found.keys()
        values += [value / length for value in found.values()]
    return Hashed(len(texts), np.asarray(rows, np.int64), np.asarray(columns, np.int64), np.asarray(values))


def fit(features: Hashed, side: np.ndarray) -> np.ndarray:
    """Return the weights of a logistic regression with a ridge, both sides counting the same: float64 [WIDTH]. Nesterov's
    accelerated gradient; rows of length 1 bound the curvature by 1/4.
    """
    import numpy as np

    share = np.where(side == 1, 0.5 / max(1, (side == 1).sum()), 0.5 / max(1, (side == 0).sum()))
    weights = ahead = np.zeros(WIDTH)
    for step in range(1, STEPS + 1):
        error = (1 / (1 + np.exp(-features.times(ahead))) - side) * share
        before, weights = weights, ahead - (features.back(error) + RIDGE * ahead) / (0.25 + RIDGE)
        ahead = weights + (step - 1) / (step + 2) * (weights - before)
    return weights


def _half(side: np.ndarray, group: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Tell which texts are asked about: every second group of those of one side, of the other and of both. bool [texts]."""
    import numpy as np

    kinds: dict[int, tuple[int, int]] = {}
    for at, one in enumerate(group.tolist()):
        has, lowest = kinds.get(one, (0, 1 << 32))
        kinds[one] = (has | (1 << int(side[at])), min(lowest, order[at]))
    held = {one: at % 2 == 1 for at, one in enumerate(sorted(kinds, key=lambda one: (kinds[one], one)))}
    return np.asarray([held[one] for one in group.tolist()])


def auc(scores: np.ndarray, side: np.ndarray, group: np.ndarray) -> Estimate:
    """Estimate the chance that a text of side 1 has a higher score than one of side 0, ties counting half. ``n`` counts groups. The
    interval is taken on the logit, and where all or none are told apart it is that of a share of groups.
    """
    import numpy as np

    from edgedistill.evals.statistics import LEVEL, Estimate, proportion, t_quantile

    one, zero = scores[side == 1], scores[side == 0]
    places = np.empty(len(scores))
    places[side == 1], places[side == 0] = _above(one, zero), 1 - _above(zero, one)
    value = float(places[side == 1].mean())
    pull = (places - value) / np.where(side == 1, len(one), len(zero))
    _, number = np.unique(group, return_inverse=True)
    sums = np.bincount(number, pull)
    n = len(sums)
    error = math.sqrt(float(np.sum(sums**2)) * n / max(1, n - 1))
    method = "clustered DeLong"
    if not 0 < value < 1:
        fewest = min(len(np.unique(group[side == which])) for which in (0, 1))
        bound = proportion(fewest if value else 0, fewest)
        return Estimate(value=value, low=bound.low, high=bound.high, n=n, method=method)
    middle = math.log(value / (1 - value))
    half = t_quantile(0.5 + LEVEL / 2, max(1, n - 1)) * error / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-max(-700.0, min(700.0, middle + sign * half)))) for sign in (-1, 1))
    return Estimate(value=value, low=low, high=high, n=n, method=method)


def _above(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which share of the others each score is above, ties half."""
    import numpy as np

    ranks = np.sort(others)
    below, upto = np.searchsorted(ranks, scores, side="left"), np.searchsorted(ranks, scores, side="right")
    return (below + upto) / (2 * len(others))


def _groups(prompts: Sequence[Row], traffic: Sequence[Row], texts: Sequence[str]) -> list[int]:
    """Return a number for each row, the same for rows with the same text, for prompts of one family (those that were made of one
    another, with their ``seed_id``), and for rows of traffic with one id.
    """
    families = [*(f"prompt {row.seed_id or row.id}" for row in prompts), *(f"row {row.id}" for row in traffic)]
    above = list(range(len(texts)))

    def root(at: int) -> int:
        while above[at] != at:
            above[at] = at = above[above[at]]
        return at

    first: dict[str, int] = {}
    for at, (family, text) in enumerate(zip(families, texts, strict=True)):
        for name in ("text " + " ".join(words_of(text) or [text]), family):
            above[root(at)] = root(first.setdefault(name, at))
    return [root(at) for at in range(len(texts))]


# ── the nearest ──


def near(
    own: Sequence[str], theirs: Sequence[str], families: Sequence[int] = (), of: Sequence[int] = ()
) -> list[tuple[float, int]]:
    """Return for each of ``theirs`` how like it the nearest of ``own`` is, and which: the share of runs of four letters that they
    have in common (Jaccard), exactly, by an index of the runs. (0.0, -1): there is none that has one of them. With ``families``
    those of its own (``of``) do not count.
    """
    import numpy as np

    codes: dict[str, int] = {}
    runs, rows, sizes = [], [], np.zeros(len(own), dtype=np.int64)
    for row, text in enumerate(own):
        found = {codes.setdefault(run, len(codes)) for run in _runs(text)}
        runs += found
        rows += [row] * len(found)
        sizes[row] = len(found)
    order = np.argsort(np.asarray(runs, dtype=np.int64), kind="stable")
    places = np.asarray(rows, dtype=np.int64)[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(np.asarray(runs, dtype=np.int64), minlength=len(codes)))])
    known: dict[str, tuple[float, int]] = {}
    kin = np.asarray(families)
    for at, text in enumerate(theirs):
        if text in known:
            continue
        all_ = set(_runs(text))
        met = [codes[run] for run in all_ if run in codes]
        hits = (
            np.concatenate([places[starts[code] : starts[code + 1]] for code in met]) if met else np.zeros(0, np.int64)
        )
        known[text] = (0.0, -1)
        if len(hits):
            common = np.bincount(hits, minlength=len(own))
            shares = common / (sizes + len(all_) - common)
            if len(kin):
                shares[kin == of[at]] = 0.0
            best = int(np.argmax(shares))
            known[text] = (float(shares[best]), best if shares[best] else -1)
    return [known[text] for text in theirs]


def _lonely(nearest: Sequence[tuple[float, int]], groups: Sequence[int]) -> Estimate:
    """Estimate the share of texts that none is near to."""
    import numpy as np

    from edgedistill.evals.statistics import clustered_proportion

    _, number = np.unique(np.asarray(groups), return_inverse=True)
    return clustered_proportion(np.bincount(number, [share < NEAR for share, _ in nearest]), np.bincount(number))


def _runs(text: str) -> list[str]:
    """Return the runs of four letters of a text's words, with one space between them; of a shorter text the whole."""
    plain = f" {' '.join(words_of(text) or [text.strip()])} "
    return [plain[at : at + LETTERS] for at in range(max(1, len(plain) - LETTERS + 1))]


def _least_like(
    prompts: Sequence[Row], traffic: Sequence[Row], texts: Sequence[str], nearest: Sequence[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Return the texts of traffic that the nearest prompt is farthest from, each once."""
    found: list[dict[str, Any]] = []
    times, seen = Counter(texts), set[str]()
    for at in sorted(range(len(texts)), key=lambda at: (nearest[at][0], traffic[at].id)):
        share, best = nearest[at]
        if texts[at] in seen or share >= NEAR:
            continue
        seen.add(texts[at])
        text = " ".join(texts[at].split())
        found.append(
            {
                "id": traffic[at].id,
                "likeness": round(share, 3),
                "nearest": prompts[best].id if best >= 0 else None,
                "times": times[texts[at]],
                "text": text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 1] + "…",
            }
        )
        if len(found) == SHOWN:
            break
    return found


# ── lengths and tags ──


def _longer(own: Sequence[str], theirs: Sequence[str], groups: Sequence[int]) -> Estimate:
    """Estimate the chance that a text of traffic has more words than a prompt (ties half): 0.5 where they are as long."""
    import numpy as np

    lengths = np.asarray([len(words_of(text)) for text in (*own, *theirs)], dtype=np.float64)
    side = np.repeat([0, 1], [len(own), len(theirs)])
    return auc(lengths, side, np.asarray(groups))


def _tags(prompts: Sequence[Row], traffic: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each tag's share of the prompts and of the traffic, by how much they differ; none where traffic has no tags."""
    from edgedistill.evals.statistics import proportion

    own, theirs = (_tagged(rows) for rows in (prompts, traffic))
    if not theirs:
        return []
    found = [
        {
            "tag": tag,
            "prompts": proportion(own[tag], len(prompts)).to_json(),
            "traffic": proportion(theirs[tag], len(traffic)).to_json(),
        }
        for tag in own | theirs
    ]
    return sorted(found, key=lambda one: (-abs(one["prompts"]["value"] - one["traffic"]["value"]), one["tag"]))


def _tagged(rows: Iterable[Row]) -> Counter[str]:
    return Counter(tag for row in rows for tag in set(row.tags))
