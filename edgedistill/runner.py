"""Run a plan: what is cached is not run, what was interrupted goes on, what fails costs nothing that was computed.

Steps run in the plan's order. A step whose upstream failed is skipped; the others go on, so one target's failure does
not lose another's artifact. Every input's bytes are read and compared before a step uses them: a damaged entry is
rebuilt."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.cpus import usable_cpus
from edgedistill.devices.host import usable_cores
from edgedistill.errors import EdgeDistillError, GateMissed, StepFailed, UsageError
from edgedistill.fingerprint import Key
from edgedistill.plan import Plan, Step
from edgedistill.rates import Rates
from edgedistill.rows import RowStore
from edgedistill.step import Context
from edgedistill.store import Damaged, Entry, Store, write_atomic
from edgedistill.target import format_size

FULL = 16 << 20  # bytes: a disk with less left is full, whatever the library that failed to write on it says
TOOLS = ("torch", "transformers", "peft", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What would happen to a step: ``cached``, ``run``, or ``wait`` (known only once its inputs are rebuilt)."""

    status: str
    reason: str


@dataclass
class Outcome:
    """What a build did. ``failed`` maps a step id to its error; ``skipped`` names the steps that waited for it."""

    ran: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    failed: dict[str, EdgeDistillError] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or the code of the worst failure."""
        return worst(error.exit_code for error in self.failed.values())


def worst(codes: Iterable[int]) -> int:
    """Return the worst of some exit codes: a bug before a failed step, a mistake of the user's and a missed gate."""
    found = set(codes)
    return next((code for code in (1, 3, 2, 4) if code in found), 0)


class Reporter:
    """What the runner tells while it works. The base class is silent; ui.py has the terminal's."""

    def plan(self, total: int, to_run: int, seconds: float | None) -> None:
        """``to_run`` of ``total`` steps will run, in about ``seconds``."""

    def start(self, step: Step, seconds: float | None, left: float | None) -> None:
        """A step begins; it and what remains after it take about so long."""

    def progress(self, step: Step, done: int, total: int, note: str) -> None:
        """A step got on."""

    def finish(self, step: Step, seconds: float) -> None:
        """A step ended well."""

    def fail(self, step: Step, error: EdgeDistillError) -> None:
        """A step failed."""

    def note(self, text: str) -> None:
        """Something the user should know: a damaged entry, another build at work."""

    def close(self) -> None:
        """The build is over."""


# ── what would run ──


def assess(plan: Plan, store: Store, *, force: Iterable[str] = ()) -> dict[Key, Verdict]:
    """Say for every step whether it is cached or will run, and why. Reads the store, changes nothing."""
    forced = set(force)
    history = _read_history(store, plan)
    verdicts: dict[Key, Verdict] = {}
    for step in plan.steps:
        changing = [key for key in step.stage.inputs() if verdicts[key].status != "cached"]
        try:
            entry = store.load(step.key)
            stale = store.inputs_match(entry) if entry and not changing else ""
        except Damaged as error:
            verdicts[step.key] = Verdict(status="run", reason=f"damaged: {error.why}")
            continue
        if forced & set(step.ids):
            verdicts[step.key] = Verdict(status="run", reason="forced")
        elif entry and not changing and not stale:
            verdicts[step.key] = Verdict(status="cached", reason="")
        elif entry and changing:
            names = ", ".join(plan.by_key[key].id for key in changing)
            verdicts[step.key] = Verdict(status="wait", reason=f"kept if {names} comes out with the same bytes")
        elif entry:
            verdicts[step.key] = Verdict(status="run", reason=stale)
        else:
            inputs = None if changing else _digests(store, step)
            verdicts[step.key] = Verdict(status="run", reason=_why_new(plan, step, history, store, inputs))
    return verdicts


def check_disk(steps: Iterable[tuple[Step, Verdict]], store: Store) -> None:
    """Refuse a build that the store's disk has no room for. Raises UsageError."""
    need = sum(step.disk for step, verdict in steps if verdict.status != "cached")
    free = shutil.disk_usage(store.root).free
    if need > free:
        raise UsageError(
            f"the build needs about {format_size(need)} of disk in {store.root}, {format_size(free)} are free",
            "free some room (edgedistill store gc --keep RECIPE), or set EDGEDISTILL_STORE to another disk",
        )


def _digests(store: Store, step: Step) -> dict[Key, str]:
    """Return the digest of every input that there is."""
    found = {key: store.load(key) for key in step.stage.inputs()}
    return {key: entry.digest for key, entry in found.items() if entry is not None}


