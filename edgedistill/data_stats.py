"""``data stats``: what a recipe's rows cost, and what they are, read from what is built of it so far.

A sample of production traffic is given on the command line, not in the recipe: it is drawn anew now and then, often may not lie
beside the recipe, and no byte of what is built depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edgedistill.data.filters import COPIED_WORDS
from edgedistill.data.prompts import Row, load_rows
from edgedistill.data.stats import by_difficulty, distance, leaked, lengths, prompt_of, repeats
from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines
from edgedistill.plan import Step
from edgedistill.report_data import difficulty_sheet, filters_sheet, interval, labels_note, spent_notes
from edgedistill.rows import RowStore
from edgedistill.session import Session
from edgedistill.stages.filter import Filter
from edgedistill.stages.score import Score
from edgedistill.store import Entry
from edgedistill.tables import Sheet

LISTED = 12
"""Tags that a table lists."""
ENDS = 3
"""Rows of the lowest, and of the highest, entropy that are named."""


def collect_stats(session: Session, *, step: str = "filter", production: Path | None = None) -> dict[str, Any]:
    """Return the figures of a filter step. Raises UsageError where it is not built."""
    (found,) = session.plan.match(step)[:1]
    stage, entry = found.stage, session.store.load(found.key)
    if not isinstance(stage, Filter) or entry is None:
        raise UsageError(f"{step}: nothing is filtered yet", f"edgedistill build {session.path} --until {step}")
    rows, kept = _rows_and_kept(session, stage, entry)
    stats: dict[str, Any] = {
        **_figures(session, stage, entry, rows, kept),
        "lengths": lengths(rows, kept),
        "near_repeats": repeats(kept),
        "leaked": leaked(kept, session.inputs.suites),
    }
    if (entropy := _entropy(session, found, rows, kept)) is not None:
        stats["entropy"] = entropy
    if production is not None:
        from edgedistill.data.traffic import asked, compare, load_traffic

        traffic = load_traffic(production)
        stats["production"] = {
            **compare(rows, traffic),
            **distance([asked(row) for row in rows], [asked(row) for row in traffic]),
        }
    return stats


def step_figures(session: Session, step: str, entry: Entry) -> dict[str, Any]:
    """Return what a report shows of the entry of a filter: the figures that are read in one go. Nothing where it is none."""
    (found,) = session.plan.match(step)[:1]
    stage = found.stage
    return _figures(session, stage, entry, *_rows_and_kept(session, stage, entry)) if isinstance(stage, Filter) else {}


def _rows_and_kept(session: Session, stage: Filter, entry: Entry) -> tuple[tuple[Row, ...], list[dict[str, Any]]]:
    rows = stage.rows
    if stage.prompts is not None and (made := session.store.load(stage.prompts)) is not None:
        rows = tuple(load_rows(made.path / "prompts.jsonl"))
    return rows, [json.loads(line) for line in json_lines(entry.path / "kept.jsonl")]


def _figures(
    session: Session, stage: Filter, entry: Entry, rows: Sequence[Row], kept: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what was asked, what is left of it after each filter, whose prompts that is, and what it cost."""
    answers = {"prompts": len(rows), "answers": 0, "tokens": 0}
    for key in (stage.answers, *(key for _, key in (*stage.others, *stage.recovered))):
        facts = one.facts if (one := session.store.load(key)) is not None else {}
        answers["answers"] += facts.get("rows", 0)
        answers["tokens"] += facts.get("tokens", 0)
    sources: dict[str, int] = {}
    for line in kept:
        sources[line["source"]] = sources.get(line["source"], 0) + 1
    spent = _spent(session, len(kept))
    return {
        **answers,
        "kept": len(kept),
        "sources": sources,
        "yields": [{**line, **_each(spent, line["out"])} for line in entry.facts.get("yields", [])],
        "difficulty": by_difficulty(rows, kept, [name for name, _ in stage.recovered]),
        "spent": spent,
        **({"labels": labels} if (labels := entry.facts.get("labels")) else {}),
    }


def _spent(session: Session, kept: int) -> dict[str, Any]:
    """Return what the recipe has spent on served models in all its builds: each account, all together, and for each row that is
    kept. Nothing where all of them are here.
    """
    accounts: dict[str, dict[str, Any]] = {}
    models = (session.inputs.teacher, *session.inputs.others, session.inputs.judge)
    for server in (model.server for model in models if model is not None):
        if server is None or server.account in accounts:
            continue
        with closing(server.ledger(RowStore(session.store.root).path)) as ledger:
            spent = ledger.spent()
        accounts[server.account] = {
            "requests": spent.requests,
            "tokens": spent.tokens,
            "money": round(spent.money, 6),
        }
    if not accounts:
        return {}
    total = {name: sum(one[name] for one in accounts.values()) for name in ("requests", "tokens", "money")}
    return {"accounts": accounts, **total, "a_kept_row": _each(total, kept)}


