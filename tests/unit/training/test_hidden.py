from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.hidden import HiddenStates, tokens_of
from edgedistill.training.losses import LossTerms
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.shaping import prune_depth
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import make_examples, make_llama

KEPT = [0, 2, 5]
SETTINGS = TrainSettings(
    method="full", lr=2e-3, steps=6, batch_size=6, dtype="float32", schedule="constant", warmup=0.0, hidden=2.0
)


def states(model: Any, example: Example) -> list[torch.Tensor]:
    """Return the output of every layer, one row at a time, by plain hooks."""
    found: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: found.append(out[0])) for layer in model.model.layers]
    with torch.no_grad():
        model.model(input_ids=torch.tensor([[*example.prompt_ids, *example.completion_ids]]))
    for hook in hooks:
        hook.remove()
    return [one.reshape(-1, one.shape[-1]) for one in found]


def plainly(teacher: Any, student: Any, examples: list[Example]) -> float:
    """Compute the error row by row, as the docstring says it."""
    total = 0.0
    for example in examples:
        of_teacher, of_student = states(teacher, example), states(student, example)
        for layer, matched in enumerate((1, 4, 5)):
            s, t = of_student[layer][1:], of_teacher[matched][1:]
            total += float(((s - t).square().sum(-1) / t.square().sum(-1)).sum()) / 3
    return total


def pair() -> tuple[Any, Any]:
    return make_llama(6), prune_depth(make_llama(6), KEPT)


@pytest.mark.parametrize("packed", [True, False])
def test_the_error_is_that_of_one_row_at_a_time(packed: bool) -> None:
    teacher, student = pair()
    examples = make_examples(5)
    guide = HiddenStates(teacher, KEPT)
    guide.watch(student)
    if packed:
        with packed_mode(student) as can, torch.no_grad():
            assert can
            batch = make_batch(examples, packed=True)
            completion_states(student, batch)
            found = float(guide.error(batch))
    else:
        with torch.no_grad():
            batch = make_batch(examples, packed=False)
            completion_states(student, batch)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("edgedistill.training.packing.packable", lambda _model: False)
                found = float(guide.error(batch))
    assert found == pytest.approx(plainly(*pair(), examples), rel=1e-4)
    assert tokens_of(examples) == sum(example.length - 1 for example in examples)


def test_a_student_that_is_the_teacher_is_no_distance_away() -> None:
    teacher, student = make_llama(4), make_llama(4)
    guide = HiddenStates(teacher, range(4))
    guide.watch(student)
    with packed_mode(student), torch.no_grad():
        batch = make_batch(make_examples(4), packed=True)
        completion_states(student, batch)
        assert float(guide.error(batch)) < 1e-8


def test_the_batch_may_lie_on_another_device_than_the_models() -> None:
    """Batches are made on the CPU: on a GPU (here the meta device stands for it) the tokens' weights must follow."""
    teacher, student = (one.to("meta") for one in pair())
    guide = HiddenStates(teacher, KEPT)
    guide.watch(student)
    with packed_mode(student), torch.no_grad():
        batch = make_batch(make_examples(3), packed=True)
        completion_states(student, batch)
        assert guide.error(batch).device.type == "meta"


def test_it_trains_towards_the_teacher_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    examples = make_examples(12)
    logs = []
    for name, micro in (("whole", None), ("parts", 2)):
        teacher, student = pair()
        settings = replace(SETTINGS, micro_batch=micro, steps=30)
        train(student, examples, None, settings=settings, out=tmp_path / name, guide=HiddenStates(teacher, KEPT))
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert logs[0][0]["hidden"] == pytest.approx(logs[1][0]["hidden"], rel=1e-4)
    assert logs[0][0]["gradient"] == pytest.approx(logs[1][0]["gradient"], rel=1e-3)
    assert logs[0][0]["loss"] == pytest.approx(logs[0][0]["ce"] + 2.0 * logs[0][0]["hidden"], rel=1e-5)
    assert logs[0][-1]["hidden"] < 0.5 * logs[0][0]["hidden"]


def test_hidden_states_alone_are_a_lesson(tmp_path: Path) -> None:
    teacher, student = pair()
    settings = replace(SETTINGS, loss=LossTerms(kd=0.0, ce=0.0))
    result = train(student, make_examples(6), None, settings=settings, out=tmp_path, guide=HiddenStates(teacher, KEPT))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["hidden"] < log[0]["hidden"] and result.ce == 0.0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    teacher, _ = pair()
    with pytest.raises(UsageError, match="4 layers of width 64"):
        HiddenStates(teacher, KEPT).watch(make_llama(4))
    with pytest.raises(UsageError, match="no teacher"):
        train(make_llama(3), make_examples(4), None, settings=SETTINGS, out=tmp_path)
