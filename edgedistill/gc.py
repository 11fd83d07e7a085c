"""Look after the store: list, verify, and delete what no recipe needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

from edgedistill.fingerprint import Key
from edgedistill.kept import collect_kept, verify_kept
from edgedistill.plan import Plan
from edgedistill.rows import RowStore
from edgedistill.stages.package import Package
from edgedistill.store import Damaged, Store


def list_store(store: Store) -> list[dict[str, Any]]:
    """Return one line an entry: key, stage, size in bytes, when it was made, the seconds it took."""
    found = []
    for key in store.all_keys():
        try:
            entry = store.load(key)
        except Damaged as error:
            found.append({"key": key, "stage": "damaged", "size": 0, "created": "", "seconds": 0.0, "why": error.why})
            continue
        if entry is not None:
            line = {
                "key": key,
                "stage": entry.stage,
                "size": entry.size,
                "created": entry.created,
                "seconds": entry.seconds,
            }
            found.append(line)
    return sorted(found, key=lambda line: line["created"])


def verify_store(store: Store) -> list[str]:
    """Read every file of every entry, and what is kept beside them; return a line for each damaged one."""
    damaged = verify_kept(store.root)
    for key in store.all_keys():
        try:
            entry = store.load(key)
            if entry is not None:
                store.verify(entry)
        except Damaged as error:
            damaged.append(error.message)
    return damaged


def needed(plan: Plan) -> set[Key]:
    """Return the keys of a plan's entries. Its packages stay, too, where they missed a gate and were shipped anyway."""
    shipped = {step.stage.anyway for step in plan.steps if isinstance(step.stage, Package)}
    return {step.key for step in plan.steps} | shipped


def collect_garbage(
    store: Store, keep: Iterable[Key], *, rows: bool = False, dry_run: bool = False
) -> tuple[int, int, int]:
    """Delete entries that are neither in ``keep`` nor needed by a build under way, partial work that nobody holds a lease on, and
    what is kept beside entries of files that no entry left has.

    Returns (entries, bytes, answers). The teacher's answers are deleted only with ``rows``.
    """
    kept, held = {*keep, *store.used()}, store.lease_holders()
    count = freed = 0
    files: set[str] = set()  # of the entries that stay
    for key in list(store.all_keys()):
        if key in kept or key in held:
            files |= _digests(store, key)
            continue
        count += 1
        freed += _alone(store.entry_path(key))
        if not dry_run:
            store.discard(key)
    for folder in (store.root / "partial").iterdir():
        if folder.name not in held and folder.name not in kept:
            freed += _alone(folder)
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
    freed += collect_kept(store.root, files, dry_run=dry_run)
    answers = 0
    if rows:
        answers = RowStore(store.root).counts()["rows"] if dry_run else RowStore(store.root).delete_all()
    return count, freed, answers


def _digests(store: Store, key: Key) -> set[str]:
    """Return the sha256 of an entry's files; none where it is damaged."""
    try:
        entry = store.load(key)
    except Damaged:
        return set()
    return {record.sha256 for record in entry.files.values()} if entry is not None else set()


def _alone(folder: Any) -> int:
    """Return the bytes that deleting a folder frees: a file that is hard-linked elsewhere frees nothing."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)
