"""The tune step with parts = "weights": from a quantized file to one of the same types that is closer, or to the same file."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.recipe_tune import Tune as Table
from edgedistill.report import ReportData
from edgedistill.report_entries import fallbacks
from edgedistill.report_work import types_sheet
from edgedistill.rows import RowStore
from edgedistill.stages.tune import Tune
from edgedistill.step import Context
from edgedistill.store import Entry
from edgedistill.training.recipe import encode_rows
from tests.unit.formats.gguf.conftest import make_model


def rows(name: str, text: str) -> tuple[Row, ...]:
    return tuple(
        Row(id=f"{name}{n}", messages=({"role": "user", "content": f"{text} {n}"},), reference=f"{text} is {n * 7}")
        for n in range(20)
    )


@pytest.mark.parametrize("helps", [True, False])
def test_a_file_is_tuned_or_stays_as_it_was(helps: bool, tmp_path: Path) -> None:
    import numpy as np

    whole, quantized = tmp_path / "whole", tmp_path / "quantized"
    make_model(whole / "model")
    f16 = convert(whole / "model", tmp_path / "f16.gguf", dtype="f16").path
    quantize(f16, quantized / "model.gguf", "Q4_0")
    rates = {"norm_lr": 2e-3, "code_lr": 1e-2} if helps else {"norm_lr": 0.9, "code_lr": 3.0, "scale_lr": 0.9}
    table = Table.model_validate(
        {"targets": ["phone"], "files": ["x.jsonl"], "parts": "weights", "epochs": 16.0, **rates,
         "general": {"files": ["chat.jsonl"]}}
    )  # fmt: skip
    assert table.general is not None
    training = table.keyed("targets", "files", "rows", "skip", "general")
    stage = Tune(
        quantized=Key("a" * 64),
        student=Key("b" * 64),
        rows_digest="d",
        training={**training, "general": {**table.general.keyed("files", "rows"), "rows_digest": "e"}},
        seed=0,
        rows=rows("r", "play song"),
        general=rows("g", "naïve café"),
    )
    entries: Any = {
        stage.quantized: SimpleNamespace(path=quantized, facts={}),
        stage.student: SimpleNamespace(path=whole, facts={}),
    }
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    ctx = Context(
        out=out, work=work, entries=entries, rows=cast("RowStore", None), threads=1,
        progress=lambda *_: None, note=lambda _: None,
    )  # fmt: skip
    facts = stage.run(ctx)
    said = facts["tune"]
    assert said["helped"] is helps and said["parts"] == "weights" and json.dumps(facts)
    assert (out / "log" / "train.jsonl").is_file()
    before, after = quantized / "model.gguf", out / "model.gguf"
    assert (before.read_bytes() == after.read_bytes()) is not helps
    assert read_info(before).tensors == read_info(after).tensors and facts["size"] == before.stat().st_size
    found = fallbacks({"tune/phone": cast("Entry", SimpleNamespace(facts=facts))})
    note = types_sheet(cast("ReportData", SimpleNamespace(fallbacks=found))).rows[0][-1]
    assert note.startswith("14 matrices (") and " on other text" in note and ("no help" in note) is not helps
    if not helps:
        assert before.samefile(after)
        return
    # llama.cpp computes with the tuned file, closer to the whole one on rows that were held out.
    texts = [[*one.prompt_ids, *one.completion_ids] for one in encode_rows(stage.rows[4::5], whole / "model")]

    def logprobs(path: Path) -> np.ndarray:
        with closing(open_model(path, n_ctx=128)) as model:
            logits = np.concatenate([all_logits(model, ids) for ids in texts]).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    own = logprobs(f16)
    far = [float((np.exp(own) * (own - logprobs(path))).sum(-1).mean()) for path in (before, after)]
    assert far[1] < far[0]
