"""Intervals for every number that gets printed: proportions, paired differences, retention, means, medians.

Zeros and ones (right or wrong) get score intervals, which keep their coverage where the bootstrap collapses: when all
rows agree, a bootstrap of the difference is the point 0 and a gate would believe it. Graded scores get a percentile
bootstrap over rows with a fixed seed. tests/unit/evals/test_statistics.py simulates the coverage of each.

Sources: Wilson 1927 (one proportion); Tango 1998, Statistics in Medicine 17:891 (difference of paired proportions);
Nam and Blackwelder 2002, Statistics in Medicine 21:689 (ratio of paired proportions); Clopper and Pearson 1934,
Biometrika 26:404 (tails, for what a sample without replacement says of the rest); Efron and Tibshirani 1993
(bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from edgedistill.errors import UsageError

Numbers = Sequence[float] | np.ndarray

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Hold one number with its interval. ``n`` counts what was sampled (rows; tokens where the method says so)."""

    value: float
    low: float
    high: float
    n: int
    method: str
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Estimate:
        """Read what ``to_json`` wrote."""
        return cls(**data)

    @property
    def verdict(self) -> str:
        """Return what a difference says of a change: helped, hurt, or undecided where the interval holds 0."""
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def t_quantile(p: float, df: float) -> float:
    """Return the quantile of Student's t, within 1e-4 of exact."""
    if df < 1:
        raise ValueError(f"t_quantile: df must be at least 1, not {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        a = 4 * p * (1 - p)
        return 2 * (p - 0.5) * math.sqrt(2 / a)
    z = NormalDist().inv_cdf(p)
    # Cornish-Fisher in 1/df: enough for df >= 10; below, two Newton steps on the true distribution function.
    g = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    t = z + g[0] / df + g[1] / df**2 + g[2] / df**3
    if df < 10:
        const = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        for _ in range(3):
            xs = np.linspace(0.0, t, 4001)
            pdf = const * (1 + xs**2 / df) ** (-(df + 1) / 2)
            t -= (0.5 + float(np.trapezoid(pdf, xs)) - p) / float(pdf[-1])
    return t


def proportion(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """Estimate a proportion with Wilson's score interval. Raises ValueError unless 0 <= successes <= n and n > 0."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"proportion: {successes} of {n}")
    z = _z(level)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(value=p, low=low, high=high, n=n, method="wilson", level=level)


def wrong_of_rest(wrong: float, n: int | float, rest: int, level: float = LEVEL) -> Estimate:
    """Estimate the share that is wrong among ``rest`` items nobody looked at, when ``wrong`` of ``n`` drawn from all of them were.

    Exact for draws without replacement: the ends are the smallest and the largest number of wrong items in all that would give
    at least, and at most, so many wrong draws with more than half of what the level leaves (Clopper and Pearson 1934, with the
    hypergeometric distribution in place of the binomial; they meet where ``rest`` is large). ``n`` and ``wrong`` may be
    effective numbers: the ends are rounded outwards. ``value`` is the share of the draws. Raises ValueError unless
    0 <= wrong <= n, n >= 1 and rest > 0.
    """
    if not (0 <= wrong <= n + 1e-9 and n >= 1 and rest > 0):
        raise ValueError(f"wrong_of_rest: {wrong} of {n}, {rest} others")
    size, few, many = math.floor(n + 1e-9), math.floor(wrong + 1e-9), math.ceil(wrong - 1e-9)
    few, many, tail, total = min(few, size), min(many, size), (1 - level) / 2, size + rest
    # The tails move one way with the number of wrong items: the first that fails is found by halving.
    low = _first_whole(lambda bad: 1 - _at_most(few - 1, total, few + bad, size) > tail, 0, rest)
    over = _first_whole(lambda bad: _at_most(many, total, many + bad, size) <= tail, 0, rest + 1)
    high = max(low, over - 1)
    return Estimate(
        value=wrong / n, low=low / rest, high=high / rest, n=round(n), method="hypergeometric tails", level=level
    )


def _at_most(k: int, total: int, bad: int, n: int) -> float:
    """Return the chance of at most k bad ones among n draws without replacement from ``total``, of which ``bad`` are bad."""
    if bad > total:
        return 0.0

    def choose(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    whole = choose(total, n)
    chances = (
        math.exp(choose(bad, at) + choose(total - bad, n - at) - whole)
        for at in range(max(0, n - (total - bad)), min(k, bad, n) + 1)
    )
    return min(1.0, math.fsum(chances))


def _first_whole(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the first number from ``low`` on for which a condition holds that then goes on holding; ``high`` if none before it."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def mean(values: Numbers, level: float = LEVEL) -> Estimate:
    """Estimate the mean of per-row scores: Wilson for zeros and ones, else a percentile bootstrap over rows."""
    array = _array(values)
    if _binary(array):
        return proportion(int(array.sum()), array.size, level)
    return bootstrap(array, lambda sample: sample.mean(axis=1), level=level, method="bootstrap of the mean")


def paired_difference(a: Numbers, b: Numbers, level: float = LEVEL) -> Estimate:
    """Estimate mean(a) - mean(b) where a[i] and b[i] answer the same row.

    Zeros and ones: Tango's score interval. Graded: percentile bootstrap over rows. Raises ValueError on unequal
    lengths.
    """
    x, y = _paired(a, b)
    if not (_binary(x) and _binary(y)):
        return bootstrap(x - y, lambda sample: sample.mean(axis=1), level=level, method="paired bootstrap")
    n = x.size
    only_a, only_b = int(np.sum((x == 1) & (y == 0))), int(np.sum((x == 0) & (y == 1)))
    value = (only_a - only_b) / n

    def score(delta: float) -> float:
        c2 = -only_b * delta * (1 - delta)
        c1 = (2 * n - only_a + only_b) * delta - only_a - only_b
        q = (math.sqrt(max(0.0, c1 * c1 - 8 * n * c2)) - c1) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        distance = only_a - only_b - n * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    z = _z(level)
    low = _bisect(lambda delta: score(delta) - z, -1.0, value)
    high = _bisect(lambda delta: score(delta) + z, value, 1.0)
    return Estimate(value=value, low=low, high=high, n=n, method="tango", level=level)


def retention(artifact: Numbers, teacher: Numbers, level: float = LEVEL) -> Estimate:
    """Estimate mean(artifact) / mean(teacher) over the same rows; gates compare the lower bound.

    Zeros and ones: Nam and Blackwelder's score interval. Graded: percentile bootstrap over rows. Raises ValueError on
    unequal lengths, UsageError where the teacher's mean is 0 (there is nothing to retain).
    """
    x, y = _paired(artifact, teacher)
    if y.sum() <= 0:
        raise UsageError(
            f"the teacher scores 0 on all {y.size} rows, so retention has no meaning",
            "Set teacher.min_score for the suite, look at the teacher's answers, or adapt the teacher first.",
        )
    value = float(x.mean() / y.mean())
    if not (_binary(x) and _binary(y)):
        both = np.stack([x, y])
        return _bootstrap_rows(
            both, lambda s: s[0].mean(axis=1) / np.maximum(s[1].mean(axis=1), 1e-300), value, level, "paired bootstrap"
        )
    n = x.size
    both_right = int(np.sum((x == 1) & (y == 1)))
    only_a, only_t = int(np.sum((x == 1) & (y == 0))), int(np.sum((x == 0) & (y == 1)))
    total = both_right + only_a + only_t
    m = total / n

    def score(log_theta: float) -> float:
        theta = math.exp(log_theta)
        # Maximum likelihood of P(only the teacher is right) under ratio = theta: larger root of a quadratic.
        k = m * (1 - theta)
        c2 = (1 + theta) * total
        c1 = -((1 + theta) * k * (both_right + only_t) + m * (only_a + only_t))
        c0 = only_t * k * m
        q01 = (-c1 + math.sqrt(max(0.0, c1 * c1 - 4 * c2 * c0))) / (2 * c2)
        q10 = max(0.0, (q01 - k) / theta)
        variance = n * theta * (q01 + q10)
        distance = (both_right + only_a) - theta * (both_right + only_t)
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    z = _z(level)
    middle = math.log(max(value, 1e-9))
    low = 0.0 if value == 0 else math.exp(_bisect(lambda t: score(t) - z, -21.0, middle))
    high = math.exp(_bisect(lambda t: score(t) + z, middle, 21.0))
    return Estimate(value=value, low=low, high=high, n=n, method="nam-blackwelder", level=level)


def clustered_mean(sums: Numbers, counts: Numbers, level: float = LEVEL) -> tuple[Estimate, float]:
    """Estimate a mean over tokens that come in rows: (estimate, standard error).

    ``sums[i]`` is the sum over the tokens of row i, ``counts[i]`` their number. Tokens of one row are not independent,
    so rows are the sampled unit (linearised ratio estimator, Student's t with rows - 1 degrees of freedom). ``n``
    counts rows. With a single row the interval is unbounded.
    """
    s, c = _array(sums), _array(counts)
    if s.shape != c.shape or c.sum() <= 0:
        raise ValueError("clustered_mean: needs one sum and one count a row, and at least one token")
    rows = s.size
    value = float(s.sum() / c.sum())
    if rows < 2:
        return Estimate(value=value, low=-math.inf, high=math.inf, n=rows, method="clustered t", level=level), math.inf
    residual = s - value * c
    error = math.sqrt(float(np.sum(residual**2)) / (rows * (rows - 1))) / float(c.mean())
    half = t_quantile(0.5 + level / 2, rows - 1) * error
    return Estimate(value=value, low=value - half, high=value + half, n=rows, method="clustered t", level=level), error


def clustered_proportion(sums: Numbers, counts: Numbers, level: float = LEVEL) -> Estimate:
    """Estimate a share of tokens that come in rows: Wilson's interval at the effective sample size.

    ``sums[i]`` of the ``counts[i]`` tokens of row i are hits. The effective size is tokens over the design effect;
    where all tokens agree that cannot be seen, and it is the number of rows. ``n`` counts tokens.
    """
    s, c = _array(sums), _array(counts)
    estimate, error = clustered_mean(sums, counts, level)
    p, tokens = min(1.0, max(0.0, estimate.value)), float(c.sum())
    seen = 0 < p < 1 and 0 < error < math.inf
    size = min(tokens, p * (1 - p) / error**2) if seen else float(s.size)
    z = _z(level)
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    return Estimate(
        value=p,
        low=max(0.0, min(p, centre - half)),
        high=min(1.0, max(p, centre + half)),
        n=int(tokens),
        method="wilson, tokens clustered by row",
        level=level,
    )


def median(values: Numbers, level: float = LEVEL) -> Estimate:
    """Estimate a median with a percentile bootstrap."""
    return bootstrap(_array(values), lambda s: np.median(s, axis=1), level=level, method="bootstrap of the median")


def quantile(values: Numbers, q: float, level: float = LEVEL) -> Estimate:
    """Estimate the q-quantile (0..1) with a percentile bootstrap."""
    return bootstrap(
        _array(values), lambda s: np.quantile(s, q, axis=1), level=level, method=f"bootstrap of the {q:g}-quantile"
    )


def median_ratio(a: Numbers, b: Numbers, *, paired: bool, level: float = LEVEL) -> Estimate:
    """Estimate a ratio of medians; paired: the median of a[i] / b[i], from interleaved runs."""
    if paired:
        x, y = _paired(a, b)
        return bootstrap(x / y, lambda s: np.median(s, axis=1), level=level, method="bootstrap of the median ratio")
    x, y = _array(a), _array(b)
    rng = np.random.default_rng(0)
    draws = np.median(x[rng.integers(0, x.size, (RESAMPLES, x.size))], axis=1)
    draws = draws / np.median(y[rng.integers(0, y.size, (RESAMPLES, y.size))], axis=1)
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    value = float(np.median(x) / np.median(y))
    return Estimate(
        value=value, low=float(low), high=float(high), n=min(x.size, y.size), method="bootstrap of medians", level=level
    )


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: float = LEVEL,
    method: str = "bootstrap",
) -> Estimate:
    """Estimate ``statistic`` ([resamples, n] -> [resamples]) with a percentile bootstrap over n values, seed 0."""
    value = float(statistic(values[None, :])[0])
    return _bootstrap_rows(values[None, :], lambda s: statistic(s[0]), value, level, method)


def _bootstrap_rows(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], value: float, level: float, method: str
) -> Estimate:
    n = columns.shape[1]
    rng = np.random.default_rng(0)
    step = max(1, min(RESAMPLES, 2_000_000 // n))  # bounds memory for long inputs
    parts = []
    for start in range(0, RESAMPLES, step):
        index = rng.integers(0, n, (min(step, RESAMPLES - start), n))
        parts.append(statistic(columns[:, index]))
    low, high = np.quantile(np.concatenate(parts), [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value=value, low=float(low), high=float(high), n=n, method=method, level=level)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Find the root of a function that falls from low to high; an end where it never crosses."""
    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    for _ in range(80):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _array(values: Numbers) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("statistics need a list of at least one number")
    if not np.all(np.isfinite(array)):
        raise ValueError("statistics need finite numbers")
    return array


def _paired(a: Numbers, b: Numbers) -> tuple[np.ndarray, np.ndarray]:
    x, y = _array(a), _array(b)
    if x.shape != y.shape:
        raise ValueError(f"paired values must have one length, not {x.size} and {y.size}")
    return x, y


def _binary(array: np.ndarray) -> bool:
    return bool(np.all((array == 0) | (array == 1)))


def perplexity_over(facts: Mapping[str, Any], whole: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a perplexity (value, low, high, tokens) per token of another model's on the same text.

    A trimmed vocabulary cuts a text into more tokens, each easier than a whole word: its own perplexity would flatter it.
    """
    tokens, per = facts.get("tokens"), (whole or {}).get("tokens")
    if not tokens or not per or tokens == per:
        return dict(facts)
    power = tokens / per
    scaled = {key: facts[key] ** power for key in ("value", "low", "high") if facts.get(key) is not None}
    return {**facts, **scaled, "tokens": per}
