"""Intervals: known values, properties, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.evals import statistics as s

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


def columns(pairs: list[tuple[int, int]]) -> tuple[list[float], list[float]]:
    return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


def test_known_intervals() -> None:
    # Wilson: Newcombe 1998, table I (81 of 263, 15 of 148, 0 of 20).
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = s.proportion(hits, n)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert s.proportion(20, 20).high == 1.0
    for df, t in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)):
        assert s.t_quantile(0.975, df) == pytest.approx(t, abs=2e-4)
        assert s.t_quantile(0.025, df) == pytest.approx(-t, abs=2e-4)


def test_what_a_sample_says_of_the_rest() -> None:
    # Many others: Clopper and Pearson's interval, of which 0 of n has the closed form 1 - 0.025 ** (1 / n).
    many = s.wrong_of_rest(0, 50, 10**6)
    assert (many.value, many.low, round(many.high, 3)) == (0, 0, 0.071)
    assert many.high == pytest.approx(1 - 0.025 ** (1 / 50), abs=1e-5)
    assert s.wrong_of_rest(50, 50, 10**6).low == pytest.approx(0.025 ** (1 / 50), abs=1e-5)
    # 5 of 50: 3.33 % and 21.81 %, as every table has it.
    five = s.wrong_of_rest(5, 50, 10**6)
    assert (round(five.low, 4), round(five.high, 4)) == (0.0333, 0.2181)
    for wrong, n, rest in ((-1, 5, 5), (6, 5, 5), (0, 0, 5), (0, 5, 0)):
        with pytest.raises(ValueError):
            s.wrong_of_rest(wrong, n, rest)


@pytest.mark.parametrize(("n", "rest"), [(1, 1), (5, 3), (12, 30), (30, 10)])
def test_the_rest_is_covered_whatever_is_wrong(n: int, rest: int) -> None:
    """Sum the chances of all samples, counted with whole numbers, whose interval holds what is left."""
    found = [s.wrong_of_rest(wrong, n, rest) for wrong in range(n + 1)]
    for bad in range(n + rest + 1):
        covered = 0
        for wrong in range(max(0, bad - rest), min(n, bad) + 1):
            share = (bad - wrong) / rest
            if found[wrong].low - 1e-12 <= share <= found[wrong].high + 1e-12:
                covered += math.comb(bad, wrong) * math.comb(n + rest - bad, n - wrong)
        assert covered / math.comb(n + rest, n) >= 0.95, bad


def test_an_effective_sample_is_rounded_outwards() -> None:
    found, inner = s.wrong_of_rest(2.4, 30.5, 400), s.wrong_of_rest(2, 30, 400)
    assert found.low <= inner.low and found.high >= s.wrong_of_rest(3, 30, 400).high - 1e-12
    assert found.value == pytest.approx(2.4 / 30.5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_proportion_lies_in_its_interval(case: tuple[int, int]) -> None:
    hits, n = case
    found, mirror = s.proportion(hits, n), s.proportion(n - hits, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirror.high)


@given(BITS)
def test_a_difference_is_antisymmetric(pairs: list[tuple[int, int]]) -> None:
    a, b = columns(pairs)
    found, mirror = s.paired_difference(a, b), s.paired_difference(b, a)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert found.low == pytest.approx(-mirror.high, abs=1e-9)
    assert found.low < found.high  # never a point, even where all rows agree


@given(BITS.filter(lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs)))
def test_a_retention_has_its_reciprocal(pairs: list[tuple[int, int]]) -> None:
    a, b = columns(pairs)
    found, mirror = s.retention(a, b), s.retention(b, a)
    assert 0 <= found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.mean(a) / np.mean(b))
    assert found.low == pytest.approx(1 / mirror.high, rel=1e-6)
    assert found.low < 1e-6 + found.value


def test_agreement_is_no_certainty() -> None:
    ones = [1.0] * 200
    kept = s.retention(ones, ones)
    assert kept.value == 1
    z2 = 1.959964**2
    assert kept.low == pytest.approx(200 / (200 + z2), rel=1e-4)  # a bootstrap says 1.0 here
    assert s.paired_difference(ones, ones).low < -0.015


def test_retention_of_nothing() -> None:
    with pytest.raises(UsageError, match="retention has no meaning"):
        s.retention([1.0, 0.0], [0.0, 0.0])
    none = s.retention([0.0] * 50, [1.0] * 50)
    assert (none.value, none.low) == (0, 0)
    assert 0 < none.high < 0.15


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 1)), min_size=2, max_size=20))
@settings(max_examples=20, deadline=None)
def test_graded_scores_are_resampled_the_same_way_each_time(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    for found, again in (
        (s.retention(a, b), s.retention(a, b)),
        (s.paired_difference(a, b), s.paired_difference(a, b)),
    ):
        assert found == again
        assert found.low <= found.value + 1e-9
        assert found.value <= found.high + 1e-9


def test_wrong_input() -> None:
    for wrong in (lambda: s.proportion(3, 2), lambda: s.proportion(0, 0), lambda: s.mean([])):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    with pytest.raises(ValueError, match="one length"):
        s.paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        s.mean([math.nan])


# Coverage: the share of samples whose interval holds the truth. With 600 samples one standard error at 95 % is 0.9 points.
SAMPLES = 600


def covered(truth: float, found: list[s.Estimate]) -> float:
    return float(np.mean([e.low <= truth <= e.high for e in found]))


def paired_bits(rng: np.random.Generator, n: int, p11: float, p10: float, p01: float) -> tuple[np.ndarray, np.ndarray]:
    kind = rng.choice(4, size=n, p=[p11, p10, p01, 1 - p11 - p10 - p01])
    return (kind <= 1).astype(float), ((kind == 0) | (kind == 2)).astype(float)


@pytest.mark.parametrize(
    ("n", "p11", "p10", "p01"), [(480, 0.90, 0.01, 0.06), (60, 0.85, 0.02, 0.10), (40, 0.3, 0.2, 0.3)]
)
def test_coverage_of_paired_bits(n: int, p11: float, p10: float, p01: float) -> None:
    rng = np.random.default_rng(1)
    pairs = [paired_bits(rng, n, p11, p10, p01) for _ in range(SAMPLES)]
    differences = [s.paired_difference(list(a), list(b)) for a, b in pairs]
    assert 0.925 <= covered(p10 - p01, differences) <= 0.99
    ratios = [s.retention(list(a), list(b)) for a, b in pairs]
    truth = (p11 + p10) / (p11 + p01)
    assert 0.925 <= covered(truth, ratios) <= 0.99
    # What a gate relies on: that a model below the bound rarely has its lower end above it.
    assert np.mean([e.low > truth for e in ratios]) <= 0.05


@pytest.mark.parametrize(("n", "p"), [(400, 0.97), (30, 0.5)])
def test_coverage_of_a_proportion(n: int, p: float) -> None:
    rng = np.random.default_rng(2)
    assert 0.93 <= covered(p, [s.proportion(int(k), n) for k in rng.binomial(n, p, SAMPLES)]) <= 0.98


def test_coverage_of_clustered_tokens() -> None:
    """Tokens of a row share an offset: an interval that takes them for independent covers half as often."""
    rng = np.random.default_rng(3)
    means, shares, naive = [], [], []
    for _ in range(SAMPLES):
        counts = rng.integers(5, 40, 40)
        tokens = [rng.normal(1.0 + rng.normal(0, 1), 1.0, c) for c in counts]
        means.append(s.clustered_mean([t.sum() for t in tokens], list(counts))[0])
        every = np.concatenate(tokens)
        half = 1.96 * every.std(ddof=1) / math.sqrt(every.size)
        naive.append(abs(every.mean() - 1.0) <= half)
        hits = [rng.random(c) < np.clip(0.85 + rng.normal(0, 0.08), 0, 0.999) for c in counts]
        shares.append(s.clustered_proportion([float(h.sum()) for h in hits], list(counts)))
    assert 0.92 <= covered(1.0, means) <= 0.975
    assert np.mean(naive) < 0.7
    assert 0.90 <= covered(0.849, shares) <= 0.985


def test_coverage_of_medians_and_graded_scores() -> None:
    rng = np.random.default_rng(4)
    truth, samples = math.exp(0), 150
    medians = [s.median(rng.lognormal(0, 0.3, 40)) for _ in range(samples)]
    assert 0.89 <= covered(truth, medians) <= 1
    ratios = []
    for _ in range(samples):
        drift = rng.lognormal(0, 0.5, 40)  # a machine whose load drifts: only the paired ratio stays still
        ratios.append(s.median_ratio(3 * drift * rng.lognormal(0, 0.05, 40), drift, paired=True))
    assert 0.89 <= covered(3.0, ratios) <= 1
    assert np.mean([e.high - e.low for e in ratios]) < 0.3
    graded = []
    for _ in range(samples):
        b = rng.beta(4, 2, 60)
        graded.append(s.retention(list(0.9 * b), list(b)))
    assert covered(0.9, graded) == 1 or max(e.high - e.low for e in graded) < 1e-9


def test_clusters_at_the_edges() -> None:
    estimate, error = s.clustered_mean([3.0], [3])
    assert (estimate.value, estimate.low, error) == (1.0, -math.inf, math.inf)
    same = s.clustered_proportion([5.0] * 10, [5] * 10)
    assert same.value == same.high == 1
    assert same.low == pytest.approx(s.proportion(10, 10).low)  # ten rows seen, not fifty tokens
    assert same.n == 50
    assert s.quantile(list(range(101)), 0.95).value == 95


def test_estimates_travel_as_json() -> None:
    estimate = s.proportion(3, 4)
    assert s.Estimate.from_json(estimate.to_json()) == estimate
    assert str(estimate) == "0.75 [0.3006, 0.9544] (n = 4)"


def test_a_perplexity_over_more_tokens_is_told_per_token_of_the_whole_vocabulary() -> None:
    # One text, 30 nats: 10 tokens in the whole vocabulary, 12 in the trimmed one.
    own = {"value": math.exp(30 / 12), "low": math.exp(24 / 12), "high": math.exp(36 / 12), "n": 5, "tokens": 12}
    found = s.perplexity_over(own, {"value": 7.0, "tokens": 10})
    assert found["value"] == pytest.approx(math.exp(30 / 10))
    assert (found["low"], found["high"]) == (pytest.approx(math.exp(2.4)), pytest.approx(math.exp(3.6)))
    assert (found["n"], found["tokens"]) == (5, 10)
    for whole in (None, {}, {"tokens": 12}):
        assert s.perplexity_over(own, whole) == own
