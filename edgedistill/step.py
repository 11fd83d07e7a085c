"""What a stage is: a frozen dataclass whose fields are its key, with one ``run``; and what ``run`` is given.

A field of type Key is an edge of the step graph. A field made by ``unkeyed()`` does not change the bytes (a path, a
number of threads) and stays out of the key. What ``run`` writes under ``ctx.out`` is the entry; what it returns is
kept in ``entry.json`` as *facts* (figures for tables, timings among them), outside the digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.data.prompts import Row, load_rows
from edgedistill.fingerprint import Key, digest
from edgedistill.rows import RowStore
from edgedistill.store import Entry

SCHEMA = 1
Progress = Callable[[int, int, str], None]


def unkeyed(**kwargs: Any) -> Any:
    """Declare a dataclass field that is no part of the key."""
    return field(metadata={"keyed": False}, **kwargs)


def later(default: Any) -> Any:
    """Declare a field that came after steps were built without it: at its default it is no part of the key."""
    return field(metadata={"later": True}, default=default)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of every stage. Bump ``version`` when the bytes it writes would change."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    deterministic: ClassVar[bool] = True

    def fields(self) -> dict[str, Any]:
        """Return the keyed fields by name, without later ones at their default."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata.get("keyed", True) and not (f.metadata.get("later") and getattr(self, f.name) == f.default)
        }

    def key(self) -> Key:
        """Return sha256(schema, name, version, fields)."""
        return Key(digest({"schema": SCHEMA, "name": self.name, "version": self.version, "fields": self.fields()}))

    def inputs(self) -> tuple[Key, ...]:
        """Return the upstream keys, in the order of the fields; a key inside a tuple or a dictionary counts too."""
        return self._inputs

    @cached_property
    def _inputs(self) -> tuple[Key, ...]:
        found: list[Key] = []

        def walk(value: Any) -> None:
            if isinstance(value, Key):
                found.append(value)
            elif isinstance(value, list | tuple):
                for item in value:
                    walk(item)
            elif isinstance(value, Mapping):
                for item in value.values():
                    walk(item)

        for f in dataclasses.fields(self):
            walk(getattr(self, f.name))
        return tuple(dict.fromkeys(found))

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Do the work: write under ``ctx.out``, resume from ``ctx.work``, return facts."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a running stage may use."""

    out: Path
    work: Path
    entries: Mapping[Key, Entry]
    rows: RowStore
    threads: int
    progress: Progress
    note: Callable[[str], None]

    @property
    def store(self) -> Path:
        """Return the folder of the store, for what steps find again in its entries or keep beside them."""
        return self.rows.path.parent

    def path(self, key: Key, name: str = "") -> Path:
        """Return a file or folder of an upstream entry (its bytes were checked before the step began)."""
        return self.entries[key].path / name

    def facts(self, key: Key) -> Mapping[str, Any]:
        """Return the facts of an upstream entry."""
        return self.entries[key].facts


def rows_given(ctx: Context, prompts: Key | None, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows of a step: those in the entry of an augmenter where there is one, else those that the recipe names."""
    return rows if prompts is None else tuple(load_rows(ctx.path(prompts, "prompts.jsonl")))
