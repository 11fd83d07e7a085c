"""``NAME.lock`` beside the recipe pins what was resolved, so that the same recipe means the same bytes next year."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgedistill.errors import UsageError
from edgedistill.models import HubFile, Resolved
from edgedistill.store import write_atomic

Pinned = Literal["models", "data"]
_KEYS = ("revision", "digest")


def read_lock(path: Path, table: Pinned = "models") -> dict[str, dict[str, str]]:
    """Return the pins of a lock file (source -> revision, digest), or nothing if there is none yet. Raises UsageError."""
    if not path.is_file():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get(table, {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a lock file ({error})", f"delete it to pin anew: rm {path}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})", f"ls -l {path}") from error
    return {source: _pin(pin, path, f'{table}."{source}"') for source, pin in _table(found, path, table).items()}


def _table(value: Any, path: Path, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UsageError(f"{path}: {key}: is {value!r}, no table", f"delete the file to pin anew: rm {path}")


def _pin(value: Any, path: Path, key: str) -> dict[str, str]:
    """Return one pin; raises UsageError unless it has both keys, each a text."""
    pin, remedy = _table(value, path, key), f"delete [{key}] to pin anew"
    for name in _KEYS:
        if name not in pin:
            raise UsageError(f"{path}: {key}: has no {name}", remedy)
        if not isinstance(pin[name], str):
            raise UsageError(f"{path}: {key}.{name}: is {pin[name]!r}, no text", remedy)
    return {name: pin[name] for name in _KEYS}


def write_lock(path: Path, found: Sequence[Resolved | HubFile], table: Pinned = "models") -> None:
    """Write the pins, if they differ from what is there; those of what another arm or combination names stay. Raises UsageError."""
    own = {one.source: {"revision": one.revision, "digest": one.digest} for one in found}
    lines = ["# Pinned by edgedistill. Delete a table to accept a newer model."]
    for name in ("models", "data"):
        pins = read_lock(path, name) | (own if name == table else {})
        for source, pin in sorted(pins.items()):
            lines += ["", f'[{name}."{source}"]', *(f'{key} = "{pin[key]}"' for key in _KEYS)]
    text = "\n".join(lines) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})", "the lock lies beside the recipe") from error
