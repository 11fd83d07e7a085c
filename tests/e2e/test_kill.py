"""Builds killed with kill -9 at random moments end as the uninterrupted one does.

Same rows, each stored once; no row that was stored is asked again; each optimiser step once in each log; the same
bytes of every adapter and checkpoint (this CPU, this library build: the trainer is deterministic there)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.store import Store
from tests.e2e.conftest import PROMPTS, REDUCED, read_jsonl

pytestmark = pytest.mark.timeout(1500)
UNTIL = "merge"
STEPS = ("adapt", "heal", "distill/1")


@pytest.fixture(scope="module")
def whole(session_of: Callable[..., Any]) -> Any:
    """The uninterrupted build."""
    session = session_of(targets=["phone-midrange"], **{"baselines": {}})
    plan = session.plan.only(session.plan.match(UNTIL))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    return session


def start(folder: Path, store: Path) -> subprocess.Popen[bytes]:
    """Start the same build in a process group of its own."""
    import json

    command = [sys.executable, "-m", "edgedistill", "build", str(folder), "-t", "phone-midrange", "--until", UNTIL]
    for key, value in {**REDUCED, "baselines": {}}.items():
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


def run_and_kill(whole: Any, store: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    folder = whole.path.parent
    store.mkdir(parents=True)
    clone_models(whole.store.root, store)
    done = 0
    for _ in range(kills):
        process = start(folder, store)
        try:
            process.wait(timeout=rng.uniform(4.0, 22.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        else:
            break  # it came to its end before its moment
    last = start(folder, store)
    _, errors = last.communicate(timeout=1200)
    assert last.returncode == 0, errors.decode()[-2000:]
    check(whole, store, done)


def test_three_kills_change_nothing(whole: Any, tmp_path: Path) -> None:
    run_and_kill(whole, tmp_path / "store", kills=3, seed=1)


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole: Any, tmp_path: Path) -> None:
    for part in range(5):
        run_and_kill(whole, tmp_path / f"store-{part}", kills=4, seed=100 + part)


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
