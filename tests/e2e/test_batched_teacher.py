"""A build whose teacher is asked in batches, killed or interrupted at every step of one: each prompt is asked and paid once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edgedistill.rows import RowStore
from edgedistill.spending import Budget, Ledger
from tests.batch_server import BatchServer, wait_for
from tests.unit.formats.gguf.conftest import make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = 40
RECIPE = """
schema  = 1
name    = "batched"
targets = ["laptop-x86"]
[teacher]
model   = "openai:m"
backend = "openai"
server  = "URL"
batch   = { poll = 0.05 }
price   = { input = 1.0, output = 2.0, batch = 0.5 }
budget  = { tokens = 100_000 }
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


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgedistill", "build", str(folder), "--until", "generate"]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(folder / "store")}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_a_killed_build_finds_its_batch_again(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    rows = [{"id": f"r{n}", "prompt": f"Question {n}"} for n in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = RowStore(tmp_path / "store")
    with BatchServer() as there:
        (tmp_path / "recipe.toml").write_text(RECIPE.replace("URL", there.url))
        for step, number in (("upload", signal.SIGKILL), ("create", signal.SIGKILL), ("poll", signal.SIGINT)):
            there.hang = step
            there.hanging.clear()
            begun = start(tmp_path)
            wait_for(there.hanging)
            os.killpg(begun.pid, number)
            said = begun.communicate(timeout=60)[1].decode()
            assert (begun.returncode == 130) == (number == signal.SIGINT), said[-2000:]
            if step == "poll":
                assert "batch_1 at" in said and "the next build waits for the answers" in said
        there.hang = "download"
        there.hanging.clear()
        begun = start(tmp_path)
        wait_for(there.hanging)
        os.killpg(begun.pid, signal.SIGKILL)
        begun.communicate()
        assert stored.counts() == {"rows": 0, "asks": ROWS}
        there.hang = ""
        last = start(tmp_path)
        said = last.communicate(timeout=120)[1].decode()
        assert last.returncode == 0, said[-2000:]
        assert "batch_1 with 40 requests is under way since an earlier build" in said
        assert dict(there.batched) == dict.fromkeys(range(ROWS), 1) and not there.single
        assert there.calls["upload"] == 2 and there.calls["create"] == 1
    assert stored.counts() == {"rows": ROWS, "asks": ROWS} and stored.asked_again() == []
    spent = Ledger(stored.path, "batched: openai:m", Budget()).spent()
    assert (spent.requests, spent.tokens) == (1 + ROWS, there.billed)  # the first is what `plan` asked
    (view,) = (tmp_path / "store" / "entries").glob("*/*/rows.jsonl")
    lines = [json.loads(line) for line in view.read_text().splitlines()]
    assert {line["id"]: line["text"] for line in lines} == {f"r{n}": f"answer {n}" for n in range(ROWS)}
    with sqlite3.connect(stored.path) as db:
        assert db.execute("SELECT count(*) FROM batches WHERE ended IS NULL").fetchone() == (0,)
