"""A teacher in a GGUF file that llama.cpp runs: it is proved, asked and scores, and a student ships that never saw its weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgedistill.devices.protocol import Settings
from edgedistill.errors import RecipeError
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.report import collect
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.recipe import load_kept
from edgedistill.training.targets import read_targets
from tests.unit.taught import WORDS, make_taught

RECIPE = """
schema  = 1
name    = "from-a-file"
targets = ["laptop-x86"]

[teacher]
model     = "gguf:teacher.gguf"
backend   = "llama_cpp"
min_score = { words = 0.2 }

[student]
model = "path:model"

[prompts]
files = ["rows.jsonl"]

[generate]
max_new_tokens = 12

[[filter]]
kind   = "reference"
metric = "exact"

[score]
kind = "sampled"
n    = 12

[distill]
method     = "full"
epochs     = 6
batch_size = 8
lr         = 2e-3
loss       = { kd = 1.0, ce = 0.0, temperature = 1.5 }

[suites.words]
files  = ["asked.jsonl"]
metric = "exact"

[suites.prose]
files  = ["prose.jsonl"]
metric = "perplexity"

[gates]
min_shrink = 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_taught(tmp_path_factory.mktemp("gguf-teacher"))
    f16 = convert(folder / "teacher", folder / "f16.gguf", dtype="f16").path
    quantize(f16, folder / "teacher.gguf", "Q8_0")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def prepared(folder: Path, store: Path, **overrides: Any) -> Session:
    return prepare(folder, store=Store(store), overrides=overrides)


def entry(session: Session, step: str) -> Any:
    found = session.store.load(session.plan.match(step)[0].key)
    assert found is not None
    return found


def test_it_is_built_to_the_package_from_the_file_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.devices.local.Settings", partial(Settings, pp=64, tg=16, ttft_prompts=2, reps=2))
    session = prepared(folder, tmp_path / "store")
    assert any("Q8_0" in warning and "as its file is" in warning for warning in session.plan.warnings)
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(session.plan, session.store).build().ran == []
    # nothing was brought to full precision
    assert (entry(session, "convert/teacher").path / "model.gguf").read_bytes() == (
        folder / "teacher.gguf"
    ).read_bytes()
    asked = entry(session, "generate").facts
    assert asked["rows"] == asked["asked"] == len(WORDS)
    assert RowStore(tmp_path / "store").counts() == {"rows": len(WORDS), "asks": len(WORDS)}
    # its distributions are those of the same weights in full precision, as far as eight bits go
    kept = entry(session, "filter").path / "kept.jsonl"
    examples, _ = load_kept(kept, folder / "model")
    assert len(examples) >= 10
    drawn = read_targets(sorted((entry(session, "score").path / "targets").glob("*.parquet")), examples)
    best = dict(TransformersTeacher(folder / "teacher", "float32").score(examples, kind="top-k", n=1))
    for at, one in enumerate(drawn):
        for place, likeliest in enumerate(best[at].ids):
            span = slice(one.offsets[place], one.offsets[place + 1])
            assert one.ids[span][one.counts[span].argmax()] == likeliest
    data = collect(session)
    teacher = next(model for model in data.models if model.id == "teacher")
    assert (teacher.label, teacher.type) == ("teacher Q8_0", "Q8_0")
    assert teacher.suites["words"].score
    log = (entry(session, "distill/1").path / "log" / "train.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["kd"] < 0.7 * json.loads(log[0])["kd"]
    (shrink,) = [line for line in data.gates["laptop-x86"] if line["name"] == "shrink"]
    assert shrink["status"] == "green"


def test_an_online_round_asks_the_file_what_the_student_fails(folder: Path, tmp_path: Path) -> None:
    changes = {"round": [{"kind": "online", "samples": 1}], "distill.epochs": 1}
    session = prepared(folder, tmp_path / "store", **changes)
    outcome = Runner(session.plan.only(session.plan.match("distill/2")), session.store).build()
    assert not outcome.failed, outcome.failed
    asked = entry(session, "generate/round-1").facts
    assert 0 < asked["asked"] == asked["rows"] <= len(WORDS)


def test_it_may_be_kept_to_a_schema(folder: Path, tmp_path: Path) -> None:
    (folder / "word.json").write_text(json.dumps({"enum": ["alarm", "queue"]}))
    free = prepared(folder, tmp_path / "store")
    session = prepared(folder, tmp_path / "store", **{"generate.json_schema": "word.json"})
    assert session.plan.match("generate")[0].key != free.plan.match("generate")[0].key
    outcome = Runner(session.plan.only(session.plan.match("generate")), session.store).build()
    assert not outcome.failed, outcome.failed
    lines = (entry(session, "generate").path / "rows.jsonl").read_text().splitlines()
    assert {json.loads(line)["text"] for line in lines} <= {'"alarm"', '"queue"'}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"score.kind": "dense"}, "score.kind"),
        ({"score.kind": "dense", "distill.on_policy": 0.5}, "score.kind"),
        ({"adapt": {"files": ["rows.jsonl"]}}, "adapt"),
        ({"student.model": "teacher"}, "student.model"),
        ({"heal": {"hidden": 1.0}}, "heal.hidden"),
        ({"distill.features": {"weight": 1.0}}, "distill.features"),
        ({"baselines.quantized_teacher": "Q4_0"}, "baselines.quantized_teacher"),
        ({"generate.style": "tool-trace"}, "generate.style"),
        ({"teacher.model": "path:model"}, "teacher.model"),
        ({"teacher.concurrency": 3}, "teacher.concurrency"),
    ],
)
def test_what_needs_its_weights_is_refused(folder: Path, tmp_path: Path, overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(folder, tmp_path / "store", **overrides)
    assert f" {key}: " in str(caught.value)


def test_another_tokenizer_is_refused_in_the_plan(folder: Path, tmp_path: Path, smollm2_gguf: Path) -> None:
    with pytest.raises(RecipeError, match="different tokenizers"):
        prepared(folder, tmp_path / "store", **{"teacher.model": f"gguf:{smollm2_gguf}"})
    text = {"score.kind": "none", "distill.loss": {"kd": 0.0, "ce": 1.0}}
    session = prepared(folder, tmp_path / "store", **{"teacher.model": f"gguf:{smollm2_gguf}", **text})
    assert json.dumps(session.plan.warnings).count("Q4_1") == 1
