"""The cells that the sheets of a report are made of."""

from __future__ import annotations

from typing import Any

from edgedistill.report import Figure, ReportData
from edgedistill.tables import Sheet
from edgedistill.target import format_size


def filled(sheet: Sheet) -> Sheet:
    """Leave out the columns that no row has anything in."""
    kept = [index for index in range(len(sheet.columns)) if index == 0 or any(row[index] for row in sheet.rows)]
    return Sheet(
        title=sheet.title,
        columns=tuple(sheet.columns[index] for index in kept),
        rows=[[row[index] for index in kept] for row in sheet.rows],
        right=frozenset(number for number, index in enumerate(kept) if index in sheet.right),
        rules=sheet.rules,
        notes=sheet.notes,
    )


def text(figure: Figure | None, digits: int = 3) -> str:
    """Write a figure with its interval; nothing where there is none."""
    return figure.text(digits) if figure else ""


def count(value: Any) -> str:
    """Write a count; nothing where there is none."""
    return "" if value is None else str(value)


def slashed(*values: float | None, digits: int = 0) -> str:
    """Write figures of one kind beside each other, a dash for one that is not known; nothing where none is."""
    known = any(value is not None for value in values)
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values) if known else ""


def signed(figure: Figure) -> str:
    """Write a difference with its sign and interval."""
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:+.3f}, {figure.high:+.3f}]"
    return f"{figure.value:+.3f}{bounds}"


def machine_notes(data: ReportData) -> list[str]:
    """Say where speeds come from: machine, threads, library build, samples, what the ratio is against, noise."""
    notes = []
    for model in data.models:
        if (speed := model.speed) is None:
            continue
        host = speed.host
        build = " ".join(speed.runner[key] for key in ("version", "commit", "build") if speed.runner.get(key))
        notes.append(
            f"speeds: medians of {speed.tg.n} on {host.get('cpu', 'an unknown CPU')} ({host.get('arch', '?')}, "
            f"{host.get('cores', '?')} cores, "
            f"{format_size(host.get('memory_bytes', 0))}), {speed.threads} threads, context {speed.context}; {build}"
        )
    if any(model.speed and model.speed.ratio for model in data.models):
        notes.append("speed-up: decode against the teacher's f16, both measured turn by turn in one session")
    for model in data.models:
        if model.speed and model.speed.noise:
            notes.append(f"NOISY {model.label}: {'; '.join(dict.fromkeys(model.speed.noise))}")
    return list(dict.fromkeys(notes))
