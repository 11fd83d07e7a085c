from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.errors import StepFailed, UsageError
from edgedistill.recipe_base import Training
from edgedistill.training.checkpoint import State
from edgedistill.training.data import counter_rng, make_batches
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.settings import OPTIMIZERS, check_loss, learning_rate, plan_steps
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import make_examples, make_llama, score

ROOT = Path(__file__).parents[3]
FULL = TrainSettings(method="full", lr=1e-3, steps=6, batch_size=6, dtype="float32", schedule="constant", warmup=0.0)


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(out.glob("*/*.safetensors")))


def test_it_learns_and_writes_what_loads(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    examples = make_examples(8)
    seen: list[tuple[int, int, str]] = []
    full = replace(FULL, lr=5e-3, steps=40, batch_size=8)
    result = train(
        make_llama(), examples, None, settings=full, out=tmp_path / "full", progress=lambda *one: seen.append(one)
    )
    log = _log(tmp_path / "full")
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]
    assert [line["step"] for line in log] == list(range(1, 41))
    assert seen[-1][:2] == (40, 40)
    assert "left" in seen[0][2]
    assert AutoModelForCausalLM.from_pretrained(result.path).config.use_cache
    assert sorted(file.name for file in (tmp_path / "full").iterdir()) == ["log.jsonl", "model", "train.json"]

    low = replace(full, method="lora", lora=LoraSettings(rank=8), lr=2e-2)
    result = train(make_llama(), examples, None, settings=low, out=tmp_path / "lora")
    log = _log(tmp_path / "lora")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    base = make_llama()
    adapted = PeftModel.from_pretrained(base, str(result.path))
    assert all(value.dtype == torch.float32 for value in _weights(tmp_path / "lora").values())
    ids = torch.tensor([[*examples[0].prompt_ids, *examples[0].completion_ids]])
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits[0, len(examples[0].prompt_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(examples[0].completion_ids)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(make_llama(), make_examples(), None, settings=FULL, out=tmp_path)
    again = train(make_llama(), make_examples(), None, settings=FULL, out=tmp_path, progress=lambda *_: pytest.fail())
    assert again == first
    with pytest.raises(UsageError, match="other settings or data"):
        train(make_llama(), make_examples(), None, settings=replace(FULL, lr=2e-3), out=tmp_path)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_step_is_the_textbooks(tmp_path: Path, weighted: bool) -> None:
    """One step of the trainer against plain PyTorch in float64: loss, gradient norm and the updated weights."""
    examples = make_examples(6)
    if weighted:
        examples = [
            replace(one, weight=1.0 + at, weights=tuple(0.5 * (token % 3) for token in one.completion_ids))
            for at, one in enumerate(examples)
        ]
    settings = replace(FULL, steps=1, freeze_embeddings=False, clip=0.5, weight_decay=0.1)
    train(make_llama(), examples, None, settings=settings, out=tmp_path)
    model = make_llama().double()
    count = sum(len(one.completion_ids) for one in examples)
    mass = sum(one.weight * share for one in examples for share in one.weights or [1.0] * len(one.completion_ids))
    total = 0.0
    for one in examples:
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        logits = model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(one.completion_ids), reduction="none")
        loss = (each * torch.tensor(one.weights or 1.0) * one.weight).sum() / mass
        loss.backward()
        total += float(loss)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    decay = [one for one in model.parameters() if one.ndim > 1]
    rest = [one for one in model.parameters() if one.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3).step()
    line = _log(tmp_path)[0]
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert line["gradient"] == pytest.approx(float(norm), rel=1e-4)
    assert line["completion_tokens"] == count
    trained = _weights(tmp_path)
    for name, value in model.named_parameters():
        # Adam's first step is lr * sign(gradient): where the gradient is rounding, so is its sign.
        off = (trained[name].double() - value).abs() > 1e-5
        assert float(off.double().mean()) < 0.01


@pytest.mark.parametrize("method", ["full", "lora"])
def test_accumulation_changes_nothing(tmp_path: Path, method: str) -> None:
    examples = make_examples(24)
    soft = score(make_llama(seed=1), examples)
    settings = replace(FULL, method=method, steps=4, loss=LossTerms(kd=0.6, ce=0.4, temperature=1.2), batch_size=12)
    logs = []
    examples = [replace(one, weights=tuple(0.25 + (token % 4) for token in one.completion_ids)) for one in examples]
    for micro in (None, 5, 1):
        out = tmp_path / str(micro)
        train(make_llama(), examples, soft, settings=replace(settings, micro_batch=micro), out=out)
        logs.append(_log(out))
    for line, *others in zip(*logs, strict=True):
        for other in others:
            for key in ("loss", "kd", "ce", "gradient"):
                assert other[key] == pytest.approx(line[key], rel=2e-4)


def test_the_norms_of_both_gradients_are_logged(tmp_path: Path) -> None:
    examples = make_examples(12)
    soft = score(make_llama(seed=1), examples)
    both = replace(FULL, steps=5, loss=LossTerms(kd=0.5, ce=0.5), gradient_norms=2)
    train(make_llama(), examples, soft, settings=both, out=tmp_path / "both")
    lines = _log(tmp_path / "both")
    assert [("gradient_kd" in line) for line in lines] == [True, False, True, False, True]
    only = []
    for terms in (LossTerms(kd=0.5, ce=0.0), LossTerms(kd=0.0, ce=0.5)):
        out = tmp_path / f"{terms.kd}"
        train(make_llama(), examples, soft, settings=replace(both, steps=1, loss=terms), out=out)
        only.append(_log(out)[0]["gradient"])
    assert lines[0]["gradient_kd"] == pytest.approx(only[0], rel=1e-3)
    assert lines[0]["gradient_ce"] == pytest.approx(only[1], rel=1e-3)


def test_frozen_embeddings_come_out_as_they_went_in(tmp_path: Path) -> None:
    """Through bf16 too: what is not trained is saved from the float32 original."""
    before = make_llama().model.embed_tokens.weight.detach().clone()
    train(make_llama(), make_examples(), None, settings=replace(FULL, dtype="bfloat16"), out=tmp_path)
    weights = _weights(tmp_path)
    assert torch.equal(weights["model.embed_tokens.weight"], before)
    assert not torch.equal(weights["model.norm.weight"], make_llama().model.norm.weight)
    assert weights["model.norm.weight"].dtype == torch.float32


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the children once for all tests that look at what they left."""
    root = tmp_path_factory.mktemp("children")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    script = Path(__file__).with_name("children.py")
    subprocess.run([sys.executable, str(script), str(root)], check=True, env=environment, timeout=500)
    return root


def test_killed_at_any_moment_it_ends_the_same(children: Path) -> None:
    """kill -9 before, at and after checkpoints, and inside one: the same bytes and each step once in the log."""
    for method in ("lora", "full"):
        whole = next((children / method / "whole").glob("*/*.safetensors"))
        for cut in (children / method).glob("cut*"):
            assert next(cut.glob("*/*.safetensors")).read_bytes() == whole.read_bytes()
            lines = _log(cut)
            assert [line["step"] for line in lines] == list(range(1, 15))
            for line, other in zip(lines, _log(whole.parents[1]), strict=True):
                for key in ("loss", "kd", "ce", "gradient", "lr", "tokens"):
                    assert line[key] == other[key]
            assert not (cut / "checkpoints").exists()
            assert json.loads((cut / "train.json").read_text())["resumed_at"] in (6, 12)


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    settings = replace(FULL, checkpoint_steps=1)

    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_llama(), make_examples(), None, settings=settings, out=tmp_path, progress=stop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    with pytest.raises(UsageError, match="made with other settings or data"):
        train(make_llama(), make_examples(25), None, settings=settings, out=tmp_path)
    slower = replace(settings, checkpoint_steps=0, checkpoint_seconds=5.0)
    result = train(make_llama(), make_examples(), None, settings=slower, out=tmp_path)
    assert result.resumed_at == 2


def test_nan_stops_the_step(tmp_path: Path) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(StepFailed, match="step 1: the loss is nan") as failure:
        train(model, make_examples(), None, settings=FULL, out=tmp_path)
    assert "try lr = 0.00025" in failure.value.hint
    assert _log(tmp_path)[0]["loss"] is None


def test_rates_that_are_told_are_those_of_the_table() -> None:
    """``[tune]`` of blocks refuses lr."""
    blocks = TrainSettings(method="weights", code_lr=2e-3)
    with pytest.raises(StepFailed) as failure:
        check_loss({"step": 1, "loss": math.nan, "gradient": 1.0}, State(), blocks)
    assert failure.value.hint.startswith("try code_lr = 0.0005, scale_lr = 2.5e-05, norm_lr = 2.5e-05, or a longer")


def _watch(losses: list[float]) -> int:
    """Feed losses to the check and return how many it let through."""
    state = State()
    for step, loss in enumerate(losses, 1):
        state.step = step
        try:
            check_loss({"step": step, "loss": loss, "gradient": 1.0}, state, FULL)
        except StepFailed as failure:
            assert "runs away" in failure.message
            named = re.findall(r"(\w+) = ", failure.hint)
            assert "lr = 0.00025" in failure.hint and set(named) <= set(Training.model_fields)  # keys of the recipe
            return step - 1
    return len(losses)


def test_an_easy_first_batch_is_no_measure() -> None:
    """Rows of two kinds: a healing whose first batch had 1.13 and whose first 20 had 3.8 on average was stopped, and ran to
    its end when it was let.
    """
    assert _watch([1.1, 1.2, 1.1, 1.2, *[4.0, 3.0, 5.0] * 20]) == 64


def test_a_loss_that_runs_away_stops_the_step() -> None:
    noise = counter_rng("noise").normal(0, 0.2, 200)
    falls = [6.0 * 0.98**step + 0.3 * abs(noise[step]) for step in range(200)]
    assert _watch(falls) == 200
    assert _watch([*falls[:100], *(0.8 + step * 0.2 for step in range(100))]) < 125
    assert _watch([5.9, 6.5, 6.1, 7.0, 7.2] + [20.0] * 50) == 19
    assert _watch([0.05 + 0.5 * (step % 10 == 0) for step in range(100)]) == 100  # a hard batch now and then
    assert _watch([12.0, 14.0, 11.0] + [9.0] * 40) == 43
    # A KL estimated from draws may lie below 0: it was called runaway while it fell.
    assert _watch([-3.4 - 0.001 * step for step in range(100)]) == 100
    assert _watch([-3.4] * 50 + [0.2] * 50) < 80
    assert _watch([5.2] + [9.5] * 60) == 61  # an easy batch came first


def test_the_first_window_is_what_later_ones_are_compared_with() -> None:
    assert _watch([5.2] + [9.5] * 19 + [30.0] * 20) < 30


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "qlora"}, "needs an NVIDIA GPU"),
        ({"method": "prefix"}, "use 'lora', 'full' or 'norms'"),
        ({"loss": LossTerms(kd=1.0)}, "no soft targets"),
        ({"loss": LossTerms(ce=0.0)}, "nothing to learn from"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train(make_llama(), make_examples(), None, settings=replace(FULL, **changes), out=tmp_path)


def test_rows_that_cannot_work(tmp_path: Path) -> None:
    examples = make_examples()
    soft = score(make_llama(), examples)
    kd = replace(FULL, loss=LossTerms(kd=1.0))
    with pytest.raises(UsageError, match="no example is left"):
        train(make_llama(), [], None, settings=FULL, out=tmp_path)
    with pytest.raises(UsageError, match="23 soft targets for 24 examples"):
        train(make_llama(), examples, soft[1:], settings=kd, out=tmp_path)
    with pytest.raises(UsageError, match=r"row 'row-0': soft targets for \d+ of \d+ tokens"):
        train(make_llama(), examples, [soft[1], *soft[1:]], settings=kd, out=tmp_path)


def test_schedules() -> None:
    rates = [learning_rate(replace(FULL, schedule="linear", warmup=0.2), step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 / 8)
    cosine = replace(FULL, schedule="cosine", warmup=0.0, min_lr=1e-4)
    assert learning_rate(cosine, 0, 100) == pytest.approx(1e-3)
    assert learning_rate(cosine, 50, 100) == pytest.approx(5.5e-4)
    assert learning_rate(cosine, 99, 100) == pytest.approx(1e-4, rel=0.01)
    assert {learning_rate(FULL, step, 10) for step in range(10)} == {1e-3}


def test_the_plan_of_steps() -> None:
    examples = make_examples(20)
    settings = TrainSettings(batch_size=8, epochs=2.0, seed=5)
    plan = plan_steps(examples, settings)
    assert len(plan) == 6
    assert plan[:3] == make_batches(examples, batch_size=8, seed=5, epoch=0)
    assert plan[3:] == make_batches(examples, batch_size=8, seed=5, epoch=1)
    assert plan_steps(examples, replace(settings, steps=2)) == plan[:2]
    assert len(plan_steps(examples, replace(settings, epochs=0.01))) == 1
    assert len(plan_steps(examples, replace(settings, epochs=1.5))) == math.ceil(4.5 - 0.5)


def test_several_processes_take_the_step_of_one(children: Path, tmp_path: Path) -> None:
    """Two processes over gloo: gradients are summed, each divided by the token count of the whole step."""
    settings = TrainSettings(method="full", lr=1e-3, steps=6, batch_size=6, dtype="float32")
    train(make_llama(), make_examples(), None, settings=settings, out=tmp_path)
    for one, two in zip(_log(tmp_path), _log(children / "two"), strict=True):
        for key in ("loss", "ce", "gradient"):
            assert two[key] == pytest.approx(one[key], rel=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_where_it_was_cut_off(tmp_path: Path, optimizer: str) -> None:
    examples = make_examples(24)
    rate = {"sgd": 0.5, "adafactor": 1e-2}.get(optimizer, 1e-3)
    settings = replace(FULL, optimizer=optimizer, lr=rate, steps=8, checkpoint_steps=3, schedule="constant")
    train(make_llama(), examples, None, settings=settings, out=tmp_path / "whole")
    lines = _log(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"]

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_llama(), examples, None, settings=settings, out=tmp_path / "cut", progress=stop)
    assert train(make_llama(), examples, None, settings=settings, out=tmp_path / "cut").resumed_at == 3
    for name, value in _weights(tmp_path / "whole").items():
        assert torch.equal(_weights(tmp_path / "cut")[name], value), name


def test_an_optimizer_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optimizer = 'lion': use one of adamw_torch, adafactor"):
        train(make_llama(), make_examples(), None, settings=replace(FULL, optimizer="lion"), out=tmp_path)


def test_gradient_checkpointing_changes_no_byte(tmp_path: Path) -> None:
    settings = replace(FULL, steps=3)
    for name, on in (("off", False), ("on", True)):
        train(
            make_llama(),
            make_examples(),
            None,
            settings=replace(settings, gradient_checkpointing=on),
            out=tmp_path / name,
        )
    for name, value in _weights(tmp_path / "off").items():
        assert torch.equal(_weights(tmp_path / "on")[name], value), name
