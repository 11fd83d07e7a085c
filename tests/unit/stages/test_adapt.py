"""The adapt step: what stops its merge costs no step of its training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.recipe import Adapt as Table
from edgedistill.rows import RowStore
from edgedistill.stages.adapt import Adapt
from edgedistill.step import Context
from edgedistill.training import lora
from tests.unit.formats.gguf.conftest import make_model


def test_a_merge_that_is_stopped_does_not_cost_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "base" / "model")
    rows = tuple(
        Row(id=f"r{n}", messages=({"role": "user", "content": f"play {n}"},), reference=f"Song {n}.") for n in range(8)
    )
    table = Table.model_validate({"files": ["train.jsonl"], "batch_size": 4, "epochs": 1})
    stage = Adapt(
        model=Key("a" * 64), rows_digest="d", training=table.keyed("files", "rows", "seed"), seed=0, rows=rows
    )
    work = tmp_path / "work"
    work.mkdir()

    def context(name: str, told: list[str]) -> Context:
        out = tmp_path / name
        out.mkdir()
        entries: Any = {stage.model: SimpleNamespace(path=tmp_path / "base", facts={})}
        return Context(
            out=out,
            work=work,
            entries=entries,
            rows=cast("RowStore", None),
            threads=1,
            progress=lambda done, total, note: told.append(note),
            note=lambda _: None,
        )

    def stopped(*_: object, **__: object) -> None:
        raise StepFailed("the disk is full", "make room")

    with monkeypatch.context() as patch:
        patch.setattr(lora, "merge", stopped)
        with pytest.raises(StepFailed):
            stage.run(context("first", []))
    told: list[str] = []
    stage.run(context("second", told))
    assert told == ["merging"]
    assert (tmp_path / "second" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "second" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "second" / "log" / "train.jsonl").is_file()
