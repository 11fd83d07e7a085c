"""Tables as the verbs print them: to stdout, fitted to a terminal, wide plain lines off it.

A ``Sheet`` holds text only; how wide it may be is decided when it is printed. Those of a report are in
report_sheets.py, which the page (report_html.py) shows too. Importing this imports neither rich nor numpy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.advice import advise
from edgedistill.report import ReportData, collect, gate_lines
from edgedistill.rows import RowStore
from edgedistill.spending import Use
from edgedistill.target import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from edgedistill.plan import Step
    from edgedistill.runner import Outcome, Verdict
    from edgedistill.served import Server
    from edgedistill.session import Session

__all__ = ["Sheet", "gate_lines", "print_table"]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table of text. ``right`` holds the columns of numbers; a line is drawn before the rows in ``rules``."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    right: frozenset[int] = frozenset()
    rules: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def print_table(table: Sheet | Table) -> None:
    """Print a table to stdout. On a terminal that is too narrow, intervals go to a line of their own and text folds;
    off a terminal lines are as long as they need to be. Nothing is ever cut off.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=20_000, color_system=None)
    if not isinstance(table, Sheet):
        if not console.is_terminal:
            table.box, table.title_justify = None, "left"
        console.print(table)
        return
    if table.title:
        console.print(table.title, markup=False, style="bold")
    if console.is_terminal:
        for piece in _pieces(table, console.width):
            console.print(_rich(piece, plain=False))
    else:
        with console.capture() as capture:
            console.print(_rich(table, plain=True))
        sys.stdout.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
    for note in table.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print()


def _pieces(sheet: Sheet, width: int) -> list[Sheet]:
    """Fit a sheet to a terminal: as it is; else with intervals on a line of their own; else in pieces, the first column
    in each.
    """

    def needs(rows: list[list[str]], index: int, most: int) -> int:
        lines = [line for row in [list(sheet.columns), *rows] for line in row[index].split("\n")]
        longest = max(map(len, lines), default=0)
        return (longest if index in sheet.right else min(longest, most)) + 2

    columns = range(len(sheet.columns))
    if sum(needs(sheet.rows, index, 400) for index in columns) + 1 <= width:
        return [sheet]
    rows = [[cell.replace(" [", "\n[") for cell in row] for row in sheet.rows]
    pieces: list[list[int]] = [[0]]
    for index in columns[1:]:
        used = 1 + sum(needs(rows, one, 34) for one in pieces[-1])
        if len(pieces[-1]) > 1 and used + needs(rows, index, 34) > width:
            pieces.append([0])
        pieces[-1].append(index)
    return [
        replace(
            sheet,
            columns=tuple(sheet.columns[index] for index in piece),
            rows=[[row[index] for index in piece] for row in rows],
            right=frozenset(number for number, index in enumerate(piece) if index in sheet.right),
        )
        for piece in pieces
    ]


