"""The build store: finished entries by key, unfinished work beside them, and leases so that two builds share the work.

    entries/ab/abcd…/entry.json   written last: without it the entry does not exist
    entries/ab/abcd…/…            the files of the entry; what lies under log/ is kept but not part of its digest
    partial/abcd…/out, work       a step under way: ``out`` becomes the entry, ``work`` is what it resumes from,
    partial/abcd…/inputs.json     if its inputs still have these digests
    leases/abcd….json             who is working on it (host, pid, boot id); its mtime is the heartbeat
    builds/….json                 a build under way, so too, and the keys that it needs
    kept/                         what belongs to files of entries and is dear to compute (edgedistill/kept.py)
    models/                       downloaded model files (edgedistill/models.py)
    rows.sqlite                   the teacher's answers (edgedistill/rows.py)

An entry is valid only while the digests of its inputs are still what it was built from. Correctness needs no lock: an
entry appears by one rename. Leases only keep two builds from doing the same work twice.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import Key, digest, file_digest

HEARTBEAT_S = 5.0
LEASE_DEAD_S = 60.0


def default_root() -> Path:
    """Return ``$EDGEDISTILL_STORE``, else the user's cache folder (XDG on Linux, Library/Caches on macOS)."""
    if env := os.environ.get("EDGEDISTILL_STORE"):
        return Path(env).expanduser()
    if os.uname().sysname == "Darwin":
        return Path.home() / "Library" / "Caches" / "edgedistill"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgedistill"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of an entry: its digest, and the size and mtime that make re-reading it unnecessary."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished step. ``digest`` covers names and bytes of its files, so equal digests mean equal results."""

    key: Key
    path: Path
    stage: str
    digest: str
    files: Mapping[str, FileRecord]
    inputs: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    created: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


class Damaged(StepFailed):
    """The bytes of an entry are not those that its ``entry.json`` promises."""

    def __init__(self, key: Key, path: Path, why: str) -> None:
        super().__init__(f"{path}: damaged entry ({why})", "run the build again: it is rebuilt")
        self.key, self.path, self.why = key, path, why


class Store:
    """Entries, partial work and leases under one root folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()
        self._entries: dict[Key, Entry] = {}
        self._verified: set[tuple[Key, str]] = set()
        try:
            for name in ("entries", "partial", "leases", "models"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.root}: the store cannot be written ({error.strerror})",
                "set EDGEDISTILL_STORE to a folder with room",
            ) from error

    # ── reading ──

    def entry_path(self, key: Key) -> Path:
        """Return where the entry of ``key`` lies once it exists."""
        return self.root / "entries" / key[:2] / key

    def load(self, key: Key) -> Entry | None:
        """Return the entry if its ``entry.json`` exists and its files have the size and mtime it recorded, else None.

        A file whose mtime moved is read again: same bytes are accepted, other bytes raise Damaged.
        """
        path = self.entry_path(key)
        try:
            raw = json.loads((path / "entry.json").read_text())
            files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
            entry = Entry(key=key, path=path, files=files, **raw)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(key, path, f"entry.json: {error}") from error
        for name, record in files.items():
            try:
                stat = (path / name).stat()
            except FileNotFoundError:
                raise Damaged(key, path, f"{name} is missing") from None
            if stat.st_size != record.size:
                raise Damaged(key, path, f"{name} has {stat.st_size} bytes, not {record.size}")
            if stat.st_mtime_ns != record.mtime_ns and file_digest(path / name) != record.sha256:
                raise Damaged(key, path, f"{name} has other bytes than recorded")
        self._entries[key] = entry
        return entry

    def inputs_match(self, entry: Entry) -> str:
        """Return "" if every input of ``entry`` still has the digest it was built from, else which one changed."""
        for key, known in entry.inputs.items():
            upstream = self._entries.get(Key(key)) or self.load(Key(key))
            if upstream is None:
                return f"input {key[:12]} is gone"
            if upstream.digest != known:
                return f"input {upstream.stage} {key[:12]} was rebuilt with other bytes"
        return ""

    def verify(self, entry: Entry) -> None:
        """Read every file of ``entry`` and compare digests; raises Damaged. Done once per process and entry."""
        if (entry.key, entry.digest) in self._verified:
            return
        for name, record in entry.files.items():
            if file_digest(entry.path / name) != record.sha256:
                raise Damaged(entry.key, entry.path, f"{name} has other bytes than recorded")
        self._verified.add((entry.key, entry.digest))

    def all_keys(self) -> Iterator[Key]:
        """Yield the key of every entry on disk."""
        for path in sorted((self.root / "entries").glob("*/*/entry.json")):
            yield Key(path.parent.name)

    # ── writing ──

    def discard(self, key: Key) -> None:
        """Remove an entry; the rename comes first, so no half entry is ever seen."""
        self._entries.pop(key, None)
        self._verified = {pair for pair in self._verified if pair[0] != key}
        self._throw_away(self.entry_path(key))

    def _throw_away(self, folder: Path) -> None:
        """Delete a folder, if it is there, under another name: whoever still writes in it does not meet what takes its place.
        What cannot be deleted now goes with `store gc`.
        """
        trash = self.root / "partial" / f"trash-{uuid.uuid4().hex}"
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return
        shutil.rmtree(trash, ignore_errors=True)

    def interrupted(self, key: Key, inputs: Mapping[Key, str] | None) -> bool:
        """Tell whether a step has work to go on from; with ``inputs`` (digests by key), whether that was done on these bytes."""
        base = self.root / "partial" / key
        try:
            if not any((base / "work").iterdir()):
                return False
            return inputs is None or json.loads((base / "inputs.json").read_text()) == dict(inputs)
        except (FileNotFoundError, ValueError):
            return False

    def partial(self, key: Key, inputs: Mapping[Key, str]) -> tuple[Path, Path]:
        """Return (out, work) for a step about to run: ``out`` empty, ``work`` as the last attempt left it, if that read the same
        bytes: digests of ``inputs`` by key. A checkpoint of another teacher's student must not go on as this one's.
        """
        base = self.root / "partial" / key
        out, work = base / "out", base / "work"
        if not self.interrupted(key, inputs):
            self._throw_away(work)
        self._throw_away(out)
        out.mkdir(parents=True)
        work.mkdir(exist_ok=True)
        write_atomic(base / "inputs.json", json.dumps(dict(inputs)))
        return out, work

    def commit(
        self,
        key: Key,
        *,
        stage: str,
        inputs: Mapping[Key, str],
        fields: Mapping[str, Any],
        facts: Mapping[str, Any],
        seconds: float,
        versions: Mapping[str, str],
    ) -> Entry:
        """Turn ``partial/<key>/out`` into the entry: hash the files, write ``entry.json`` last, rename into place."""
        out = self.root / "partial" / key / "out"
        files: dict[str, FileRecord] = {}
        for path in sorted(p for p in out.rglob("*") if p.is_file()):
            stat = path.stat()
            name = path.relative_to(out).as_posix()
            files[name] = FileRecord(sha256=file_digest(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        content = {name: record.sha256 for name, record in files.items() if not name.startswith("log/")}
        entry = Entry(
            key=key,
            path=self.entry_path(key),
            stage=stage,
            digest=digest(content),
            files=files,
            inputs={str(one): known for one, known in inputs.items()},
            facts=dict(facts),
            seconds=round(seconds, 3),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            fields=dict(fields),
            versions=dict(versions),
        )
        body = {
            "stage": entry.stage,
            "digest": entry.digest,
            "files": {name: vars(record) for name, record in files.items()},
            "inputs": dict(entry.inputs),
            "facts": entry.facts,
            "seconds": entry.seconds,
            "created": entry.created,
            "fields": entry.fields,
            "versions": entry.versions,
        }
        write_atomic(out / "entry.json", json.dumps(body, indent=1, sort_keys=True))
        if entry.path.exists():
            self.discard(key)
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        out.rename(entry.path)
        shutil.rmtree(out.parent, ignore_errors=True)
        self._entries[key] = entry
        self._verified.add((key, entry.digest))
        return entry

    # ── leases ──

    @contextmanager
    def lease(self, key: Key, *, waiting: Callable[[str], None] = lambda who: None) -> Iterator[bool]:
        """Hold the lease of ``key`` while the block runs. Yields False if another build finished the step meanwhile."""
        path = self.root / "leases" / f"{key}.json"
        me = new_holder()
        told, waited = False, False
        while not _take(path, me):
            holder = _holder(path)
            if holder is None or is_dead(holder, _heard(path)):
                _remove_if(path, holder)
                continue
            waited = True
            if not told:
                waiting(called(holder))
                told = True
            time.sleep(0.2)
        with _beating(path):
            try:
                yield not (waited and (self.entry_path(key) / "entry.json").exists())
            finally:
                _remove_if(path, me)

    @contextmanager
    def using(self, keys: Iterable[Key]) -> Iterator[None]:
        """Say while the block runs that a build needs the entries of these keys, so that nobody deletes them."""
        folder, me = self.root / "builds", new_holder()
        folder.mkdir(exist_ok=True)
        path = folder / f"{me['token']}.json"
        write_atomic(path, json.dumps({"holder": me, "keys": sorted(set(keys))}))
        with _beating(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def used(self) -> set[str]:
        """Return the keys that builds under way need."""
        found: set[str] = set()
        for path in (self.root / "builds").glob("*.json"):
            try:
                told = json.loads(path.read_text())
            except (FileNotFoundError, ValueError):
                continue
            if is_dead(told["holder"], _heard(path)):
                path.unlink(missing_ok=True)
            else:
                found |= set(told["keys"])
        return found

    def lease_holders(self) -> set[str]:
        """Return the keys that a live build is working on."""
        held = set()
        for path in (self.root / "leases").glob("*.json"):
            holder = _holder(path)
            if holder is not None and not is_dead(holder, _heard(path)):
                held.add(path.stem)
        return held


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def boot_id() -> str:
    """Return an id that changes when the machine restarts (Linux), so that a reused pid is not taken for the old
    one.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def new_holder() -> dict[str, Any]:
    """Return what tells of a holder of something whether it lives: this process, with a name of its own."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "boot": boot_id(),
        "started": _started(pid),
        "token": uuid.uuid4().hex,
    }


def called(holder: Mapping[str, Any]) -> str:
    """Return a holder's name, for messages."""
    return f"process {holder.get('pid')} on {holder.get('host')}"


def is_dead(holder: Mapping[str, Any], heard: float) -> bool:
    """Tell whether a holder that was last ``heard`` of at that time (its heartbeat) is gone. On this machine its process tells."""
    if holder.get("host") == socket.gethostname() and holder.get("boot") == boot_id():
        try:
            pid = int(holder["pid"])
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        except (ValueError, KeyError):
            return False
        now, then = _started(pid), holder.get("started")
        return bool(now and then) and now != then  # the number is another's by now
    return time.time() - heard > LEASE_DEAD_S


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks (Linux, proc(5)); "ended" once it has, "" where nobody can tell."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if state in ("Z", "X") else rest[18]
    except (OSError, ValueError, IndexError):
        return ""


def _heard(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Touch a file every few seconds while the block runs: its mtime tells that the holder lives."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                os.utime(path)
            except OSError:
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)


def _take(path: Path, me: dict[str, Any]) -> bool:
    """Create the lease by a hard link, which fails if it exists and is never seen half-written."""
    temporary = path.with_name(f".{me['token']}")
    temporary.write_text(json.dumps(me))
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _remove_if(path: Path, holder: dict[str, Any] | None) -> None:
    """Remove the lease if it is still ``holder``'s."""
    if _holder(path) == holder:
        path.unlink(missing_ok=True)
