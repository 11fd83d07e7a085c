"""General rows hold a student to its start: the textbook's loss and gradient, exact to resume, stopped in time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.errors import StepFailed, UsageError
from edgedistill.inputs import FEWEST
from edgedistill.training.data import Example
from edgedistill.training.keeping import CHECKED, Keeper
from edgedistill.training.lora import LoraSettings, attach
from edgedistill.training.losses import dense_kl
from edgedistill.training.packing import causal_lm, packed_mode
from edgedistill.training.settings import KeepSettings, TrainSettings
from edgedistill.training.trainer import train
from tests.unit.training.tiny import VOCAB, make_examples, make_llama

SETTINGS = TrainSettings(
    method="lora",
    lora=LoraSettings(rank=4),
    lr=1e-2,
    steps=10,
    batch_size=4,
    dtype="float32",
    schedule="constant",
    warmup=0.0,
    keep=KeepSettings(share=0.5),
)


def known() -> list[Example]:
    """Return rows that the start answers as it would itself: what it can forget."""
    model, found = make_llama(2), []
    for one in make_examples(20, prefix=2, seed=7):
        ids = list(one.prompt_ids)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(replace(one, completion_ids=tuple(ids[len(one.prompt_ids) :])))
    return found


GENERAL = known()
KEYS = ("loss", "kd", "ce", "gradient", "lr", "tokens", "keep_kl", "keep_ce", "general")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(out.glob("*/*.safetensors")))


def die(*_: object) -> None:
    raise KeyboardInterrupt


def run(out: Path, settings: TrainSettings = SETTINGS, **changes: Any) -> Any:
    return train(make_llama(2), make_examples(30), None, settings=settings, out=out, general=GENERAL, **changes)


def keeping(settings: TrainSettings, folder: Path) -> Keeper:
    return Keeper(GENERAL, settings, total=10, vocab_size=VOCAB, folder=folder)


def logits(model: Any, one: Example) -> torch.Tensor:
    ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
    return model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_loss_is_the_textbooks(tmp_path: Path, method: str) -> None:
    """Value and gradient of a student that has moved, against float64, one row at a time; cut into micro-batches or not, and over
    processes.
    """
    keep = KeepSettings(share=1.0, kl=0.6, ce=0.3)
    settings = replace(SETTINGS, method=method, keep=keep, batch_size=7)
    model = make_llama(2)
    if method == "lora":
        model = attach(model, settings.lora)
    keeper = keeping(settings, tmp_path)
    keeper.freeze(model)
    keeper.begin(model, "cpu", torch.float32)
    torch.manual_seed(1)
    trained = [one for one in model.parameters() if one.requires_grad]
    with torch.no_grad():
        for one in trained:
            one.add_(0.05 * torch.randn_like(one))
    rows = keeper.rows(3)
    assert len(rows) == 7 and not {one.id for one in rows} & {one.id for one in keeper.held}
    start = make_llama(2).double()
    exact = attach(make_llama(2), settings.lora) if method == "lora" else make_llama(2)
    exact.load_state_dict(model.state_dict())
    exact.double()
    tokens = sum(len(one.completion_ids) for one in rows)
    kl = ce = torch.zeros((), dtype=torch.float64)
    for one in rows:
        with torch.no_grad():
            before = logits(start, one)
        after = logits(causal_lm(exact), one)
        kl = kl + dense_kl(before, after).sum()
        ce = ce + torch.nn.functional.cross_entropy(after, torch.tensor(one.completion_ids), reduction="sum")
    ((0.6 * kl + 0.3 * ce) / tokens).backward()
    wanted = [one.grad for one in exact.parameters() if one.requires_grad]

    def once(settings: TrainSettings, parts: int) -> tuple[float, float]:
        keeper.settings = settings
        for one in trained:
            one.grad = None
        with packed_mode(model) as packed:
            each = [
                keeper.backward(model, 3, packed=packed, part=(rank, parts), collect=lambda: None)
                for rank in range(parts)
            ]
        return sum(one[0] for one in each), sum(one[1] for one in each)

    for cut, parts in ((None, 1), (2, 1), (3, 2)):
        found = once(replace(settings, micro_batch=cut), parts)
        assert found[0] == pytest.approx(0.6 * float(kl.detach()) / tokens, rel=1e-5)
        assert found[1] == pytest.approx(0.3 * float(ce.detach()) / tokens, rel=1e-5)
        assert keeper.words(*found)["keep_kl"] == pytest.approx(float(kl.detach()) / tokens, rel=1e-5)
        for one, want in zip(trained, wanted, strict=True):
            assert one.grad is not None and want is not None
            assert float((one.grad - want).norm()) <= 1e-4 * float(want.norm()) + 1e-7


@pytest.mark.parametrize(
    "lora", [LoraSettings(rank=4), LoraSettings(rank=4, dropout=0.2), LoraSettings(rank=4, dora=True)]
)
def test_the_start_is_no_distance_from_itself_and_the_task_counts_as_before(tmp_path: Path, lora: LoraSettings) -> None:
    run(tmp_path / "kept", replace(SETTINGS, lora=lora, lr=5e-3))
    train(
        make_llama(2),
        make_examples(30),
        None,
        settings=replace(SETTINGS, lora=lora, keep=None, steps=1),
        out=tmp_path / "plain",
    )
    first, *_, last = log(tmp_path / "kept")
    (plain,) = log(tmp_path / "plain")
    if not lora.dropout:
        assert abs(first["keep_kl"]) < 1e-6  # with dropout the student itself is another in every step
        assert first["gradient"] == pytest.approx(plain["gradient"], rel=1e-4)
    assert first["ce"] == pytest.approx(plain["ce"], rel=1e-5)
    assert last["keep_kl"] > 1e-4
    assert "keep_ce" not in first and first["tokens"] > plain["tokens"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_less_is_forgotten(tmp_path: Path, method: str) -> None:
    """Over four seeds: thirty steps of one seed end anywhere, and on another processor elsewhere."""
    rise = dict.fromkeys((0.0, 4.0), 0.0)
    for kl in rise:
        for seed in range(4):
            keep = KeepSettings(share=1.0, kl=kl, stop=99.0)  # a bound that is never met, so that 0 only watches
            settings = replace(
                SETTINGS, method=method, steps=30, lr=1e-2 if method == "lora" else 8e-3, keep=keep, seed=seed
            )
            found = run(tmp_path / f"{kl}-{seed}", settings).general
            rise[kl] += found["rise"]["value"]
            assert found["before"]["value"] + found["rise"]["value"] == pytest.approx(found["after"]["value"], abs=1e-9)
            assert found["stopped_at"] is None and found["shipped_step"] == 30
    assert rise[0.0] > 1 and rise[4.0] < 0.5 * rise[0.0], rise


def test_cut_off_at_any_moment_it_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off between looks, at one, after the bound was passed, and while the result is written: the same weights, of the same
    look.
    """
    keep = KeepSettings(share=0.5, kl=0.1, stop=1.0)
    settings = replace(SETTINGS, steps=40, lr=1e-2, keep=keep, checkpoint_steps=3)
    whole = run(tmp_path / "whole", settings)
    stopped = whole.general["stopped_at"]
    assert stopped is not None and stopped < 40 and whole.steps == stopped
    assert 0 < whole.general["shipped_step"] < stopped and whole.general["rise"]["value"] <= 1.0
    looked = [line["step"] for line in log(tmp_path / "whole") if "general" in line]
    assert looked == list(range(4, stopped + 1, 4)) and whole.general["shipped_step"] in looked
    assert sorted(file.name for file in (tmp_path / "whole").iterdir()) == ["adapter", "log.jsonl", "train.json"]
    for at in (2, whole.general["shipped_step"] + 1, stopped - 1, stopped):

        def cut(done: int, total: int, note: str, at: int = at) -> None:
            if done == at:
                raise KeyboardInterrupt

        out = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            if at == stopped:
                patch.setattr("edgedistill.training.trainer._Run._finish", die)
                run(out, settings)
            run(out, settings, progress=cut)
        again = run(out, settings)
        assert again.general == whole.general and again.steps == whole.steps
        for name, value in weights(tmp_path / "whole").items():
            assert torch.equal(weights(out)[name], value), name
        for one, other in zip(log(out), log(tmp_path / "whole"), strict=True):
            assert [one.get(key) for key in KEYS] == [other.get(key) for key in KEYS]


def test_what_ships_is_the_student_of_the_look(tmp_path: Path) -> None:
    """The weights that are put back are those that a run of so many steps ends with."""
    keep = KeepSettings(share=0.5, kl=0.1, stop=1.0)
    whole = run(tmp_path / "whole", replace(SETTINGS, steps=40, keep=keep))
    short = replace(SETTINGS, steps=whole.general["shipped_step"], keep=replace(keep, stop=None))
    run(tmp_path / "short", short)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "short")[name], value), name


def test_a_bound_that_no_look_keeps_stops_the_step(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="risen by more than 1e-06 nats a token at the first look") as failure:
        run(tmp_path, replace(SETTINGS, keep=KeepSettings(stop=1e-6)))
    assert "distill.keep.kl" in failure.value.hint


def test_the_plan_refuses_what_the_trainer_would() -> None:
    assert FEWEST == 2 * CHECKED


def test_other_general_rows_are_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match="other settings or data"):
        train(make_llama(2), make_examples(30), None, settings=SETTINGS, out=tmp_path, general=GENERAL[1:])
    with pytest.raises(UsageError, match="9 general rows are too few"):
        train(make_llama(2), make_examples(30), None, settings=SETTINGS, out=tmp_path, general=GENERAL[:9])
