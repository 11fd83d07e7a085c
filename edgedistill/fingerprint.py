"""Name things by their content: canonical JSON, digests, and random numbers that depend on nothing but their name.

A key is the digest of everything that changes the bytes of a result (DESIGN.md, "Steps, keys, store"). Two dictionaries
that mean the same have the same canonical JSON, whatever the order of their keys or the spelling of their floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class Key(str):
    """The key of a step: 64 hexadecimal digits. A field of this type is an edge of the step graph."""

    __slots__ = ()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, no NaN; dataclasses and paths are refused or
    unfolded.

    Raises TypeError for what has no canonical form (sets, bytes, paths: a path must never reach a key).
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"no canonical form for {value}")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"keys must be strings, not {bad[0]!r}")
        return {key: _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"no canonical form for {type(value).__name__}")


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of ``value`` (64 hexadecimal digits)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
