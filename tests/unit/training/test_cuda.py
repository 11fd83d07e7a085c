"""On an NVIDIA GPU the same code gives what it gives on a CPU: training, soft targets, answers, likelihoods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.evals.runners.transformers import TransformersRunner
from edgedistill.teachers.decode import decode
from edgedistill.teachers.protocol import Sampling
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.ffn import prune_ffn
from edgedistill.training.hidden import HiddenStates
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.on_policy import OnPolicy
from edgedistill.training.targets import Kind
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.teachers.test_transformers_teacher import Tokenizer
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

pytestmark = pytest.mark.cuda

FULL = TrainSettings(method="full", lr=1e-3, steps=4, batch_size=6, dtype="float32", schedule="constant", warmup=0.0)
KD = LossTerms(kd=0.7, ce=0.3, temperature=1.5)


def both(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Run on the GPU, then where there seems to be none."""
    on_gpu = run("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return on_gpu, run("cpu")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


SPARSE: tuple[Kind, ...] = ("sampled", "top-k", "top-sampled")


@pytest.mark.parametrize(
    ("method", "what"),
    [(method, what) for method in ("full", "lora") for what in ("ce", *SPARSE, "dense", "on-policy")]
    + [("full", "hidden"), ("full", "norms")],
)
def test_training_takes_the_same_steps(tmp_path: Path, method: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(FULL, method=method, lora=LoraSettings(rank=4), loss=LossTerms(kd=0.0, ce=1.0))
    if what == "hidden":
        settings = replace(settings, hidden=3.0)
    elif what == "norms":
        settings = replace(settings, method="norms")
    elif what == "on-policy":
        settings = replace(settings, loss=LossTerms(kd=1.0, ce=0.0), on_policy=1.0, on_policy_tokens=8)
    elif what != "ce":
        settings = replace(settings, loss=replace(KD, temperature=2.0 if what == "top-k" else 1.5))
    examples = make_examples()
    kind: Any = what if what in SPARSE else None
    targets = score(make_llama(seed=1), examples, kind=kind, n=6) if kind else None

    def run(place: str) -> list[float]:
        options: dict[str, Any] = {}
        if what in ("dense", "on-policy"):
            options["teacher"] = DenseTeacher(make_llama(seed=1), VOCAB)
        if what == "on-policy":
            options["writer"] = OnPolicy(decode=decode, stop_ids=(1,), end=1, vocab_size=VOCAB)
        if what == "hidden":
            options["guide"] = HiddenStates(make_llama(seed=1), [0, 1, 2])
        train(make_llama(), examples, targets, settings=settings, out=tmp_path / place, **options)
        return losses(tmp_path / place)

    on_gpu, on_cpu = both(run, monkeypatch)
    assert on_gpu == pytest.approx(on_cpu, rel=2e-3)
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-5)


def test_a_teacher_writes_and_scores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples()
    prompts = [one.prompt_ids for one in examples]

    def run(_place: str) -> Any:
        teacher = TransformersTeacher("tiny", "float32", model=make_llama(), tokenizer=Tokenizer())
        greedy = teacher.generate(prompts, sampling=Sampling(max_new_tokens=8))
        drawn = teacher.generate(prompts, sampling=Sampling(max_new_tokens=8, temperature=0.8, samples=2))
        texts = [sorted((one.index, one.sample, one.token_ids) for one in some) for some in (greedy, drawn)]
        found = {kind: dict(teacher.score(examples, kind=kind, n=12)) for kind in SPARSE}
        return texts, found

    (texts, found), (want_texts, want) = both(run, monkeypatch)
    assert texts == want_texts
    for kind in found:
        for at, one in want[kind].items():
            np.testing.assert_array_equal(found[kind][at].ids, one.ids)
            np.testing.assert_allclose(found[kind][at].logp, one.logp, atol=2e-3)


def test_likelihoods_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(5)

    def run(_place: str) -> list[np.ndarray]:
        runner = TransformersRunner.__new__(TransformersRunner)
        runner.path = tmp_path
        runner._teacher = TransformersTeacher("tiny", "float32", model=make_llama(), tokenizer=Tokenizer())
        rows = [[*one.prompt_ids, *one.completion_ids] for one in examples]
        return list(runner.logprobs(rows, [range(len(row) - 1) for row in rows]))

    on_gpu, on_cpu = both(run, monkeypatch)
    for found, want in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-3)


def test_ffns_lose_the_same_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(40)

    def run(_place: str) -> Any:
        model, on = make_llama(), make_llama()
        if torch.cuda.is_available():
            on = on.to("cuda")
        errors = prune_ffn(model, examples, 64, layers=[0, 1, 2], run=on)
        return errors, model.state_dict()

    (errors, found), (want_errors, want) = both(run, monkeypatch)
    assert errors == pytest.approx(want_errors, rel=1e-2)
    for name, value in want.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-2, atol=1e-2)
