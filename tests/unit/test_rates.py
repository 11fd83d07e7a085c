"""What training takes of memory: held against what was measured, and small enough for the packaged recipes on a small machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill import session as sessions
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.rates import MIB, RUNTIME_MIB, merge_memory, train_memory
from edgedistill.recipe import Recipe
from edgedistill.recipes import copy_recipe, packaged
from edgedistill.session import prepare
from edgedistill.store import Store
from tests.unit.test_plan import FACTS, make

P = 100_000_000
ROOM = (RUNTIME_MIB + 1200) * MIB  # of torch, and of activations


@pytest.mark.parametrize(
    ("full", "bf16", "optimizer", "each"),
    [
        (True, True, "adamw_torch", 20),  # 20.0 and 24.0 were measured, see train_memory
        (True, False, "adamw_torch", 24),
        (True, True, "rmsprop", 16),
        (True, False, "sgd", 16),
        (False, True, "adamw_torch", 6),
        (False, False, "adamw_torch", 6),  # 5.3
    ],
)
def test_training_takes_so_many_bytes_of_each_weight(full: bool, bf16: bool, optimizer: str, each: int) -> None:
    assert train_memory(P, full=full, bf16=bf16, optimizer=optimizer) == each * P + ROOM


def test_a_teacher_beside_is_loaded_in_float32_before_it_is_made_narrower() -> None:
    small = train_memory(P, full=True, bf16=True, beside=P)
    assert small == 22 * P + ROOM
    assert train_memory(P, full=True, bf16=False, beside=P) == 28 * P + ROOM
    # Of a large one the loading is the peak.
    assert train_memory(P, full=False, bf16=True, beside=20 * P) == 4 * 21 * P + ROOM


def test_an_adapter_of_a_large_teacher_is_merged_where_it_was_trained(tmp_path: Path) -> None:
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    params = ModelFacts(**FACTS).params()
    assert make(folder).match("adapt")[0].memory == 6 * params + ROOM
    assert merge_memory(P) < 6 * P + ROOM
    large = 20 * P
    assert merge_memory(large) > 6 * large + ROOM


@pytest.mark.parametrize("bf16", [True, False])
def test_the_packaged_recipes_fit_a_machine_of_8_gib(
    bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(recipe: Recipe, path: Path, *rest: object) -> tuple[list[Resolved], Resolved]:
        one = Resolved(source="pypi:x", kind="pypi", revision="1", digest="d", path=path, facts=ModelFacts(**FACTS))
        return [one, *[one] * len(recipe.teachers)], one

    monkeypatch.setattr(sessions, "_models", resolved)
    monkeypatch.setattr("edgedistill.expand_training.cpu_computes_bf16", lambda: bf16)
    for name in packaged():
        session = prepare(copy_recipe(name, tmp_path / name), store=Store(tmp_path / "store"))
        worst = max(session.plan.steps, key=lambda step: step.memory)
        assert worst.memory < 7 << 30, (name, worst.id)
