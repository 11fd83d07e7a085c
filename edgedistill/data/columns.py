"""Tables of one's own: prompts written by a template from a record's columns, and rows picked by their split and tags."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter
from typing import Any

from edgedistill.data.forms import FORM_FIELDS, OURS
from edgedistill.errors import UsageError

NAMED = 12
"""Columns that an error names at most."""


class ColumnError(UsageError):
    """A key of ``Columns`` cannot be followed; ``key`` names it."""

    def __init__(self, message: str, hint: str, *, key: str) -> None:
        super().__init__(message, hint)
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Say how rows are made of a file's records, and which are taken.

    ``template`` writes the prompt, ``{name}`` for a column; ``reference`` names the column with the wanted answer; ``system`` is
    said first where a row has no system message. ``split`` and ``tags`` (any of them) pick rows.
    """

    template: str | None = None
    system: str | None = None
    reference: str | None = None
    split: str | None = None
    tags: tuple[str, ...] = ()

    def made(self) -> Columns:
        """Return what of it makes rows, without what picks among them."""
        return Columns(template=self.template, system=self.system, reference=self.reference)

    def fill(self, record: Any, where: str) -> Any:
        """Return a record with prompt and reference from its columns. Raises ColumnError for a column that is not there."""
        if not isinstance(record, dict) or (self.template is None and self.reference is None):
            return record
        wanted = None if self.reference is None else _value(record, self.reference, where, "reference")
        if self.template is not None:
            parts = list(Formatter().parse(self.template))
            values = {name: _value(record, name, where, "template") for _, name, _, _ in parts if name is not None}
            prompt = "".join(text + ("" if name is None else values[name]) for text, name, _, _ in parts)
            own = {"id", "tags", "split", "reference"}
            left = {name for name in values if name not in own} | {*FORM_FIELDS, *OURS}
            record = {**{name: value for name, value in record.items() if name not in left}, "prompt": prompt}
        if self.reference is not None:
            record = {name: value for name, value in record.items() if name not in (self.reference, "reference")}
            record |= {"reference": wanted} if wanted else {}  # an empty cell is no answer
        return record


def _value(record: dict[str, Any], name: str, where: str, key: str) -> str:
    if name not in record:
        there = [*map(repr, record)]
        more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
        raise ColumnError(
            f"{where}: {key} takes the column {name!r}, and there is none",
            f"This row has: {', '.join(there[:NAMED]) or 'nothing'}{more}.",
            key=key,
        )
    value = record[name]
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return str(value)
    raise ColumnError(
        f"{where}: the column {name!r} is no text and no number", "Take a column of texts, or write one.", key=key
    )


def template_problem(template: str) -> str | None:
    """Say what is wrong with a template; None where it can be filled."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"{error}: name a column in braces, {{topic}}, and double the braces that are text"
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        return "no column is named, so every prompt is the same: write one in braces, {topic}"
    if "" in names:
        return "{} names no column: write its name, {topic}, and double the braces that are text, {{ and }}"
    if any(spec or conversion for _, _, spec, conversion in parts):
        return "a column is taken as it is: write {topic}, without ! or : after the name, and double the braces that are text"
    return None


def counted(values: Iterable[str]) -> str:
    """Write what there is to pick from: "train" (900), "test" (100)."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    shown = [f'"{value}" ({count})' for value, count in sorted(counts.items(), key=lambda pair: -pair[1])[:NAMED]]
    return ", ".join(shown) or "none"
