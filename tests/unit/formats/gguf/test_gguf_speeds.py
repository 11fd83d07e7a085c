"""A file's predicted speed counts what a token takes part in, and limits on it are kept, or said to be out of reach."""

from __future__ import annotations

import itertools

import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.allocate import solve
from edgedistill.formats.gguf.speeds import counted, fastest, figures, predict, speed_limit
from tests.unit.devices.test_kernels import some_kernels

SHAPES = {
    "token_embd.weight": (1000, 256), "blk.0.attn_q.weight": (256, 256), "blk.1.attn_q.weight": (256, 256),
    "blk.1.ffn_down.weight": (256, 512),
}  # fmt: skip
TYPES = ("Q4_0", "Q8_0")


def test_an_embedding_counts_where_it_is_the_head_and_prefill_has_no_head() -> None:
    inside = [name for name in SHAPES if name.startswith("blk.")]
    assert counted("pp512", SHAPES) == inside
    assert counted("tg128", SHAPES) == ["token_embd.weight", *inside]
    assert counted("tg128", {**SHAPES, "output.weight": (1000, 256)}) == [*inside, "output.weight"]


def test_a_speed_is_the_sum_of_its_parts() -> None:
    kernels = some_kernels()  # Q4_0 1 ps a weight, Q8_0 2 ps; 1 us a token beside in prefill, 3 us in decoding
    of = figures({"pp512": 100.0, "tg128": None, "peak_rss": 5}, kernels)
    assert list(of) == ["pp512"]
    types = dict.fromkeys(SHAPES, "Q8_0") | {"blk.0.attn_q.weight": "Q4_0"}
    seconds = 256 * 256 * 1e-12 + (256 * 256 + 256 * 512) * 2e-12 + 1e-6
    assert predict("pp512", of["pp512"], types, SHAPES) == pytest.approx(1 / seconds)
    assert fastest("pp512", of["pp512"], SHAPES) == pytest.approx(1 / (4 * 256 * 256 * 1e-12 + 1e-6))


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.9])
def test_the_choice_is_the_best_of_those_that_are_fast_enough(wanted: float) -> None:
    costs = {name: {"Q4_0": (1.0 + at, 0.5 / (at + 1)), "Q8_0": (2.0 + 2 * at, 0.01)} for at, name in enumerate(SHAPES)}
    ends = [
        1 / predict("tg128", figures({"tg128": 1.0}, some_kernels())["tg128"], dict.fromkeys(SHAPES, one), SHAPES)
        for one in TYPES
    ]
    least = 1 / (ends[0] + (1 - wanted) * (ends[1] - ends[0])) / 1.05
    of = figures({"tg128": least}, some_kernels())["tg128"]
    found = solve(costs, 1000, [speed_limit("tg128", of, SHAPES)], SHAPES)
    every = [dict(zip(SHAPES, types, strict=True)) for types in itertools.product(TYPES, repeat=len(SHAPES))]
    quick = [one for one in every if predict("tg128", of, one, SHAPES) >= 1.05 * least]
    best = min(quick, key=lambda one: sum(costs[name][type_][1] for name, type_ in one.items()))
    assert 0 < len(quick) < len(every)
    assert found.types == best


def test_a_speed_out_of_reach_says_what_is_reached() -> None:
    costs = {name: {"Q4_0": (10, 0.5), "Q8_0": (20, 0.01)} for name in SHAPES}
    for least in (780_000.0, 10_000_000.0):  # the second is more than a token with no weights at all
        of = figures({"pp512": least}, some_kernels())["pp512"]
        best = fastest("pp512", of, SHAPES)
        said = f"size, pp512 of {least:g} tokens/s; .* is predicted at {best:.4g}, and {1.05 * least:.4g} is needed"
        with pytest.raises(UsageError, match=said.replace("+", r"\+")):
            solve(costs, 1000, [speed_limit("pp512", of, SHAPES)], SHAPES)
    # A type whose speed nobody measured is not chosen.
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q\.weight has no type whose speed is known"):
        of = figures({"pp512": 1.0}, some_kernels())["pp512"]
        solve({name: {"Q6_K": (10, 0.5)} for name in SHAPES}, 1000, [speed_limit("pp512", of, SHAPES)], SHAPES)
