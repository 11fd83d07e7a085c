"""The packaged recipe ``draft``, reduced in rows and steps: a real draft beside a real model, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.artifact import commands, read_manifest
from edgedistill.recipes import copy_recipe
from edgedistill.report import collect
from edgedistill.report_work import drafts_sheet
from edgedistill.runner import Runner
from edgedistill.session import prepare, publish
from edgedistill.store import Store

TARGET = "laptop-x86"
REDUCED = {
    **{"teacher.min_score": {}, "adapt.rows": 32, "heal.rows": 32, "student.ffn_rows": 96, "prompts.rows": 8},
    **{"calibrate.rows": 8, "draft.rows": 24, "draft.epochs": 1.0},
}
ROWS = 12  # of each suite
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_draft_is_measured_and_ships_if_it_helps(tmp_path: Path, shared_store: Store) -> None:
    folder = copy_recipe("draft", tmp_path / "draft")
    for suite in ("holdout", "ood"):
        path = folder / "data" / f"{suite}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:ROWS]))
    session = prepare(folder, overrides=REDUCED, store=Store(shared_store.root))
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(session.plan, session.store).build().ran == []
    publish(session, outcome)
    package = folder / "dist" / "draft" / TARGET
    manifest = read_manifest(package)
    found = manifest.draft["drafting"]
    assert found["prompts"] == found["answer"]["n"] == ROWS
    assert 0 <= found["acceptance"]["low"] <= found["acceptance"]["value"] <= found["acceptance"]["high"] <= 1
    assert 1 <= found["tokens_per_check"]["value"] <= 1 + manifest.draft["tokens"]
    low, high = found["answer"]["low"], found["answer"]["high"]
    assert found["verdict"] == ("helped" if low > 1 else "hurt" if high < 1 else "undecided")
    (line,) = collect(session).drafts
    assert line.verdict == found["verdict"] and line.refused == manifest.draft["refused"]
    assert found["verdict"] in drafts_sheet(collect(session)).rows[0]
    ships = not manifest.draft["refused"]
    assert (package / "draft.gguf").exists() == ships == ("draft.gguf" in manifest.files)
    assert any("-md draft.gguf" in line for line in commands(manifest)) == ships
    if found["verdict"] != "helped":
        assert not ships
    if ships:
        assert manifest.files["draft.gguf"] == manifest.draft["digest"]
