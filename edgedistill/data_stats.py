"""``data stats``: what a recipe's rows cost, and what they are, read from what is built of it so far."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from edgedistill.data.filters import COPIED_WORDS
from edgedistill.data.prompts import Row, load_rows
from edgedistill.data.stats import by_difficulty, distance, leaked, lengths, repeats
from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines
from edgedistill.rows import RowStore
from edgedistill.session import Session
from edgedistill.stages.filter import Filter
from edgedistill.tables import Sheet

PERCENT = "{:.0%}"


def collect_stats(session: Session, *, step: str = "filter", production: Path | None = None) -> dict[str, Any]:
    """Return the figures of a filter step. Raises UsageError where it is not built."""
    (found,) = session.plan.match(step)[:1]
    stage, entry = found.stage, session.store.load(found.key)
    if not isinstance(stage, Filter) or entry is None:
        raise UsageError(f"{step}: nothing is filtered yet", f"edgedistill build {session.path} --until {step}")
    rows: tuple[Row, ...] = stage.rows
    if stage.prompts is not None and (made := session.store.load(stage.prompts)) is not None:
        rows = tuple(load_rows(made.path / "prompts.jsonl"))
    kept = [json.loads(line) for line in json_lines(entry.path / "kept.jsonl")]
    answers = {"prompts": len(rows), "answers": 0, "tokens": 0}
    for key in (stage.answers, *(key for _, key in (*stage.others, *stage.recovered))):
        facts = one.facts if (one := session.store.load(key)) is not None else {}
        answers["answers"] += facts.get("rows", 0)
        answers["tokens"] += facts.get("tokens", 0)
    sources: dict[str, int] = {}
    for line in kept:
        sources[line["source"]] = sources.get(line["source"], 0) + 1
    stats: dict[str, Any] = {
        **answers,
        "kept": len(kept),
        "sources": sources,
        "yields": entry.facts.get("yields", []),
        "difficulty": by_difficulty(rows, kept, [name for name, _ in stage.recovered]),
        "lengths": lengths(rows, kept),
        "near_repeats": repeats(kept),
        "leaked": leaked(kept, session.inputs.suites),
        "spent": _spent(session, len(kept)),
    }
    if (entropy := _entropy(session)) is not None:
        stats["entropy"] = entropy
    if production is not None:
        traffic = [str(row.messages[-1].get("content") or "") for row in load_rows(production)]
        stats["production"] = {
            "n": len(traffic),
            **distance([str(row.messages[-1].get("content") or "") for row in rows], traffic),
        }
    return stats


def _spent(session: Session, kept: int) -> dict[str, Any]:
    """Return what the recipe has spent on served teachers in all its builds, and on each row that is kept."""
    found: dict[str, Any] = {}
    servers = [model.server for model in (session.inputs.teacher, *session.inputs.others)]
    for server in {one.account: one for one in servers if one is not None}.values():
        with closing(server.ledger(RowStore(session.store.root).path)) as ledger:
            spent = ledger.spent()
        found[server.account] = {"requests": spent.requests, "tokens": spent.tokens, "money": round(spent.money, 6)}
    if kept and found:
        found["tokens_per_kept"] = round(sum(one["tokens"] for one in found.values()) / kept, 1)
        money = sum(one["money"] for one in found.values() if isinstance(one, dict))
        found["money_per_kept"] = round(money / kept, 8)
    return found


def _entropy(session: Session) -> dict[str, float] | None:
    """Return the mean entropy of the teacher's distributions in nats a token, estimated by their draws at temperature 1; None
    where no such draws are stored.
    """
    steps = [one for one in session.plan.steps if "score" in one.ids]
    entry = session.store.load(steps[0].key) if steps else None
    if entry is None or not (entry.path / "targets").is_dir():
        return None
    from edgedistill.training.targets import iter_targets

    total = tokens = 0.0
    for path in sorted((entry.path / "targets").glob("*.parquet")):
        for _, _, targets in iter_targets(path):
            if targets.kind != "sampled" or targets.temperature != 1.0:
                return None
            total -= float((targets.counts * targets.logp).sum()) / targets.n
            tokens += len(targets.offsets) - 1
    return {"nats_per_token": total / tokens, "tokens": int(tokens)} if tokens else None


def stats_sheets(stats: dict[str, Any]) -> Iterable[Sheet]:
    """Lay out the figures as tables."""
    yield Sheet(
        title="filters",
        columns=("filter", "in", "out", "kept"),
        rows=[
            [one["filter"], str(one["in"]), str(one["out"]), PERCENT.format(one["out"] / max(1, one["in"]))]
            for one in stats["yields"]
        ],
        right=frozenset({1, 2, 3}),
        notes=list(_notes(stats)),
    )
    recovered = any(one["before"] != one["after"] for one in stats["difficulty"])
    yield Sheet(
        title="prompts with an answer of a teacher that was kept",
        columns=("prompts", "n", "kept", *(("after recovery",) if recovered else ())),
        rows=[
            [
                one["of"],
                str(one["prompts"]),
                *(
                    f"{one[name]} ({one[name] / one['prompts']:.0%})"
                    for name in (("before", "after") if recovered else ("before",))
                ),
            ]
            for one in stats["difficulty"]
        ],
        right=frozenset({1, 2, 3} if recovered else {1, 2}),
    )


def _notes(stats: dict[str, Any]) -> Iterable[str]:
    made = ", ".join(f"{count} by {name}" for name, count in stats["sources"].items())
    yield f"{stats['answers']} answers of {stats['tokens']:,} tokens to {stats['prompts']} prompts"
    yield f"{stats['kept']} rows kept: {made}"
    for name, what in (("prompt", "what users say"), ("taught", "what is taught")):
        one = stats["lengths"][name]
        yield f"{what}: {one['median']} words (median), {one['p95']} (95 %), {one['max']} (longest)"
    leaks = ", ".join(f"{count} of {name}" for name, count in stats["leaked"].items())
    yield f"{stats['near_repeats']} kept rows are nearly one before"
    yield f"{COPIED_WORDS} words in a row that a suite has, too: {leaks or 'none'}"
    if "entropy" in stats:
        one = stats["entropy"]
        yield f"the teacher's entropy: {one['nats_per_token']:.3f} nats a token (n = {one['tokens']:,})"
    for name, one in stats["spent"].items():
        if isinstance(one, dict):
            yield f"{name}: {one['requests']:,} requests, {one['tokens']:,} tokens, {one['money']:.4g} money in all builds"
    if "tokens_per_kept" in stats["spent"]:
        yield f"a kept row: {stats['spent']['tokens_per_kept']:,} tokens, {stats['spent']['money_per_kept']:.4g} money"
    if "production" in stats:
        one = stats["production"]
        yield (
            f"production (n = {one['n']}): {one['divergence']:.3f} bits from the prompts by words "
            f"(chance: {one['by_chance']:.3f}); "
            f"{one['unknown_words']:.0%} of its words are in no prompt"
        )
