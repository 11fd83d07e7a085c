"""Targets in F32 and BF16 get the weights of the merged checkpoint, and not what is left of these in f16."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgedistill.fingerprint import Key
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.recipes import copy_recipe
from edgedistill.runner import Reporter, Runner
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.made_build import make_session
from tests.unit.test_plan import changed, make


def plain(type_name: str, **more: Any) -> dict[str, Any]:
    return {"quantize": {"laptop-x86": {"type": type_name, "imatrix": False, **more}}, "tune": None}


def test_only_what_is_wider_than_f16_is_made_of_another_file(tmp_path: Path) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    narrow, wide = make(folder, **plain("Q8_0")), make(folder, **plain("BF16"))
    assert changed(narrow, wide) - {"convert/student-f32"} == {
        f"{stage}/laptop-x86" for stage in ("quantize", "evaluate", "measure", "package")
    }
    step, f16 = (wide.match(name)[0] for name in ("convert/student-f32", "convert/student"))
    assert dataclasses.replace(step.stage, dtype="f16") == f16.stage  # pyright: ignore[reportCallIssue]
    assert step.key in wide.match("quantize/laptop-x86")[0].stage.inputs()
    head = make(folder, **plain("Q8_0", embedding_type="F32"))
    assert head.match("convert/student-f32")[0].key in head.match("quantize/laptop-x86")[0].stage.inputs()
    teacher = make(folder, baselines__quantized_teacher="F32")
    assert teacher.match("convert/teacher-f32")[0].key in teacher.match("quantize/teacher")[0].stage.inputs()


@pytest.mark.parametrize(("type_name", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16)])
def test_the_file_has_the_checkpoints_own_weights(type_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    session = make_session(
        tmp_path, keep=lambda name: name not in ("convert/student-f32", "quantize/laptop-x86"), **plain(type_name)
    )
    quantize = session.plan.match("quantize/laptop-x86")[0]
    (merged,) = session.plan.match("convert/student-f32")[0].stage.inputs()
    entry = session.store.load(merged)
    assert entry is not None and session.plan.by_key[merged].id == "merge"
    session.store.discard(merged)
    model = make_model(tmp_path / "tiny")
    out, _ = session.store.partial(merged, {})
    shutil.copytree(model, out / "model")
    inputs = {Key(key): digest for key, digest in entry.inputs.items()}
    session.store.commit(merged, stage="merge", inputs=inputs, fields={}, facts={}, seconds=1.0, versions={})
    outcome = Runner(session.plan.only([quantize]), session.store, Reporter()).build()
    assert not outcome.failed and outcome.ran == ["convert/student-f32", "quantize/laptop-x86"]
    entry = session.store.load(quantize.key)
    assert entry is not None
    info, own = read_info(entry.path / "model.gguf"), load_file(model / "model.safetensors")
    assert info.file_type == type_name
    for name, there in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        weights = own[name].float()
        assert not torch.equal(weights, weights.half().float())  # f16 would show
        np.testing.assert_array_equal(read_tensor(info, there), weights.to(dtype).float().numpy())