def _why_new(plan: Plan, step: Step, history: dict[str, Any], store: Store, inputs: dict[Key, str] | None) -> str:
    """Compare the key's fields with those of the last build of this recipe. ``inputs``: their digests, None while they change."""
    if store.interrupted(step.key, inputs):
        return "interrupted: goes on where it stopped"
    old = next((history[name] for name in step.ids if name in history), None)
    if old is None:
        return "never built"
    if old["version"] != step.stage.version:
        return f"stage {step.stage.name} changed: version {old['version']} -> {step.stage.version}"
    before, after = _flatten(old["fields"]), _flatten(json.loads(json.dumps(_jsonable(step.stage.fields()))))
    keys = set(plan.by_key)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    own = [name for name in changed if after.get(name) not in keys]
    if own:
        told = [f"{name} {_short(before.get(name))} -> {_short(after.get(name))}" for name in own[:2]]
        return ", ".join(told) + (f" and {len(own) - 2} more" if len(own) > 2 else "")
    upstream = [plan.by_key[Key(after[name])].id for name in changed if after.get(name) in keys]
    return f"{', '.join(dict.fromkeys(upstream))} changed" if upstream else "its entry is gone"


def _short(value: Any) -> str:
    text = str(value) if value is not None else "nothing"
    return text if len(text) <= 24 else text[:10] + "…"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat.update(_flatten(item, f"{prefix}.{name}" if prefix else str(name)))
    return flat


def _jsonable(value: Any) -> Any:
    from edgedistill.fingerprint import canonical_json

    return json.loads(canonical_json(value))


def _history_path(store: Store, plan: Plan) -> Path:
    return store.root / "history" / f"{plan.identity}.json"


def _read_history(store: Store, plan: Plan) -> dict[str, Any]:
    try:
        return json.loads(_history_path(store, plan).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _write_history(store: Store, plan: Plan) -> None:
    """Remember each step's fields, so that the next plan can say what changed."""
    old = _read_history(store, plan)
    new = {
        name: {"version": step.stage.version, "fields": _jsonable(step.stage.fields())}
        for step in plan.steps
        for name in step.ids
    }
    if {**old, **new} != old:
        path = _history_path(store, plan)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps({**old, **new}))


# ── running ──


