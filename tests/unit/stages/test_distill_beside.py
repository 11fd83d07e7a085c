"""distill with a teacher beside the student, from entries on disk to a checkpoint: hidden states, of a teacher in memory or
stored, and another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.fingerprint import Key
from edgedistill.recipe_distill import Distill as Settings
from edgedistill.stages.distill import DistillBeside, DistillCached
from edgedistill.stages.states import States
from edgedistill.step import Context, Stage
from tests.unit.formats.gguf.conftest import TEXT, make_model, make_tokenizer

LOSS = {"kd": 0.5, "ce": 0.5, "divergence": "forward-kl", "temperature": 1.0}


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Any]:
    """The entries of a student, a wider teacher with its tokenizer, one with another, and eight kept rows."""
    root = tmp_path_factory.mktemp("entries")
    make_model(root / "student" / "model", seed=1)
    make_model(root / "teacher" / "model", seed=2, hidden_size=96, num_hidden_layers=4)
    make_model(root / "other" / "model", seed=3, hidden_size=96, pre="qwen2")
    make_tokenizer(root / "other" / "model", "qwen2", size=330)
    lines = [
        {"id": f"r{at}", "messages": [{"role": "user", "content": TEXT[at % 5]}], "text": TEXT[(at + 1) % 5][: 6 + at]}
        for at in range(8)
    ]
    (root / "kept").mkdir()
    (root / "kept" / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {Key(name): SimpleNamespace(path=root / name, facts={}) for name in ("student", "teacher", "other", "kept")}


def run(stage: Stage, entries: dict[Key, Any], out: Path) -> Any:
    """Run a step; return its facts."""
    for folder in (out / "out", out / "work"):
        folder.mkdir(parents=True, exist_ok=True)
    rows: Any = None
    return stage.run(
        Context(
            out=out / "out",
            work=out / "work",
            entries=entries,
            rows=rows,
            threads=1,
            progress=lambda *_: None,
            note=lambda _: None,
        )
    )


def build(
    entries: dict[Key, Any], out: Path, teacher: str, states: str = "", **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """Run distill with a recipe's settings; return its facts and its log."""
    loss = {**LOSS, **options.pop("loss", {})}
    table: dict[str, Any] = {"method": "full", "batch_size": 4, "epochs": 1.0, "lr": 1e-3, **options}
    fields: dict[str, Any] = {
        "student": Key("student"),
        "kept": Key("kept"),
        "text": "text",
        "targets": None,
        "training": Settings.model_validate(table).keyed("loss", "seed"),
        "loss": loss,
        "seed": 0,
    }
    stage = (
        DistillCached(**fields, states=Key(states), pairs=((1, 0), (3, 1)))
        if states
        else DistillBeside(**fields, teacher=Key(teacher))
    )
    facts = run(stage, entries, out)
    return facts, [json.loads(line) for line in (out / "out" / "log" / "train.jsonl").read_text().splitlines()]


def test_features_and_relations_of_a_recipe_train_and_only_the_student_ships(
    entries: dict[Key, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    features = {"weight": 2.0, "pairs": [[1, 0], [3, 1]], "relations": {"distances": 5.0, "angles": 5.0}}
    facts, log = build(entries, tmp_path, "teacher", features=features)
    assert len(log) == 2
    for line in log:
        assert min(line[name] for name in ("kd", "ce", "features", "distances", "angles")) > 0
        of = line["features"] * 2.0 + line["distances"] * 5.0 + line["angles"] * 5.0
        assert line["loss"] == pytest.approx(0.5 * line["kd"] + 0.5 * line["ce"] + of, rel=1e-5)
    assert {"gradient_kd", "gradient_ce", "gradient_features"} <= set(log[0])
    assert {"features", "own features"} <= set(facts["selfcheck"]["differences"])
    shipped = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert set(shipped) == set(load_file(entries[Key("student")].path / "model" / "model.safetensors"))


def test_stored_states_teach_as_those_of_a_teacher_beside_the_student(entries: dict[Key, Any], tmp_path: Path) -> None:
    stage = States(teacher=Key("teacher"), kept=Key("kept"), layers=(1, 3))
    (tmp_path / "states" / "work").mkdir(parents=True)
    (tmp_path / "states" / "work" / "00000.partial").write_bytes(b"of a killed run")
    facts = run(stage, entries, tmp_path / "states")
    assert (facts["rows"], facts["layers"]) == (8, [1, 3])
    assert [file.name for file in (tmp_path / "states" / "out" / "states").iterdir()] == ["00000.safetensors"]
    stored = {**entries, Key("states"): SimpleNamespace(path=tmp_path / "states" / "out", facts={})}
    table: dict[str, Any] = {
        "loss": {"kd": 0.0, "ce": 1.0},
        "features": {"weight": 2.0, "pairs": [[1, 0], [3, 1]], "relations": {"distances": 5.0}},
        "epochs": 2.0,
    }
    _, live = build(entries, tmp_path / "live", "teacher", **table)
    cached_facts, cached = build(stored, tmp_path / "cached", "teacher", "states", **table)
    assert cached_facts["left_out"] == 0
    for one, other in zip(live, cached, strict=True):
        for name in ("loss", "ce", "features", "distances"):
            assert other[name] == pytest.approx(one[name], rel=2e-2), name


@pytest.mark.parametrize("divergence", ["uld", "gold"])
def test_a_teacher_with_other_tokens_teaches(entries: dict[Key, Any], tmp_path: Path, divergence: str) -> None:
    alone = {"divergence": divergence, "kd": 1.0, "ce": 0.0}
    _, log = build(entries, tmp_path, "other", loss=alone, epochs=12.0, lr=3e-3)
    assert all(line["kd"] > 0 for line in log)
    assert sum(line["kd"] for line in log[-4:]) < 0.9 * sum(line["kd"] for line in log[:4])