def _each(spent: Mapping[str, Any], rows: int) -> dict[str, float]:
    """Return what is spent for each of so many rows: tokens and money. Nothing where there is none, or nothing is spent."""
    if not rows or not spent:
        return {}
    return {"tokens_a_row": round(spent["tokens"] / rows, 1), "money_a_row": round(spent["money"] / rows, 8)}


def _entropy(
    session: Session, filtered: Step, rows: Sequence[Row], kept: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the mean entropy of the teacher's distributions in nats a token, of all its tokens, by tag, and of the rows where it
    is least and most, with intervals over prompts; None where no such distributions are stored. Rows that a hedge answers are no
    teacher's.
    """
    path = _targets(session, filtered)
    if path is None:
        return None
    from edgedistill.training.entropy import entropies
    from edgedistill.training.targets import iter_targets, read_header

    prompts = {row.id: row for row in rows}
    hedged = {line["id"] for line in kept if line["source"] == "hedge"}
    found: dict[str, tuple[float, float, int]] = {}
    whole = True  # as against bounds
    for file in sorted(path.glob("*.parquet")):
        vocabulary = read_header(file).vocab_size
        for name, _, targets in iter_targets(file):
            bounds = entropies(targets, vocabulary)
            if bounds is None:
                return None
            if name not in hedged and targets.positions:
                found[name] = (float(bounds[0].sum()), float(bounds[1].sum()), targets.positions)
            whole = whole and targets.kind != "top-k"
    if not found:
        return None
    by: dict[str, list[str]] = {}
    for name in found:
        for tag in prompts[prompt].tags if (prompt := prompt_of(name, prompts)) in prompts else ():
            by.setdefault(tag, []).append(name)
    order = sorted(found, key=lambda name: (found[name][0] / found[name][2], name))
    every = _mean(found, found, prompts)
    return {
        "nats_per_token": every["value"],
        "estimate": every,
        **({} if whole else {"at_most": sum(high for _, high, _ in found.values()) / every["tokens"]}),
        "tokens": every["tokens"],
        "by_tag": sorted(
            ({"tag": tag, **_mean(found, names, prompts)} for tag, names in by.items()),
            key=lambda one: (-one["value"], one["tag"]),
        ),
        "lowest": [_row(name, found) for name in order[:ENDS]],
        "highest": [_row(name, found) for name in reversed(order[ENDS:][-ENDS:])],
    }


def _targets(session: Session, filtered: Step) -> Path | None:
    """Return the folder of the distributions along what a filter kept: those of the score step that reads it, or, where something
    stands in between, of the one with the same name.
    """
    steps = [one for one in session.plan.steps if isinstance(one.stage, Score)]
    names = {name.replace("filter", "score", 1) for name in filtered.ids}
    own = [one for one in steps if isinstance(one.stage, Score) and one.stage.kept == filtered.key]
    for one in own or [one for one in steps if names & set(one.ids)]:
        entry = session.store.load(one.key)
        if entry is not None and (entry.path / "targets").is_dir():
            return entry.path / "targets"
    return None


def _mean(
    found: Mapping[str, tuple[float, float, int]], names: Iterable[str], prompts: Mapping[str, Row]
) -> dict[str, Any]:
    """Return the mean over the tokens of some rows, those to one prompt being one sample."""
    from edgedistill.evals.statistics import clustered_mean

    sums: dict[str, list[float]] = {}
    for name in names:
        one = sums.setdefault(prompt_of(name, prompts) or name, [0.0, 0])
        one[0], one[1] = one[0] + found[name][0], one[1] + found[name][2]
    estimate, _ = clustered_mean([total for total, _ in sums.values()], [count for _, count in sums.values()])
    data = estimate.to_json() | {"low": max(0.0, estimate.low), "tokens": int(sum(count for _, count in sums.values()))}
    return data if estimate.n > 1 else data | {"low": None, "high": None}  # of one sample nothing is known


def _row(name: str, found: Mapping[str, tuple[float, float, int]]) -> dict[str, Any]:
    total, _, tokens = found[name]
    return {"id": name, "nats_per_token": total / tokens, "tokens": tokens}


# ── tables ──


def stats_sheets(stats: dict[str, Any]) -> Iterable[Sheet]:
    """Lay out the figures as tables."""
    yield filters_sheet(stats, list(_notes(stats)))
    yield difficulty_sheet(stats)
    if "entropy" in stats:
        yield _entropy_sheet(stats["entropy"])
    if "production" in stats:
        yield _production_sheet(stats)


def _notes(stats: dict[str, Any]) -> Iterable[str]:
    made = ", ".join(f"{count} by {name}" for name, count in stats["sources"].items())
    yield f"{stats['answers']} answers of {stats['tokens']:,} tokens to {stats['prompts']} prompts"
    yield f"{stats['kept']} rows kept: {made}"
    if "labels" in stats:
        yield f"labels: {labels_note(stats['labels'])}"
    for name, what in (("prompt", "what users say"), ("taught", "what is taught")):
        one = stats["lengths"][name]
        yield f"{what}: {one['median']} words (median), {one['p95']} (95 %), {one['max']} (longest)"
    leaks = ", ".join(f"{count} of {name}" for name, count in stats["leaked"].items())
    yield f"{stats['near_repeats']} kept rows are nearly one before"
    yield f"{COPIED_WORDS} words in a row that a suite has, too: {leaks or 'none'}"
    yield from spent_notes(stats)


def _entropy_sheet(found: Mapping[str, Any]) -> Sheet:
    """Lay out how sure the teacher is: all tokens, by tag from the highest, then the rows at both ends."""
    rows = [["all", interval(found["estimate"], 3), f"{found['estimate']['n']:,}", f"{found['tokens']:,}"]]
    rows += [[one["tag"], interval(one, 3), f"{one['n']:,}", f"{one['tokens']:,}"] for one in found["by_tag"][:LISTED]]
    rule = len(rows)
    rows += [
        [f"{what} {one['id']}", f"{one['nats_per_token']:.3f}", "", f"{one['tokens']:,}"]
        for what in ("highest", "lowest")
        for one in found[what]
    ]
    notes = ["[…] 95 % intervals over prompts; nats a token of the text that is taught, at T = 1"]
    if "at_most" in found:
        notes.append(f"by the best tokens alone: at least so much, and at most {found['at_most']:.3f}")
    if len(found["by_tag"]) > LISTED:
        notes.append(f"{len(found['by_tag']) - LISTED} more tags: --json")
    return Sheet(
        title="the teacher's entropy",
        columns=("rows", "nats a token", "prompts", "tokens"),
        rows=rows,
        right=frozenset({1, 2, 3}),
        rules=frozenset({rule}),
        notes=notes,
    )


def _production_sheet(stats: Mapping[str, Any]) -> Sheet:
    """Lay out how far the prompts are from traffic."""
    one = stats["production"]
    words = stats["lengths"]["prompt"]
    rows = [
        ["told apart (AUC; 0.5: not at all)", interval(one["apart"], 3) if one["apart"] else "too few", ""],
        ["without a near prompt", interval(one["without_near"], 2), interval(one["prompts_without_near"], 2)],
        ["longer than a prompt (0.5: as long)", interval(one["longer"], 2), ""],
        ["words (median)", str(one["words"]["median"]), str(words["median"])],
        ["words (95 %)", str(one["words"]["p95"]), str(words["p95"])],
        ["divergence of words, bits (prompts: by chance)", f"{one['divergence']:.3f}", f"{one['by_chance']:.3f}"],
        ["words that no prompt has", f"{one['unknown_words']:.0%}", ""],
    ]
    rule = len(rows)
    rows += [
        [f"tag {tag['tag']}", interval(tag["traffic"], 2), interval(tag["prompts"], 2)] for tag in one["tags"][:LISTED]
    ]
    notes = [f"production (n = {one['n']}, {one['different']} different): […] 95 % intervals"]
    if one["apart"]:
        notes.append(
            f"told apart by a classifier that learnt on one half, on n = {one['apart']['n']} texts of the other"
        )
    else:
        notes.append(one["why"])
    if not one["tags"]:
        notes.append("its rows have no tags to compare")
    for far in one["least_like"]:
        times = f" ({far['times']} times)" if far["times"] > 1 else ""
        notes.append(f"like no prompt: {far['id']}{times}, likeness {far['likeness']:.2f}: {far['text']}")
    return Sheet(
        title=f"production traffic (n = {one['n']}) against {stats['prompts']} prompts",
        columns=("", "traffic", "prompts"),
        rows=rows,
        right=frozenset({1, 2}),
        rules=frozenset({rule}),
        notes=notes,
    )
