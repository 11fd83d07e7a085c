"""The distill step with general rows: from the recipe's table to what the report reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.recipe_distill import Distill as Table
from edgedistill.rows import RowStore
from edgedistill.stages.distill import Distill
from edgedistill.step import Context
from tests.unit.formats.gguf.conftest import make_model


def test_general_rows_reach_the_trainer_and_the_facts(tmp_path: Path) -> None:
    student, kept = tmp_path / "student", tmp_path / "kept"
    make_model(student / "model")
    kept.mkdir()
    lines = [
        {
            "id": f"r{n}",
            "messages": [{"role": "user", "content": f"play {n}"}],
            "text": f'{{"n":{n}}}',
            "reference": None,
        }
        for n in range(16)
    ]
    (kept / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    general = tuple(
        Row(id=f"g{n}", messages=({"role": "user", "content": f"How about {n}?"},), reference=f"Number {n} is fine.")
        for n in range(12)
    )
    table = Table.model_validate(
        {"keep": {"files": ["chat.jsonl"], "share": 0.5, "ce": 0.1, "stop": 9.0}, "batch_size": 4, "lr": 1e-2}
    )
    assert table.keep is not None
    training = {
        **table.keyed("loss", "seed", "keep"),
        "keep": {**table.keep.keyed("files", "rows"), "rows_digest": "d"},
    }
    stage = Distill(
        student=Key("a" * 64),
        kept=Key("b" * 64),
        text="text",
        targets=None,
        training=training,
        loss={"kd": 0.0, "ce": 1.0, "divergence": "forward-kl", "temperature": 1.0},
        seed=0,
        general=general,
    )
    entries: Any = {
        stage.student: SimpleNamespace(path=student, facts={}),
        stage.kept: SimpleNamespace(path=kept, facts={}),
    }
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    ctx = Context(
        out=out,
        work=work,
        entries=entries,
        rows=cast("RowStore", None),
        threads=1,
        progress=lambda *_: None,
        note=lambda _: None,
    )
    facts = stage.run(ctx)
    found = facts["train"]["general"]
    assert found["before"]["n"] == 2 and found["stopped_at"] is None and found["shipped_step"] == 8
    log = [json.loads(line) for line in (out / "log" / "train.jsonl").read_text().splitlines()]
    assert all({"keep_kl", "keep_ce", "lr", "memory", "tokens_per_s"} <= line.keys() for line in log)
    assert [line["step"] for line in log if "general" in line] == list(range(1, 9))  # few steps: at each
    assert abs(log[0]["keep_kl"]) < 1e-3 < log[-1]["keep_kl"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file() and json.dumps(facts)
