"""A reduced quickstart: fewer rows and steps, the same model and the same code path."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgedistill.devices.protocol import Settings
from edgedistill.gc import collect_garbage
from edgedistill.recipes import copy_recipe
from edgedistill.session import prepare
from edgedistill.store import Store
from tests.tuned import TUNE

SIZES = {"drills": 16, "train": 48, "lists": 12, "holdout": 8, "ood": 6, "general": 3}
PROMPTS = 24  # what the teacher is asked
REDUCED = {
    "teacher.min_score": {},
    "adapt.rows": 16,
    "adapt.epochs": 1.0,
    "student.ffn_rows": 24,
    "heal.epochs": 1.0,
    "distill.epochs": 1.0,
    "calibrate.rows": 8,
    "tune": {**TUNE, "skip": 0, "rows": 12},
    "prompts.rows": [16, PROMPTS - 16],
    "generate.batch_size": 8,
    "generate.max_new_tokens": 40,
    "gates.min_retention": {},
    "gates.max_drop": {},
}


def reduce(folder: Path) -> Path:
    """Copy the quickstart and keep the first rows of each file."""
    copy_recipe("quickstart", folder)
    for name, count in SIZES.items():
        path = folder / "data" / f"{name}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:count]))
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Fewer tokens and repetitions for each speed; the same processes and pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgedistill.devices.local.Settings", partial(Settings, pp=64, tg=16, ttft_prompts=2, reps=3))
        yield


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory, seed_models: Callable[[Path], Path]) -> Store:
    """One store for the whole session: what one test built, the next finds."""
    return Store(seed_models(tmp_path_factory.mktemp("store")))


@pytest.fixture(autouse=True)
def _room_for_the_next(request: pytest.FixtureRequest) -> Iterator[None]:
    """Delete what a slow test has added to the shared store: they took 43 GB before half of them had run."""
    if request.node.get_closest_marker("slow") is None or "shared_store" not in request.fixturenames:
        yield
        return
    store: Store = request.getfixturevalue("shared_store")
    before = set(store.all_keys())
    yield
    collect_garbage(store, before)


@pytest.fixture(scope="session")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reduced quickstart."""
    return reduce(tmp_path_factory.mktemp("recipes") / "quickstart")


@pytest.fixture(scope="session")
def session_of(reduced: Path, shared_store: Store) -> Callable[..., Any]:
    """Make sessions of the reduced recipe: ``session_of(targets=[…], **{"distill.lr": 1e-4})``."""

    def make(*, targets: list[str] | None = None, folder: Path | None = None, **overrides: Any) -> Any:
        return prepare(
            folder or reduced,
            targets=targets or (),
            overrides={**REDUCED, **overrides},
            store=Store(shared_store.root),
        )

    return make
