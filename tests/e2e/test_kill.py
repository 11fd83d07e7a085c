"""Builds killed with kill -9 at random moments end as the uninterrupted one does.

Same rows, each stored once; no row that was stored is asked again; each optimiser step once in each log; the same
bytes of every adapter and checkpoint (this CPU, this library build: the trainer is deterministic there)."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgedistill.fingerprint import file_digest
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.store import Store
from tests.e2e.conftest import PROMPTS, REDUCED, read_jsonl

pytestmark = pytest.mark.timeout(1500)
UNTIL = "merge"
PHONE = "phone-midrange"
LATE = f"quantize/{PHONE}"  # the first step whose files a process of its own writes
STEPS = ("adapt", "heal", "distill/1")
# Another type and rounding than the recipe has: those would take half a minute here.
SET: dict[str, Any] = {"baselines": {}, "quantize.phone-midrange": {"type": "Q4_0", "rounding": "nearest"}}


@pytest.fixture(scope="module")
def whole(session_of: Callable[..., Any]) -> Any:
    """The uninterrupted build."""
    session = session_of(targets=["phone-midrange"], **SET)
    plan = session.plan.only(session.plan.match(LATE))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    return session


def start(folder: Path, store: Path, until: str = UNTIL, *more: str) -> subprocess.Popen[bytes]:
    """Start the same build in a process group of its own."""
    command = [sys.executable, "-m", "edgedistill", "build", str(folder), "-t", PHONE, "--until", until, *more]
    for key, value in {**REDUCED, **SET}.items():
        text = (
            "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + "}"
            if isinstance(value, dict)
            else json.dumps(value)
        )
        command += ["--set", f"{key}={text}"]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(store), "EDGEDISTILL_CHECKPOINT_SECONDS": "1"}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def clone_models(source: Path, goal: Path) -> None:
    """Give a new store the downloaded model, so that a kill does not mean another download."""
    shutil.copytree(source / "models", goal / "models", copy_function=os.link)


def check(whole: Any, store: Path, kills: int) -> None:
    plan, rows = whole.plan, RowStore(store)
    assert rows.counts()["rows"] == PROMPTS
    with sqlite3.connect(rows.path) as db:
        again = db.execute("SELECT count(*) FROM rows JOIN asks USING (key) WHERE asks.at > rows.at").fetchone()[0]
        mine = {row[0] for row in db.execute("SELECT key FROM rows")}
    assert again == 0, "a stored row was asked again"
    assert len(rows.asked_again()) <= kills * REDUCED["generate.batch_size"]
    killed = Store(store)
    for name in STEPS:
        key = plan.match(name)[0].key
        ours, theirs = killed.load(key), whole.store.load(key)
        assert ours is not None and theirs is not None
        log = read_jsonl(ours.path / "log" / "train.jsonl")
        assert [line["step"] for line in log] == list(range(1, len(log) + 1)), f"{name}: a step twice or not at all"
        assert ours.digest == theirs.digest, f"{name}: other bytes than the uninterrupted build"
    # the view of this very build: the shared store holds what other tests asked, too
    generated = whole.store.load(plan.match("generate")[0].key)
    assert mine == {line["row"] for line in read_jsonl(generated.path / "rows.jsonl")}


def moments(seconds: Sequence[float], kills: int, rng: random.Random) -> Iterator[tuple[int, float]]:
    """Draw moments of a build whose steps take so long: (step, how long it is then at work since it began or went on).

    By steps and not by the clock, so that a build on a faster machine does not end first; its last fifth is left out for that, too.
    """
    ends = list(itertools.accumulate(seconds))
    drawn = sorted(rng.uniform(0, 0.8 * ends[-1]) for _ in range(kills))
    for before, moment in itertools.pairwise([0.0, *drawn]):
        at = bisect.bisect(ends, moment)
        yield at, moment - max(ends[at] - seconds[at], before)


def at_work(store: Path, process: subprocess.Popen[bytes]) -> set[str]:
    """Return the keys of the steps that a build holds leases on."""
    found = set()
    for path in (store / "leases").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["pid"] == process.pid:
                found.add(path.stem)
    return found


def kill(
    process: subprocess.Popen[bytes], due: Callable[[], Any], seconds: float = 0.0, *, alone: bool = False
) -> bool:
    """Kill a build, and unless it is to die ``alone`` what it started, that long after it is ``due``. Returns False where it came
    to its end before that: the machine has become several times faster since the moment was drawn.
    """
    while process.poll() is None and not due():
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    if (code := process.poll()) is not None:
        _, errors = process.communicate()
        if code:
            pytest.fail(f"the build ended with {code} before it was killed: {errors.decode()[-2000:]}")
        return False
    (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return True


def run_and_kill(whole: Any, store: Path, kills: int, seed: int, *, late: bool = False) -> None:
    """Kill builds at random moments until the checkpoint is merged, with ``late`` another one while it quantizes; then go on to the
    end, and compare with the uninterrupted one.
    """
    rng = random.Random(seed)
    folder, until = whole.path.parent, LATE if late else UNTIL
    store.mkdir(parents=True)
    clone_models(whole.store.root, store)
    steps = [step.key for step in whole.plan.only(whole.plan.match(UNTIL)).steps]
    done = 0
    for at, seconds in moments([whole.store.load(key).seconds for key in steps], kills, rng):
        build, after = start(folder, store), set(steps[at:])
        if not kill(build, lambda build=build, after=after: after & at_work(store, build), seconds):
            break
        done += 1
    assert done, "every build came to its end before it was killed"
    if late:
        quantize = whole.plan.match(LATE)[0].key
        written = store / "partial" / quantize / "out"
        assert kill(start(folder, store, until), lambda: written.is_dir() and os.listdir(written), alone=True)
        assert Store(store).load(quantize) is None
    last = start(folder, store, until)
    _, errors = last.communicate(timeout=1200)
    assert last.returncode == 0, errors.decode()[-2000:]
    check(whole, store, done)
    if late:
        for step in whole.plan.only(whole.plan.match(LATE)).steps:
            ours, theirs = Store(store).load(step.key), whole.store.load(step.key)
            assert ours is not None and ours.digest == theirs.digest, (
                f"{step.id}: other bytes than the uninterrupted build"
            )


def test_three_kills_and_a_late_one_change_nothing(whole: Any, tmp_path: Path) -> None:
    run_and_kill(whole, tmp_path / "store", kills=3, seed=1, late=True)


def test_moments_are_within_the_steps_that_they_name() -> None:
    seconds = [0.1, 20.0, 3.0, 10.0, 2.0]
    drawn = list(moments(seconds, 200, random.Random(0)))
    assert len(drawn) == 200
    assert [at for at, _ in drawn] == sorted(at for at, _ in drawn)
    assert {at for at, _ in drawn} >= {1, 2, 3}
    for at in range(len(seconds)):
        assert 0 <= sum(waited for step, waited in drawn if step == at) <= seconds[at]


def test_a_build_that_ends_before_its_kill_is_no_killed_build(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit('done')"], stderr=subprocess.PIPE)
    with pytest.raises(pytest.fail.Exception, match="ended with 1 before it was killed: done"):
        kill(ended, lambda: False)


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole: Any, tmp_path: Path) -> None:
    for part in range(5):
        run_and_kill(whole, tmp_path / f"store-{part}", kills=4, seed=100 + part)


@pytest.mark.gating
@pytest.mark.slow  # two minutes
def test_killed_while_it_is_checked_and_packaged(whole: Any, tmp_path: Path) -> None:
    """What was answered before a kill is not answered again, and what ships is whole."""
    folder, root = tmp_path / "quickstart", tmp_path / "store"
    shutil.copytree(whole.path.parent, folder, ignore=shutil.ignore_patterns("dist"))
    clone_models(whole.store.root, root)
    store = Store(root)
    expected = whole.plan.match(f"evaluate/{PHONE}")[0].key
    outcome = Runner(whole.plan.only(whole.plan.match(f"evaluate/{PHONE}")), whole.store).build()
    assert not outcome.failed, outcome.failed
    for step in whole.plan.steps:
        if step.key != expected and whole.store.load(step.key) is not None:
            shutil.copytree(whole.store.entry_path(step.key), store.entry_path(step.key), copy_function=os.link)

    def build() -> subprocess.Popen[bytes]:  # speeds beside other tests miss their gate
        return start(folder, store.root, f"package/{PHONE}", "--ship-anyway")

    kept = store.root / "partial" / expected / "work" / "holdout.0000.jsonl"
    assert kill(build(), kept.is_file)
    seconds = [line["seconds"] for line in read_jsonl(kept)]
    measure, process = whole.plan.match(f"measure/{PHONE}")[0].key, build()
    assert kill(process, lambda: measure in at_work(store.root, process), 1.0)
    assert store.load(measure) is None
    packages, process = set(store.all_keys()) | {measure}, build()
    kill(process, lambda: at_work(store.root, process) - packages and store.load(measure))  # it may be over before that
    last = build()
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors.decode()[-2000:]

    found, uninterrupted, measured = store.load(expected), whole.store.load(expected), store.load(measure)
    assert found is not None and uninterrupted is not None and found.digest == uninterrupted.digest
    assert found.facts["suites"]["holdout"]["seconds"] == sum(seconds), "answered again"
    shipped, answered = folder / "dist" / "quickstart" / PHONE, store.load(whole.plan.by_key[expected].stage.model)
    assert answered is not None
    assert file_digest(shipped / "model.gguf") == answered.files["model.gguf"].sha256
    manifest = json.loads((shipped / "manifest.json").read_text())
    assert measured is not None and manifest["measurement"] == measured.facts


@pytest.mark.gating
@pytest.mark.slow  # three minutes: the default suite has fifteen
def test_two_builds_on_one_store_share_the_work(whole: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    clone_models(whole.store.root, store)
    first = start(whole.path.parent, store)
    time.sleep(1.0)
    second = start(whole.path.parent, store)
    codes = [process.communicate(timeout=1200)[1] and process.returncode for process in (first, second)]
    assert codes == [0, 0]
    check(whole, store, kills=0)
    assert RowStore(store).counts()["asks"] == PROMPTS