def _rich(sheet: Sheet, *, plain: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0) if plain else (0, 1))
    for index, heading in enumerate(sheet.columns):
        right = index in sheet.right
        made.add_column(Text(heading), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for number, row in enumerate(sheet.rows):
        if number in sheet.rules and not plain:
            made.add_section()
        made.add_row(*(Text(cell) for cell in row))
    return made


def duration(seconds: float | None) -> str:
    """Write seconds: ``0.4 s``, ``35 s``, ``4:05 min``, ``1:10:05 h``."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


# ── plan ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_table(session: Session, rows: Sequence[tuple[Step, Verdict, float]]) -> Sheet:
    """Lay out what each step would do and need. Time, memory and disk are estimates from rates measured on this
    machine.
    """
    from edgedistill.rates import Rates

    rates, lines, guessed = Rates(session.store.root), [], False
    for step, verdict, seconds in rows:
        cached = verdict.status == "cached"
        guess = not cached and not rates.measured(step.work.kind)
        guessed |= guess
        memory, disk = (
            ("", "")
            if cached
            else (format_size(step.memory) if step.memory else "", format_size(step.disk) if step.disk else "")
        )
        lines.append(
            [
                ", ".join(step.ids),
                verdict.status,
                verdict.reason,
                "" if cached else duration(seconds) + "*" * guess,
                memory,
                disk,
            ]
        )
    todo = [(step, seconds) for step, verdict, seconds in rows if verdict.status != "cached"]
    total = ["total", f"{len(todo)} of {len(rows)} to run", ""]
    total += [
        duration(sum(seconds for _, seconds in todo)),
        format_size(max((step.memory for step, _ in todo), default=0)),
    ]
    total += [format_size(sum(step.disk for step, _ in todo))]
    notes = ["* by a rate measured on another machine: may be off by several times"] if guessed else []
    if any(verdict.status == "wait" for _, verdict, _ in rows):
        notes.append("wait: known only once its inputs are rebuilt; counted as if it ran")
    asked_of = [served_tokens(session, rows, session.inputs.server), *_other_tokens(session, rows).values()]
    for asked in filter(None, asked_of):
        notes.append(asked["note"])
    return Sheet(
        title=f"{session.recipe.name}: {session.path}",
        columns=("step", "status", "why", "time", "memory", "disk"),
        rows=[*lines, total],
        right=frozenset({3, 4, 5}),
        rules=frozenset({len(lines)}),
        notes=notes,
    )


def served_tokens(
    session: Session, rows: Sequence[tuple[Step, Verdict, float]], server: Server | None
) -> dict[str, Any]:
    """Return what a teacher behind ``server`` would be asked, in tokens and money, and what the recipe has spent on it; nothing
    where a teacher is here.
    """
    if server is None:
        return {}
    todo = [
        (step.stage, step.work)
        for step, verdict, _ in rows
        if verdict.status != "cached"
        and (own := getattr(step.stage, "server", None)) is not None
        and own.account == server.account
    ]
    waited = 0.0
    if server.batch is not None:  # for what proves the teacher, and for distributions, it is asked at once
        from edgedistill.stages.generate import Generate

        waited = sum(work.amount for stage, work in todo if work.kind == "served" and isinstance(stage, Generate))
    written, scored = (
        sum(work.amount for _, work in todo if work.kind == kind) for kind in ("served", "served-scores")
    )
    budget = server.budget
    with closing(server.ledger(RowStore(session.store.root).path)) as ledger:
        spent = ledger.spent()
    at_once = written - waited
    money = budget.cost(Use(int(scored + at_once / 2), int(at_once / 2)))  # half of them are answers, say
    money += server.batch_budget.cost(Use(int(waited / 2), int(waited / 2)))
    bounds = [
        f"{have:{form}} of {most:{form}} {unit}".rstrip()
        for have, most, form, unit in (
            (spent.tokens, budget.tokens, ",", "tokens"),
            (spent.money, budget.money, ".4g", "money"),
        )
        if most is not None
    ]
    note = f"{server.model}: about {round(written + scored, -2):,.0f} tokens to ask"
    note += f", {money:.2g} at its price" if budget.input or budget.output else ""
    note += " (in batches)" if waited else ""
    note += f"; spent so far: {' and '.join(bounds) or f'{spent.tokens:,} tokens'}"
    return {
        "tokens": int(written + scored),
        "money": round(money, 6),
        "spent": {"requests": spent.requests, "tokens": spent.tokens, "money": round(spent.money, 6)},
        "note": note,
    }


def _other_tokens(session: Session, rows: Sequence[tuple[Step, Verdict, float]]) -> dict[str, dict[str, Any]]:
    """Return what the served ones of the teachers beside the first one, and the judge, would be asked, by their names; those that
    share an account with one before are counted there.
    """
    names, models = [spec.name for spec in session.recipe.teachers], list(session.inputs.others)
    if session.inputs.judge is not None:
        names, models = [*names, "judge"], [*models, session.inputs.judge]
    told, found = {session.inputs.server.account} if session.inputs.server else set[str](), {}
    for name, server in zip(names, (model.server for model in models), strict=True):
        if server is not None and server.account not in told:
            found[name] = served_tokens(session, rows, server)
            told.add(server.account)
    return found


def plan_json(session: Session, rows: Sequence[tuple[Step, Verdict, float]]) -> dict[str, Any]:
    """Return the plan as plain values: seconds, and bytes of memory and disk."""
    steps = [
        {
            "ids": list(step.ids),
            "stage": step.stage.name,
            "key": step.key,
            "status": verdict.status,
            "reason": verdict.reason,
            "seconds": round(seconds, 1),
            "memory": step.memory,
            "disk": step.disk,
        }
        for step, verdict, seconds in rows
    ]
    todo = [step for step in steps if step["status"] != "cached"]
    return {
        "recipe": session.recipe.name,
        "path": str(session.path),
        "targets": [target.name for target in session.inputs.targets],
        "warnings": list(session.plan.warnings),
        "advice": advise(session.inputs),
        "steps": steps,
        "to_run": len(todo),
        "seconds": round(sum(step["seconds"] for step in todo), 1),
        "memory": max((step["memory"] for step in todo), default=0),
        "disk": sum(step["disk"] for step in todo),
        **({"teacher": asked} if (asked := served_tokens(session, rows, session.inputs.server)) else {}),
        **({"teachers": others} if (others := _other_tokens(session, rows)) else {}),
    }


# ── build and report ────────────────────────────────────────────────────────────────────────────────────────────────


def build_table(session: Session, outcome: Outcome, folders: Iterable[Path]) -> Sheet:
    """Lay out a build: teacher, baselines and student, then one line an artifact. What is not built yet stays blank."""
    from edgedistill.report_sheets import models_sheet

    data = collect(session)
    return models_sheet(data, {folder.name: folder for folder in folders}, failures(outcome))


def build_json(session: Session, outcome: Outcome, folders: Iterable[Path]) -> dict[str, Any]:
    """Return what a build did and found as plain values."""
    return {
        "ran": list(outcome.ran),
        "cached": list(outcome.cached),
        "skipped": list(outcome.skipped),
        "failed": {name: {"message": str(error), "hint": error.hint} for name, error in outcome.failed.items()},
        "seconds": round(outcome.seconds, 3),
        "exit_code": outcome.exit_code,
        "dist": {folder.name: str(folder) for folder in folders},
        "report": collect(session).to_json(),
    }


def failures(outcome: Outcome) -> list[str]:
    """Return a line for each step that failed, and one for what waited on them."""
    lines = [f"FAILED {name}: {error}" for name, error in outcome.failed.items()]
    if outcome.skipped:
        lines.append(f"not run, because a step before failed: {', '.join(outcome.skipped)}")
    return lines


def report_tables(data: ReportData) -> list[Sheet]:
    """Lay out the whole report: models, gates, differences, functions, training, quantization, time, findings."""
    from edgedistill.report_sheets import all_sheets

    return all_sheets(data)


# ── explain, quantize, targets, store, doctor ───────────────────────────────────────────────────────────────────────


def explain_json(session: Session, steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Return for each step what it is made from, whether it is cached and why, where its entry lies and what it
    found.
    """
    import json

    from edgedistill.fingerprint import canonical_json
    from edgedistill.session import rows_of
    from edgedistill.store import Damaged

    verdicts = {step.key: (verdict, seconds) for step, verdict, seconds in rows_of(session)}
    by_key, found = session.plan.by_key, []
    for step in steps:
        verdict, seconds = verdicts[step.key]
        try:
            entry = session.store.load(step.key)
        except Damaged:
            entry = None
        found.append(
            {
                "ids": list(step.ids),
                "stage": step.stage.name,
                "version": step.stage.version,
                "key": step.key,
                "status": verdict.status,
                "reason": verdict.reason,
                "estimate_seconds": round(seconds, 1),
                "inputs": {by_key[key].id: key for key in step.stage.inputs()},
                "used_by": [other.id for other in session.plan.steps if step.key in other.stage.inputs()],
                "fields": json.loads(canonical_json(step.stage.fields())),
                "entry": str(entry.path) if entry else None,
                "files": {name: record.size for name, record in entry.files.items()} if entry else {},
                "created": entry.created if entry else None,
                "seconds": entry.seconds if entry else None,
                "versions": dict(entry.versions) if entry else {},
                "facts": dict(entry.facts) if entry else {},
            }
        )
    return found


def print_explain(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what ``explain_json`` found, as lines."""
    for step in found:
        lines = [
            f"{', '.join(step['ids'])}: {step['status']}" + (f" ({step['reason']})" if step["reason"] else ""),
            f"  stage    {step['stage']}, version {step['version']}",
            f"  key      {step['key']}",
            f"  made of  {', '.join(step['inputs']) or 'no other step'}",
            f"  used by  {', '.join(step['used_by']) or 'nothing'}",
        ]
        if step["entry"]:
            versions = ", ".join(f"{name} {version}" for name, version in step["versions"].items())
            lines += [
                f"  entry    {step['entry']}",
                f"  built    {step['created']} in {duration(step['seconds'])}, "
                f"{format_size(sum(step['files'].values()))} in {len(step['files'])} files",
                f"  with     {versions}",
            ]
        else:
            lines.append(f"  takes    about {duration(step['estimate_seconds'])}")
        lines += [
            f"  in key   {name} = {value}" for name, value in _leaves(step["fields"], set(step["inputs"].values()))
        ]
        lines += [f"  found    {name} = {value}" for name, value in _leaves(step["facts"], set())]
        sys.stdout.write("\n".join(lines) + "\n\n")


def _leaves(value: Any, keys: set[str], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested values to (dotted name, text); long lists become their length, keys of other steps are left
    out.
    """
    if isinstance(value, Mapping):
        return [
            leaf
            for name, item in value.items()
            for leaf in _leaves(item, keys, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list | tuple) and (len(value) > 6 or any(isinstance(item, Mapping | list) for item in value)):
        return [(prefix, f"{len(value)} items")]
    if isinstance(value, str) and value in keys:
        return []
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return [(prefix, text if len(text) <= 100 else f"{text[:60]!r}… ({len(text)} characters)")]


def quantize_table(results: Iterable[Any]) -> Sheet:
    """Lay out the files that ``quantize`` made."""
    rows, notes = [], []
    for result in results:
        one = result.to_json()
        rows.append(
            [
                one["name"],
                one["type"],
                format_size(one["size"]),
                f"{one['bpw']:.2f}" if one["bpw"] else "",
                str(one["path"]),
            ]
        )
        if fallen := one["fallbacks"]:
            what = (
                "1 tensor fell back to another type"
                if len(fallen) == 1
                else f"{len(fallen)} tensors fell back to other types"
            )
            notes.append(f"{one['name']}: {what}: {_some(fallen)}")
        notes += [f"{one['name']}: {note}" for note in one["notes"]]
    return Sheet(
        title="", columns=("for", "type", "size", "bpw", "file"), rows=rows, right=frozenset({2, 3}), notes=notes
    )


def _some(lines: Sequence[str], most: int = 4) -> str:
    return "; ".join(lines[:most]) + (f" and {len(lines) - most} more" if len(lines) > most else "")


def targets_table(targets: Iterable[Any]) -> Sheet:
    """Lay out profiles with their limits."""
    rows = []
    for target in targets:
        limits = target.limits.model_dump(exclude_none=True)
        shown = [
            f"{name} {format_size(value) if name in ('file_size', 'peak_rss') else f'{value:g}'}"
            for name, value in limits.items()
        ]
        rows.append(
            [target.name, target.summary, target.arch, target.runtime.format, target.quantize.type, ", ".join(shown)]
        )
    return Sheet(title="", columns=("target", "what it is", "arch", "format", "type", "limits"), rows=rows)


def store_table(entries: Iterable[Mapping[str, Any]]) -> Sheet:
    """Lay out the entries of the store."""
    lines = list(entries)
    rows = [
        [line["key"][:12], line["stage"], format_size(line["size"]), line["created"], duration(line.get("seconds"))]
        for line in lines
    ]
    total = ["total", f"{len(lines)} entries", format_size(sum(line["size"] for line in lines)), "", ""]
    notes = ["sizes count hard links in full: a file that several entries share is counted with each"]
    return Sheet(
        title="", columns=("key", "stage", "size", "built", "took"), rows=[*rows, total], right=frozenset({2, 4}),
        rules=frozenset({len(rows)}), notes=notes,
    )  # fmt: skip


def doctor_table(checks: Iterable[Any]) -> Sheet:
    """Lay out what ``doctor`` checked (``ok`` None: works, but worth a word), with the remedy of what is not fine."""
    words = {True: "ok", None: "note", False: "MISSING"}
    rows = [[words[check.ok], check.name, check.detail, "" if check.ok else check.remedy] for check in checks]
    return Sheet(title="", columns=("", "what", "found", "mend it by"), rows=rows)
