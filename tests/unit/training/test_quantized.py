"""The blocks of a quantized file are trained towards the model that it was made from, and what is packed is what was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.norms import replace_norms
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.repack import replace_codes
from edgedistill.recipe_tune import Tune
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.norms import mean_kld
from edgedistill.training.quantized import FEWEST, read_trained, tune_weights
from edgedistill.training.recipe import load_model
from edgedistill.training.settings import TrainSettings
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.training.tiny import make_examples

SETTINGS = TrainSettings(
    code_lr=1e-2, scale_lr=2e-3, norm_lr=2e-3, batch_size=16, dtype="float32", steps=48, beta2=0.95, gradient_norms=0
)
TASK, OTHER = make_examples(160, vocab=260), make_examples(160, seed=1, vocab=260)


class Made:
    """A tiny model and its quantized file."""

    def __init__(self, folder: Path, type_: str, **config: Any) -> None:
        self.whole = make_model(folder / "whole", **config)
        self.file, self.dequantized = folder / "q.gguf", folder / "dequantized"
        quantize(convert(self.whole, folder / "f16.gguf", dtype="f16").path, self.file, type_)
        gguf_to_hf(self.file, self.dequantized)

    def tune(self, work: Path, settings: TrainSettings = SETTINGS, *, worse: float = 1.0, **more: Any) -> Any:
        given = {"settings": settings, "worse": worse, "work": work, **more}
        return tune_weights(self.file, self.dequantized, self.whole, TASK, OTHER, **given)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("four"), "Q4_0")


@pytest.mark.parametrize("type_", ["Q4_0", "IQ4_NL", pytest.param("Q4_K_M", marks=pytest.mark.slow)])
def test_the_packed_file_is_closer_by_what_was_measured(type_: str, four_bits: Made, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256} if "K" in type_ else {}
    made = four_bits if type_ == "Q4_0" else Made(tmp_path, type_, **wide)
    tuned = made.tune(tmp_path / "work")
    assert tuned.helped and tuned.step > 0 and tuned.after < 0.9 * tuned.before
    assert tuned.elsewhere[1] < tuned.elsewhere[0] and (tuned.matrices, tuned.norms, tuned.rows) == (
        15 if type_ == "Q4_K_M" else 14,
        5,
        16,
    )
    assert 0 < tuned.turned < 0.5
    matrices, norms = read_trained(tuned.folder)
    packed = tmp_path / "packed.gguf"
    shutil.copyfile(made.file, packed)
    replace_codes(packed, matrices)
    replace_norms(packed, norms)
    assert packed.stat().st_size == made.file.stat().st_size
    # The file, dequantized by gguf's own code, diverges by just what was told.
    gguf_to_hf(packed, tmp_path / "again")
    teacher = DenseTeacher(load_model(made.whole), load_model(made.whole).config.vocab_size)
    verdict = TASK[4::5][1::2]
    assert mean_kld(load_model(tmp_path / "again"), teacher, verdict, torch.float32) == pytest.approx(
        tuned.after, rel=1e-4
    )
    said = tuned.to_json()
    assert json.loads(json.dumps(said)) == said and said["parts"] == "weights" and said["helped"]


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_codes(four_bits: Made, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=16, checkpoint_steps=3)
    once = four_bits.tune(tmp_path / "once", settings)

    def kill(done: int, *_: Any) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        four_bits.tune(tmp_path / "cut", settings, progress=kill)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-0000009"]
    cut = four_bits.tune(tmp_path / "cut", settings)
    assert cut.result.resumed_at == 9 and (cut.step, cut.after, cut.turned) == (once.step, once.after, once.turned)
    one, other = (load_file(found.folder / "weights.safetensors") for found in (once, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    logs = [
        [json.loads(line) for line in (at / "log.jsonl").read_text().splitlines()]
        for at in (tmp_path / "once", tmp_path / "cut")
    ]
    held = [[(line["step"], line["held_out"]) for line in log if "held_out" in line] for log in logs]
    assert held[0] == held[1] and [step for step, _ in held[0]] == list(range(2, 17, 2))
    assert not list((tmp_path / "cut").glob("best*"))


def test_what_only_harms_does_not_ship(four_bits: Made, tmp_path: Path) -> None:
    settings = replace(SETTINGS, code_lr=3.0, scale_lr=0.5, norm_lr=0.5, steps=8, warmup=0.0)
    tuned = four_bits.tune(tmp_path / "work", settings)
    assert not tuned.helped and tuned.step == 0


def test_a_run_that_comes_no_further_ends(four_bits: Made, tmp_path: Path) -> None:
    settings = replace(SETTINGS, code_lr=1e-12, scale_lr=1e-12, norm_lr=1e-12, steps=40)
    tuned = four_bits.tune(tmp_path / "work", settings)
    assert not tuned.helped and tuned.turned == 0
    assert tuned.result.steps == 20  # a look every five steps: the first, and three that were not below it


def test_a_gain_at_the_task_that_costs_too_much_elsewhere_does_not_ship(four_bits: Made, tmp_path: Path) -> None:
    tuned = four_bits.tune(tmp_path / "work", replace(SETTINGS, steps=24), worse=1e-3)
    assert not tuned.helped and tuned.step == 0


def test_the_best_weights_on_the_way_are_those_that_are_kept(four_bits: Made, tmp_path: Path) -> None:
    """At a rate that helps at first and harms as it grows."""
    settings = replace(SETTINGS, code_lr=0.04, warmup=1.0, steps=48)
    tuned = four_bits.tune(tmp_path / "work", settings, worse=10.0)
    log = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    held = {line["step"]: line["held_out"] for line in log if "held_out" in line}
    assert tuned.step == min(held, key=held.__getitem__) < max(held)
    assert tuned.after < tuned.before


def test_too_few_rows_are_refused(four_bits: Made, tmp_path: Path) -> None:
    for task, other, key in ((TASK[:9], OTHER, "tune.files"), (TASK, OTHER[: FEWEST - 1], "tune.general.files")):
        with pytest.raises(UsageError, match="9 rows are too few") as caught:
            tune_weights(
                four_bits.file, four_bits.dequantized, four_bits.whole, task, other,
                settings=SETTINGS, worse=1.0, work=tmp_path,
            )  # fmt: skip
        assert key in caught.value.hint


def test_the_rates_of_a_recipe_are_those_of_the_trainer() -> None:
    """They are left out of a key at their default: the trainer's must be the same."""
    for name in ("code_lr", "scale_lr", "norm_lr"):
        assert Tune.model_fields[name].default == getattr(TrainSettings, name)


def test_numbers_of_a_trained_file_are_its_own(four_bits: Made, tmp_path: Path) -> None:
    tuned = four_bits.tune(tmp_path / "work", replace(SETTINGS, steps=8))
    matrices, norms = read_trained(tuned.folder)
    assert {(codes.dtype, bases.dtype) for codes, bases in matrices.values()} == {(np.dtype("u1"), np.dtype("f2"))}
    assert max(codes.max() for codes, _ in matrices.values()) == 15 and all(
        one.dtype == np.float32 for one in norms.values()
    )
