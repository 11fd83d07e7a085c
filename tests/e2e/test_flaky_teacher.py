"""2,000 prompts to a real HTTP server that fails by plan, from a build that is killed ten times: nothing is lost or paid twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedistill.rows import RowStore
from edgedistill.spending import Budget, Ledger
from tests.planned_server import Planned
from tests.unit.formats.gguf.conftest import make_model

pytestmark = pytest.mark.timeout(600)
ROWS, DOUBLES, KILLS, CONCURRENCY = 2000, 40, 10, 16
DEEDS = ("429 0.05", "429", "500", "cut", "truncated", "slow 0.1")
RECIPE = """
schema  = 1
name    = "flaky"
targets = ["laptop-x86"]
[teacher]
model       = "openai:m"
backend     = "openai"
server      = "URL"
concurrency = 16
retries     = 6
[student]
model = "path:model"
[prompts]
files = ["rows.jsonl"]
[score]
kind = "none"
[distill]
loss = { kd = 0.0, ce = 1.0 }
[generate]
max_new_tokens = 10
"""


def deed(row: int, before: int) -> str:
    """Every fourth row fails once, every fortieth twice."""
    fails = (row % 4 == 0) + (row % 40 == 0)
    return DEEDS[(row // 4 + before) % len(DEEDS)] if before < fails else "ok"


def planned_failures() -> int:
    """Count the tries that end without an answer; a slow answer is one."""
    return sum(not deed(row, before).startswith(("ok", "slow")) for row in range(ROWS) for before in range(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model")
    rows = [{"id": f"r{n}", "prompt": f"Question {n}"} for n in range(ROWS)]
    rows += [{"id": f"again{n}", "prompt": f"Question {n}"} for n in range(DOUBLES)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def start(folder: Path, budget: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgedistill", "build", str(folder), "--until", "generate"]
    command += ["--set", f"teacher.budget.tokens={budget}"]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(folder / "store")}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_nothing_is_lost_asked_in_vain_or_spent_beyond_the_budget(folder: Path) -> None:
    rng, rows = random.Random(5), RowStore(folder / "store")
    ledger = Ledger(rows.path, "flaky: openai:m", Budget())
    # enough for every request at its usual price, and for what killed builds had under way at its highest
    small, enough = 12_000, 200_000
    with Planned(deed) as planned:
        (folder / "recipe.toml").write_text(RECIPE.replace("URL", planned.url))
        first = start(folder, small)
        errors = first.communicate(timeout=120)[1].decode()
        assert first.returncode == 3 and "teacher.budget" in errors, errors[-1000:]
        assert planned.billed <= ledger.spent().tokens <= small
        assert ledger.spent().tokens > small - 400  # too little was left for one more
        assert rows.counts()["rows"] > 200
        kills = 0
        for part in range(KILLS):
            begun, least = start(folder, enough), planned.asked.total() + rng.randrange(1, 2 * ROWS // (KILLS + 5))
            while begun.poll() is None and planned.asked.total() < least:
                time.sleep(0.002)
            assert begun.poll() is None, f"it ended by itself before kill {part}"
            os.killpg(begun.pid, signal.SIGKILL)
            begun.communicate()
            kills += 1
            assert planned.billed <= ledger.spent().tokens <= enough
        last = start(folder, enough)
        errors = last.communicate(timeout=300)[1].decode()
        assert last.returncode == 0, errors[-2000:]
        asked, billed = planned.asked, planned.billed
    assert set(asked) == set(range(ROWS))
    assert asked.total() - ROWS <= planned_failures() + kills * CONCURRENCY
    assert billed <= ledger.spent().tokens <= enough
    assert rows.counts()["rows"] == ROWS
    with sqlite3.connect(rows.path) as db:
        again = db.execute("SELECT count(*) FROM rows JOIN asks USING (key) WHERE asks.at > rows.at").fetchone()[0]
    assert again == 0, "a stored row was asked again"
    (view,) = (folder / "store" / "entries").glob("*/*/rows.jsonl")
    lines = [json.loads(line) for line in view.read_text().splitlines()]
    assert {line["id"]: line["text"] for line in lines} == {
        **{f"r{n}": f"answer {n}" for n in range(ROWS)},
        **{f"again{n}": f"answer {n}" for n in range(DOUBLES)},
    }
