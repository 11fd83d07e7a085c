"""The choice of types is the best one that keeps to all limits, and says which limit nothing keeps to."""

from __future__ import annotations

import itertools
import random
from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.allocate import GAP, Limit, front, groups, solve

TYPES: tuple[str, ...] = ("Q4_0", "Q5_0", "Q8_0")
COST = st.floats(1e-6, 1.0)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, tuple[int, float]]]:
    count = draw(st.integers(1, 4))
    return {
        f"blk.{at}.attn_q.weight": {name: (draw(st.integers(10, 500)), draw(COST)) for name in TYPES}
        for at in range(count)
    }


def every(table: dict[str, dict[str, tuple[int, float]]]) -> list[tuple[tuple[str, ...], int, float]]:
    """Return (types, bytes, cost) of every choice there is."""
    found = []
    for types in itertools.product(TYPES, repeat=len(table)):
        picked = [table[name][type_name] for name, type_name in zip(table, types, strict=True)]
        found.append((types, sum(size for size, _ in picked), sum(cost for _, cost in picked)))
    return found


@settings(max_examples=60, deadline=None)
@given(table=tables(), share=st.floats(0, 1), seconds=st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3))
def test_no_choice_is_better(
    table: dict[str, dict[str, tuple[int, float]]], share: float, seconds: list[float]
) -> None:
    choices = every(table)
    least, most = min(size for _, size, _ in choices), max(size for _, size, _ in choices)
    limit = round(least + share * (most - least))
    found = solve(table, limit)
    assert found.nbytes <= limit
    assert found.nbytes == sum(table[name][type_name][0] for name, type_name in found.types.items())
    best = min(cost for _, size, cost in choices if size <= limit)
    assert found.kld <= best * (1 + GAP) + 1e-5

    speed, shapes = dict(zip(TYPES, seconds, strict=True)), dict.fromkeys(table, (2, 3))
    of = [fsum(6 * speed[name] for name in types) for types, _, _ in choices]
    total = sorted(of)[len(of) // 2]
    allowed = [cost for (_, size, cost), used in zip(choices, of, strict=True) if size <= limit and used <= total]
    if allowed:
        quick = solve(table, limit, [Limit(what="decoding", of=speed, total=total)], shapes)
        assert fsum(6 * speed[name] for name in quick.types.values()) <= total * (1 + 1e-6)
        assert quick.kld <= min(allowed) * (1 + GAP) + 1e-5
    else:
        with pytest.raises(UsageError, match="all limits at once: size, decoding"):
            solve(table, limit, [Limit(what="decoding", of=speed, total=total)], shapes)


def test_the_best_is_found_where_one_matrix_costs_a_million_times_the_others() -> None:
    # HiGHS's tolerances are absolute: by the scale of the outlier all the others cost nothing.
    rng = random.Random(0)
    table = {}
    for at in range(40):
        cost = rng.uniform(0.5, 2) * (1e3 if at == 3 else 1e-4)
        table[f"blk.{at}.ffn_up.weight"] = {
            "Q4_0": (18, cost),
            "Q5_0": (22, cost / 4),
            "Q8_0": (34, cost / 400),
            "F16": (64, 0.0),
        }
    for limit in (40 * 18 + 500, 40 * 34, 40 * 50, 40 * 63):
        found = solve(table, limit)
        assert found.nbytes <= limit and found.proved
        assert found.kld <= (best := least_cost(table, limit)) * (1 + 2 * GAP), (limit, found.kld, best)


def least_cost(table: dict[str, dict[str, tuple[int, float]]], limit: int) -> float:
    """Return the least cost within ``limit`` bytes, by dynamic programming over the bytes."""
    best = [0.0] * (limit + 1)  # of the matrices so far, in so many bytes at most
    for types in table.values():
        best = [
            min((best[room - size] + cost for size, cost in types.values() if size <= room), default=float("inf"))
            for room in range(limit + 1)
        ]
    return best[limit]


def test_what_cannot_fit_says_how_small_it_gets() -> None:
    with pytest.raises(UsageError, match="under 5 bytes: the smallest has 10"):
        solve({"blk.0.attn_q.weight": {"Q4_0": (10, 1.0), "Q8_0": (20, 0.1)}}, 5)


def test_a_front_only_gains() -> None:
    table = {f"blk.{at}.ffn_up.weight": {"Q4_0": (18, 1.0 / (at + 1)), "Q8_0": (34, 0.1)} for at in range(6)}
    found = front(table, points=8)
    assert [one.nbytes for one in found] == sorted({one.nbytes for one in found})
    assert all(a.kld > b.kld for a, b in itertools.pairwise(found))
    assert found[0].nbytes == 6 * 18 and found[-1].nbytes == 6 * 34


def test_an_allocation_reads_by_part() -> None:
    types: dict[str, str] = dict(
        zip((f"blk.{at}.ffn_up.weight" for at in range(3)), ("Q4_0", "Q4_0", "Q6_K"), strict=True)
    )
    types["token_embd.weight"] = "Q8_0"
    shapes = {name: (2, 32) for name in types}
    assert groups(types, shapes) == [
        ("ffn_up", "Q4_0", 2, 128), ("ffn_up", "Q6_K", 1, 64), ("token_embd", "Q8_0", 1, 64)
    ]  # fmt: skip
