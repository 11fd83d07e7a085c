"""KV caches are built: a tiny student ships for two targets, one with four bits, one that may choose, through the real stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgedistill.artifact import read_manifest
from edgedistill.report import collect
from edgedistill.report_html import page
from edgedistill.report_work import caches_sheet
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "tiny-kv"
targets = ["four", "choice"]
[teacher]
model = "path:model"
[student]
model  = "teacher"
layers = 1
[prompts]
files = ["rows.jsonl"]
[generate]
max_new_tokens = 8
[distill]
method     = "full"
epochs     = 1
batch_size = 8
lr         = 1e-3
[suites.holdout]
files          = ["holdout.jsonl"]
metric         = "exact"
max_new_tokens = 6
[gates]
max_kv_kld = 30.0
"""
TARGET = """
summary = "a board"
arch    = "x86_64"
[runtime]
format   = "gguf"
engine   = "llama.cpp"
threads  = 1
context  = 512
kv_cache = {kv}
[quantize]
type = "Q8_0"
[limits]
peak_rss = "4 GiB"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", max_position_embeddings=1024, num_attention_heads=2, num_key_value_heads=1)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "targets").mkdir()
    for name, kv in (("four", '{ k = "q4_0", v = "q4_0" }'), ("choice", '"auto"')):
        (tmp_path / "targets" / f"{name}.toml").write_text(TARGET.replace("{kv}", kv))
    for name, said in (("rows", "Say"), ("holdout", "Now say")):
        rows = [{"id": f"{name}-{at}", "prompt": f"{said} {at}.", "reference": f"{at}"} for at in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_the_package_runs_as_it_was_measured(folder: Path) -> None:
    session: Session = prepare(folder, store=Store(folder / "store"))
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed
    assert Runner(session.plan, session.store).build().ran == []
    packages = {name: session.store.load(key) for name, key in session.plan.packages.items()}
    four, choice = (read_manifest(packages[name].path) for name in ("four", "choice"))  # type: ignore[union-attr]
    assert four.kv == ("q4_0", "q4_0") and choice.kv == ("f16", "f16")
    assert four.kv_cache["context"] == 512 and four.kv_cache["rows"] == 16 and four.kv_cache["kld"]["value"] > 0
    assert four.kv_cache["text"] < 16 * 512
    assert four.measurement["measurement"]["settings"]["kv"] == ["q4_0", "q4_0"]
    assert "kv" not in choice.measurement["measurement"]["settings"]
    runners = [one.evaluation["suites"]["holdout"]["runner"].get("kv_cache") for one in (four, choice)]
    assert runners == ["q4_0", None]
    found = [[line["found"] for line in one.gates if line["name"] == "kv_kld"] for one in (four, choice)]
    assert found == [[four.kv_cache["kld"]["value"]], [0.0]]
    assert "-ctk q4_0 -ctv q4_0 -fa on" in (packages["four"].path / "README.md").read_text()  # type: ignore[union-attr]
    data = collect(session)
    assert [row[1] for row in caches_sheet(data).rows] == ["q4_0", "f16"]
    assert "KV cache" in page(data)

    # A stricter gate is decided anew from what was measured.
    strict = prepare(folder, store=session.store, overrides={"gates.max_kv_kld": {"four": 1e-9}})
    again = Runner(strict.plan, strict.store).build()
    assert {step.split("/")[0] for step in again.ran} <= {"package"}
    assert [line["status"] for line in collect(strict).gates["four"] if line["name"] == "kv_kld"] == ["missed"]
