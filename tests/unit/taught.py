"""A tiny model that was taught twelve answers: a teacher that knows its task, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from edgedistill.runner import Runner
from edgedistill.session import prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

LOCAL = """
schema  = 1
name    = "taught"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[adapt]
files      = ["rows.jsonl"]
method     = "full"
epochs     = 40
batch_size = 8
lr         = 3e-3
[student]
model = "path:model"
[prompts]
files = ["rows.jsonl"]
"""
WORDS = ("alarm", "call", "volume", "song", "queue", "thirty", "percent", "turn", "play", "next", "down", "tomorrow")


def make_taught(folder: Path) -> Path:
    """Write a tiny model, rows, suites, and ``teacher``, which the ordinary `adapt` taught the rows; return the folder."""
    make_model(folder / "model", max_position_embeddings=1024)
    rows = [{"id": word, "prompt": f"Say {word}.", "reference": word} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = [{**row, "id": f"{row['id']}?", "prompt": f"please: {row['id']}"} for row in rows]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in suite))
    prose = {"id": "p", "prompt": "Turn down the volume", "reference": "thirty percent"}
    (folder / "prose.jsonl").write_text(json.dumps(prose) + "\n")
    (folder / "local.toml").write_text(LOCAL)
    session = prepare(folder / "local.toml", store=Store(folder / "store"))
    plan = session.plan.only(session.plan.match("adapt"))
    assert not Runner(plan, session.store).build().failed
    entry = session.store.load(session.plan.match("adapt")[0].key)
    assert entry is not None
    (folder / "teacher").symlink_to(entry.path / "model")
    return folder
