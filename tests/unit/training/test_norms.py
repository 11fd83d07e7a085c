"""Norm tweaking trains the norms alone, resumes, and hands on what it did only where it helped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.training.norms import CHECKED, is_norm, read_norms, save_norms, tune_norms
from edgedistill.training.settings import TrainSettings
from tests.unit.training.tiny import make_examples, make_llama

SETTINGS = TrainSettings(lr=1e-2, batch_size=4, dtype="float32", warmup=0.1, steps=24)


def folders(tmp_path: Path, *, noise: float) -> tuple[Path, Path]:
    """Save a model and a copy whose matrices were disturbed, as rounding does, all the same way."""
    whole = make_llama(2)
    whole.save_pretrained(tmp_path / "whole")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.ndim == 2:
                parameter.add_(noise * parameter.abs().mean() * (torch.randn_like(parameter) + 0.5))
    whole.save_pretrained(tmp_path / "rounded")
    return tmp_path / "rounded", tmp_path / "whole"


def test_the_norms_come_closer_and_nothing_else_moves(tmp_path: Path) -> None:
    rounded, whole = folders(tmp_path, noise=0.4)
    tuned = tune_norms(rounded, whole, make_examples(40), settings=SETTINGS, work=tmp_path / "work")
    assert tuned.helped and 0 < tuned.after < 0.9 * tuned.before
    assert (tuned.rows, tuned.result.steps, tuned.result.method) == (8, 24, "norms")
    assert (
        set(tuned.norms) == {n for n, p in make_llama(2).named_parameters() if is_norm(n, p)} and len(tuned.norms) == 5
    )
    said = tuned.to_json()
    assert json.loads(json.dumps(said)) == said and said["helped"] and said["norms"] == 5
    assert not (tmp_path / "work" / "model").exists()
    again = tune_norms(rounded, whole, make_examples(40), settings=SETTINGS, work=tmp_path / "work")
    assert again.after == tuned.after  # resumed: the training was done


def test_a_student_that_lost_nothing_keeps_its_norms(tmp_path: Path) -> None:
    """At a rate that only harms, the rows held out say so."""
    _, whole = folders(tmp_path, noise=0.0)
    tuned = tune_norms(whole, whole, make_examples(40), settings=replace(SETTINGS, lr=0.3), work=tmp_path / "work")
    assert not tuned.helped and tuned.before < 1e-6


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="9 rows are too few"):
        tune_norms(tmp_path, tmp_path, make_examples(2 * CHECKED - 1), settings=SETTINGS, work=tmp_path / "work")


def test_norms_are_read_as_they_were_saved(tmp_path: Path) -> None:
    norms = {"model.norm.weight": torch.linspace(0, 1, 7), "a_layernorm.weight": torch.ones(3).bfloat16()}
    save_norms(norms, tmp_path / "norms")
    found = read_norms(tmp_path / "norms")
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(norms, torch.float32)
    assert (found["model.norm.weight"] == norms["model.norm.weight"]).all()
