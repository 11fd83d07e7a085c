from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.teachers.decode import decode
from edgedistill.training.data import Example
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.divergences import Divergence
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms, dense_kl
from edgedistill.training.on_policy import OnPolicy, chosen
from edgedistill.training.packing import packed_mode
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import VOCAB, make_examples, make_llama

END = 1
WRITER = OnPolicy(decode=decode, stop_ids=(END,), end=END, vocab_size=VOCAB)
SETTINGS = TrainSettings(
    method="full",
    lr=1e-3,
    steps=6,
    batch_size=6,
    dtype="float32",
    schedule="constant",
    warmup=0.0,
    loss=LossTerms(kd=1.0, ce=0.0),
    on_policy=1.0,
    on_policy_tokens=8,
)


def teacher() -> DenseTeacher:
    return DenseTeacher(make_llama(seed=1), VOCAB)


def run(out: Path, settings: TrainSettings = SETTINGS, **options: Any) -> list[dict[str, Any]]:
    train(make_llama(), make_examples(), None, settings=settings, out=out, teacher=teacher(), writer=WRITER, **options)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(out.glob("*/*.safetensors")))


def test_the_first_step_judges_what_the_student_wrote(tmp_path: Path) -> None:
    """The logged loss is the mean KL along the student's own sequences, recomputed plainly."""
    from edgedistill.training.settings import plan_steps

    line = run(tmp_path, replace(SETTINGS, steps=1))[0]
    examples = make_examples()
    rows = [examples[row] for row in plan_steps(examples, replace(SETTINGS, steps=1))[0]]
    student, judge = make_llama(), make_llama(seed=1)
    with packed_mode(student):
        written = WRITER.write(student, rows, seed=0, step=0, most=8, temperature=1.0)
    total = count = 0.0
    for one in written:
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        at = slice(len(one.prompt_ids) - 1, -1)
        with torch.no_grad():
            total += float(dense_kl(judge(input_ids=ids).logits[0, at], student(input_ids=ids).logits[0, at]).sum())
        count += len(one.completion_ids)
    assert line["written_rows"] == len(rows)
    assert line["completion_tokens"] == count
    assert line["kd"] == pytest.approx(total / count, rel=1e-4)
    assert line["ce"] == 0.0


def test_a_student_writes_the_same_beside_a_teacher_that_reads_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of another architecture leaves the packed mode off for both; the student's rows must not see each other then."""
    from edgedistill.training import packing

    one = replace(SETTINGS, steps=1)
    (flat,) = run(tmp_path / "flat", one)
    known, student = packing.packable, make_llama()
    monkeypatch.setattr(packing, "packable", lambda model: model is student and known(model))
    train(student, make_examples(), None, settings=one, out=tmp_path / "padded", teacher=teacher(), writer=WRITER)
    (padded,) = (json.loads(line) for line in (tmp_path / "padded" / "log.jsonl").read_text().splitlines())
    assert padded["completion_tokens"] == flat["completion_tokens"]
    assert padded["kd"] == pytest.approx(flat["kd"], rel=1e-3)


def test_draws_depend_on_seed_step_and_row_alone() -> None:
    model, examples = make_llama(), make_examples(6)
    with packed_mode(model):
        together = WRITER.write(model, examples, seed=0, step=3, most=8, temperature=1.0)
        alone = [WRITER.write(model, [one], seed=0, step=3, most=8, temperature=1.0)[0] for one in examples]
        later = WRITER.write(model, examples, seed=0, step=4, most=8, temperature=1.0)
    assert together == alone
    assert together != later
    assert all(1 <= len(one.completion_ids) <= 9 for one in together)
    assert all(END not in one.completion_ids[:-1] for one in together)


def test_it_comes_closer_to_the_teacher(tmp_path: Path) -> None:
    lines = run(tmp_path, replace(SETTINGS, lr=3e-3, steps=40))
    first, last = (sum(line["kd"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_cut_off_writes_the_same_again(tmp_path: Path, method: Any) -> None:
    settings = replace(SETTINGS, method=method, lora=LoraSettings(rank=4), on_policy=0.5, checkpoint_steps=2)
    run(tmp_path / "whole", settings)

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings, progress=stop)
    run(tmp_path / "cut", settings)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name


def test_a_share_of_the_rows_is_written_and_the_rest_keeps_its_cross_entropy(tmp_path: Path) -> None:
    settings = replace(SETTINGS, on_policy=0.5, steps=12, loss=LossTerms(kd=0.5, ce=0.5))
    lines = run(tmp_path, settings)
    written = sum(line["written_rows"] for line in lines)
    assert 12 * 6 * 0.3 < written < 12 * 6 * 0.7
    assert all(line["ce"] > 0 for line in lines if line["written_rows"] < 6)
    examples = [Example(str(at), (1,), (2,)) for at in range(2000)]
    assert sum(chosen(0.25, 0, 0, examples)) == pytest.approx(500, abs=80)
    assert not any(chosen(0.0, 0, 0, examples))


def test_other_divergences_and_small_batches_take_part(tmp_path: Path) -> None:
    terms = LossTerms(kd=1.0, ce=0.0, divergence=Divergence("reverse-kl", None))
    whole = run(tmp_path / "whole", replace(SETTINGS, steps=2, loss=terms))
    parts = run(tmp_path / "parts", replace(SETTINGS, steps=2, loss=terms, micro_batch=2))
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on_policy needs the teacher beside the student"):
        train(make_llama(), make_examples(), None, settings=SETTINGS, out=tmp_path, writer=WRITER)
    with pytest.raises(UsageError, match="nothing says how the student writes"):
        train(make_llama(), make_examples(), None, settings=SETTINGS, out=tmp_path, teacher=teacher())
    with pytest.raises(UsageError, match="the student's context has 256"):
        run(tmp_path, replace(SETTINGS, on_policy_tokens=300))