class Runner:
    """Execute the steps of one plan on this machine, one after another."""

    def __init__(self, plan: Plan, store: Store, reporter: Reporter | None = None, *, threads: int = 0) -> None:
        self.plan, self.store = plan, store
        self.reporter = reporter or Reporter()
        self.rows = RowStore(store.root)
        self.rates = Rates(store.root)
        self.threads = threads or usable_cpus()
        self.outcome = Outcome()
        self._left: dict[Key, float] = {}

    def build(self, *, force: Iterable[str] = ()) -> Outcome:
        """Bring every step of the plan up to date. Errors of steps are collected in the outcome, not raised."""
        with ExitStack() as using:
            with self._told("build"):
                using.enter_context(self.store.using(step.key for step in self.plan.steps))
            using.callback(_restore_torch, _torch_threads())
            return self._build(set(force))

    def _build(self, forced: set[str]) -> Outcome:
        started = time.monotonic()
        _quiet()
        verdicts = assess(self.plan, self.store, force=forced)
        to_run = [step for step in self.plan.steps if verdicts[step.key].status != "cached"]
        estimates = {step.key: self.rates.seconds(step.work) for step in to_run}
        self._left = {key: value for key, value in estimates.items() if value is not None}
        known = sum(self._left.values()) if len(self._left) == len(to_run) else None
        self.reporter.plan(len(self.plan.steps), len(to_run), known)
        # It serves what the next plan says has changed; a full disk is told of by the first step that writes.
        with suppress(OSError):
            _write_history(self.store, self.plan)
        broken: set[Key] = set()
        try:
            for step in self.plan.steps:
                if broken & set(step.stage.inputs()):
                    broken.add(step.key)
                    self.outcome.skipped.append(step.id)
                    continue
                try:
                    if verdicts[step.key].reason.startswith("damaged"):
                        self.reporter.note(f"{step.id}: the stored entry is {verdicts[step.key].reason}; rebuilding it")
                        self.store.discard(step.key)
                    ran = self._bring(step, forced=bool(forced & set(step.ids)))
                    (self.outcome.ran if ran else self.outcome.cached).append(step.id)
                except EdgeDistillError as error:
                    broken.add(step.key)
                    self.outcome.failed[step.id] = error
                    self.reporter.fail(step, error)
                self._left.pop(step.key, None)
        finally:
            self.reporter.close()
            self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _bring(self, step: Step, *, forced: bool = False) -> bool:
        """Make one step's entry valid. Returns whether it ran."""
        if not forced and self._valid(step) is not None:
            return False
        self._check_inputs(step)
        waiting = f"{step.id}: another build is on it"
        with self.store.lease(step.key, waiting=lambda who: self.reporter.note(f"{waiting} ({who}); waiting")) as mine:
            # Another build may have made it while the inputs were read, before there was a lease to wait for.
            if (not forced or not mine) and self._valid(step) is not None:
                return False
            self._run(step)
        return True

    def _valid(self, step: Step) -> Entry | None:
        try:
            entry = self.store.load(step.key)
        except Damaged as error:
            self.reporter.note(f"{step.id}: the stored entry is damaged ({error.why}); rebuilding it")
            self.store.discard(step.key)
            return None
        return entry if entry is not None and not self.store.inputs_match(entry) else None

    def _check_inputs(self, step: Step) -> None:
        """Compare the bytes of every input with its digest; rebuild what is damaged."""
        for key in step.stage.inputs():
            upstream = self.plan.by_key[key]
            entry = self._valid(upstream)
            try:
                if entry is None:
                    raise Damaged(key, self.store.entry_path(key), "gone")
                self.store.verify(entry)
            except Damaged as error:
                self.reporter.note(f"{upstream.id}: the stored entry is damaged ({error.why}); rebuilding it")
                self.store.discard(key)
                self._bring(upstream)
                self.outcome.ran.append(upstream.id)

    def _run(self, step: Step) -> None:
        free = shutil.disk_usage(self.store.root).free
        if free < step.disk:
            raise StepFailed(
                f"{step.id}: needs about {step.disk / 2**20:.0f} MiB of disk in {self.store.root}, "
                f"{free / 2**20:.0f} MiB are free",
                "free some room (edgedistill store gc --keep RECIPE), or set EDGEDISTILL_STORE to another disk; "
                "finished steps are kept",
            )
        entries = {key: self._loaded(key) for key in step.stage.inputs()}
        inputs = {key: entry.digest for key, entry in entries.items()}
        resumed = self.store.interrupted(step.key, inputs)
        with self._told(step.id):
            out, work = self.store.partial(step.key, inputs)
        _limit_torch(self.threads)
        estimate = self._left.get(step.key)
        left = sum(self._left.values()) if self._left else None
        self.reporter.start(step, estimate, left)
        started = time.monotonic()
        ctx = Context(
            out=out,
            work=work,
            entries=entries,
            rows=self.rows,
            threads=self.threads,
            progress=lambda done, total, note: self.reporter.progress(step, done, total, note),
            note=lambda text: self.reporter.note(f"{step.id}: {text}"),
        )
        with self._told(step.id):
            facts = step.stage.run(ctx)
            seconds = time.monotonic() - started
            self.store.commit(
                step.key,
                stage=step.stage.name,
                inputs=inputs,
                fields=_jsonable(step.stage.fields()),
                facts=facts,
                seconds=seconds,
                versions=versions(),
            )
        part = resumed or facts.get("reused") or facts.get("waited") or facts.get("from_store")
        if not part:  # else this says nothing of how fast the whole is done
            with suppress(OSError):  # an estimate is not worth a step that is done
                self.rates.learn(step.work, seconds)
        self.reporter.finish(step, seconds)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Make a message with a remedy of whatever goes wrong in the step of this name."""
        try:
            yield
        except StepFailed as error:
            if name not in error.message:
                error.message = f"{name}: {error.message}"
                error.args = (error.message,)
            raise
        except EdgeDistillError:
            raise
        except Exception as error:
            if _no_room(error, self.store.root):
                raise StepFailed(
                    f"{name}: the disk of {self.store.root} is full",
                    "free some room (edgedistill store gc --keep RECIPE); finished steps are kept and this one goes on",
                ) from error
            if _no_memory(error):
                raise StepFailed(f"{name}: out of memory", "lower its batch_size; finished steps are kept") from error
            raise self._bug(name, error) from error

    def _loaded(self, key: Key) -> Entry:
        entry = self.store.load(key)
        if entry is None:
            raise StepFailed(
                f"{self.plan.by_key[key].id}: its entry disappeared during the build", "run the build again"
            )
        return entry

    def _bug(self, name: str, error: Exception) -> EdgeDistillError:
        """Keep the traceback in a file and tell one line of it."""
        log = self.store.root / "log" / f"{name.replace('/', '-')}.txt"
        log.parent.mkdir(exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
        return EdgeDistillError(
            f"{name}: {type(error).__name__}: {error}",
            f"this is a bug; the traceback is in {log}; finished steps are kept",
        )


def _no_room(error: Exception, root: Path) -> bool:
    """Tell whether a disk is full. Libraries have words of their own for it, in errors of any kind (numpy: "65536 requested and 0
    written"); then the room that is left decides.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return "No space left" in str(error) or shutil.disk_usage(root).free < FULL


def _no_memory(error: Exception) -> bool:
    """Tell whether memory did not suffice: Python's, torch's on a CPU, or a GPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _limit_torch(threads: int) -> None:
    """Have torch compute with so many threads, one a core at most: left to itself it takes all cores of the machine, those that a
    container may not use, too, and they wait for each other. The steps import it, and one may have changed it.
    """
    count = min(threads, usable_cores())
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)
    else:
        os.environ["OMP_NUM_THREADS"] = str(count)


def _torch_threads() -> int | None:
    """Return with how many threads torch computes; None where it is not loaded."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _restore_torch(threads: int | None) -> None:
    """Have torch compute with as many threads as before the build, for who called it."""
    if threads is not None:
        sys.modules["torch"].set_num_threads(threads)


def _quiet() -> None:
    """Keep the libraries' own bars and notes out of the progress; must run before they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that make bytes, and of Python."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def raise_failures(outcome: Outcome, call: Callable[[EdgeDistillError], None]) -> None:
    """Hand every failure to ``call``: gates last, since a failed step explains them."""
    for error in sorted(outcome.failed.values(), key=lambda e: isinstance(e, GateMissed)):
        call(error)
