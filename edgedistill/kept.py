"""Keep beside the entries what is dear to compute and belongs to one file of them: moments of a model's inputs, log-probabilities.

    kept/<name>/index.json    what it was computed from, the sha256 of the file that it belongs to, and of each piece
    kept/<name>/<piece>       raw bytes

A piece is read only where its bytes are those that the index promises; one that is missing or damaged is computed anew, so that
nothing breaks when any of it is deleted. ``store gc`` deletes what belongs to a file that no kept entry has, and what processes
that were killed left half-written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edgedistill.fingerprint import digest
from edgedistill.store import write_atomic

WRITTEN = 3600.0
"""Seconds after which a file that is not renamed yet is nobody's any more: a piece is written in far less."""


class Kept:
    """Pieces that were computed from ``inputs`` (JSON) and belong to the file whose sha256 is ``of``; ``kind`` is a word for what
    they are. Several processes may write: each piece and the index appear by a rename, and a piece that the other's index has lost
    is computed once more.
    """

    def __init__(self, root: Path, inputs: Any, *, of: str, kind: str = "") -> None:
        self.root, self.path, self.of, self.kind = root, root / "kept" / digest([inputs, of]), of, kind

    def make_way(self, most: int) -> None:
        """Delete the oldest of what is kept of this kind for the same file, so that there are ``most`` with what comes now."""
        others = [
            folder
            for folder in _folders(self.root)
            if folder != self.path and (told := _read(folder))["of"] == self.of and told["kind"] == self.kind
        ]
        others.sort(key=lambda folder: folder.stat().st_mtime)
        for folder in others[: max(0, len(others) - most + 1)]:
            shutil.rmtree(folder, ignore_errors=True)

    def has_room(self, nbytes: int) -> bool:
        """Tell whether keeping ``nbytes`` leaves the disk at least three times as much."""
        return shutil.disk_usage(self.root).free > 4 * nbytes

    def get(self, name: str) -> bytes | None:
        """Return a piece; None where it was never kept, or its bytes are others."""
        wanted = _read(self.path)["pieces"].get(name)
        try:
            data = (self.path / name).read_bytes() if wanted else b""
        except OSError:
            return None
        return data if wanted and hashlib.sha256(data).hexdigest() == wanted else None

    def put(self, pieces: Iterable[tuple[str, bytes]]) -> None:
        """Keep pieces (name, bytes), beside those that are there. They are asked for one by one: each may be large. A disk that is
        full is no error: then they are not kept.
        """
        temporary = self.path / f".{uuid.uuid4().hex[:8]}"
        digests: dict[str, str] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, data in pieces:
                temporary.write_bytes(data)
                temporary.replace(self.path / name)
                digests[name] = hashlib.sha256(data).hexdigest()
            known = _read(self.path)["pieces"] | digests
            told = {"of": self.of, "pieces": known} | ({"kind": self.kind} if self.kind else {})
            write_atomic(self.path / "index.json", json.dumps(told, indent=1, sort_keys=True))
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def verify_kept(root: Path) -> list[str]:
    """Read every piece; return a line for each whose bytes are not those that its index promises."""
    damaged = []
    for folder in _folders(root):
        for name, wanted in _read(folder)["pieces"].items():
            try:
                found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            except OSError:
                found = ""
            if found != wanted:
                damaged.append(f"{folder / name}: damaged ({'other bytes than recorded' if found else 'missing'})")
    return damaged


def collect_kept(root: Path, files: set[str], *, dry_run: bool = False) -> int:
    """Delete what belongs to none of ``files`` (sha256), and half-written files that nobody writes any more; return the bytes."""
    freed = 0
    for folder in _folders(root):
        if _read(folder)["of"] not in files:
            freed += sum(path.stat().st_size for path in folder.iterdir())
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        for path in folder.glob(".*"):
            with contextlib.suppress(FileNotFoundError):  # renamed at this moment
                told = path.stat()
                if told.st_mtime < time.time() - WRITTEN:
                    freed += told.st_size
                    if not dry_run:
                        path.unlink()
    return freed


def _folders(root: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(Path(entry.path) for entry in os.scandir(root / "kept") if entry.is_dir())


def _read(folder: Path) -> dict[str, Any]:
    """Return the index of a folder: one without pieces, belonging to nothing, where it cannot be read."""
    try:
        found = json.loads((folder / "index.json").read_text())
        return {"of": str(found["of"]), "pieces": dict(found["pieces"]), "kind": str(found.get("kind", ""))}
    except (OSError, ValueError, KeyError, TypeError):
        return {"of": "", "pieces": {}, "kind": ""}
