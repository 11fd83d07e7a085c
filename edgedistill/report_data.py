"""The sheets of what there is to learn from: what the filters let through at what price, and of which prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgedistill.report_cells import filled
from edgedistill.tables import Sheet


def interval(estimate: Mapping[str, Any], digits: int = 2) -> str:
    """Write an estimate with its interval, where that is known."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f}" + ("" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def filters_sheet(stats: Mapping[str, Any], notes: Sequence[str] = ()) -> Sheet:
    """Lay out what each filter let through, and what a row that is left had cost by then."""
    rows = []
    for one in stats.get("yields", ()):
        tokens, money = one.get("tokens_a_row"), one.get("money_a_row")
        share = f"{one['out'] / max(1, one['in']):.0%}"
        spent = ["" if tokens is None else f"{tokens:,.0f}", f"{money:.3g}" if money else ""]
        rows.append([one["filter"], str(one["in"]), str(one["out"]), share, *spent])
    columns = ("filter", "in", "out", "kept", "tokens a row left", "money a row left")
    sheet = Sheet(title="filters", columns=columns, rows=rows, right=frozenset({1, 2, 3, 4, 5}), notes=list(notes))
    return filled(sheet) if rows else sheet


def spent_notes(stats: Mapping[str, Any]) -> Iterable[str]:
    """Say what was spent, and what that is for each row that is kept."""
    spent = stats.get("spent") or {}
    for name, one in spent.get("accounts", {}).items():
        yield f"{name}: {one['requests']:,} requests, {one['tokens']:,} tokens, {one['money']:.4g} money in all builds"
    if each := spent.get("a_kept_row"):
        yield f"a kept row: {each['tokens_a_row']:,} tokens, {each['money_a_row']:.4g} money"


def labels_note(taught: Mapping[str, Any]) -> str:
    """Say what the targets are, where answers are labels: what they are made of, how many, and how soft."""
    by = {
        "samples": "the shares of their answers",
        "majority": "the most frequent answer",
        "scores": "the teacher's scores of all labels",
        "ranking": "the teacher's order of the labels",
        "logits": "the probabilities that the teacher has for labels",
    }[taught["by"]]
    plain = taught["by"] in ("samples", "majority")
    differ = "have answers of more than one label" if plain else "have answers that differ in the best label"
    return (
        f"{by}, of {taught['prompts']} prompts; {taught['split']} {differ}, {taught['answers']:.1f} answers a prompt "
        f"{'are labels' if plain else 'are read'}, mean entropy of the targets {taught['entropy']:.3f} nats"
    )


def difficulty_sheet(stats: Mapping[str, Any]) -> Sheet:
    """Lay out of which prompts an answer was kept, before a recovery and after it."""
    found = stats.get("difficulty", ())
    recovered = any(one["before"] != one["after"] for one in found)
    names = ("before", "after") if recovered else ("before",)
    shares = [(one, [share(one, name) for name in names]) for one in found]
    rows = [
        [
            one["of"],
            str(one["prompts"]),
            *(f"{one[name]}: {interval(part)}" for name, part in zip(names, parts, strict=True)),
        ]
        for one, parts in shares
    ]
    return Sheet(
        title="prompts with an answer of a teacher that was kept",
        columns=("prompts", "n", "kept", *(("after recovery",) if recovered else ())),
        rows=rows,
        right=frozenset({1, 2, 3} if recovered else {1, 2}),
        notes=["count: share [95 % interval]"] if rows else [],
    )


def share(one: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the share of a group's prompts with an answer that was kept (``name``: before, after), with Wilson's interval."""
    from edgedistill.evals.statistics import proportion

    return proportion(one[name], one["prompts"]).to_json()
