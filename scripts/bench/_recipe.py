"""What the benches that start from the quickstart share: bringing it as far as they need, in the user's store."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import cache_folder, say

from edgedistill.formats.gguf.convert import convert
from edgedistill.recipes import copy_recipe
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Entry, Store
from edgedistill.ui import TerminalReporter

if TYPE_CHECKING:
    from edgedistill.teachers.transformers import TransformersTeacher
    from edgedistill.training.targets import Kind, TargetsHeader


def recipe_folder(name: str, part: str, *, recipe: str = "quickstart") -> Path:
    """Return a copy of a packaged recipe of the bench's own, made anew where the packaged one has changed."""
    folder = cache_folder(name) / part
    with tempfile.TemporaryDirectory(dir=cache_folder(name)) as scratch:
        fresh = copy_recipe(recipe, Path(scratch) / part)
        files = [str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file()]
        if filecmp.cmpfiles(fresh, folder, files, shallow=False)[0] != files:
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    return folder


def few_rows(folder: Path, suites: Sequence[str]) -> dict[str, Any]:
    """Return what makes the quickstart small enough for a --quick run: few rows of everything, 12 in each suite."""
    few = {}
    for name in suites:
        file = folder / "data" / f"quick-{name}.jsonl"
        lines = (folder / "data" / f"{name}.jsonl").read_text().splitlines()[:12]
        file.write_text("\n".join(lines) + "\n")
        few[name] = {"files": [f"data/{file.name}"], "metric": "json-exact", "max_new_tokens": 40}
    return {"teacher.min_score": {}, "adapt.rows": 24, "prompts.rows": 24, "heal.rows": 48, "suites": few}


def build(
    folder: Path, steps: Sequence[str], *, targets: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> Session:
    """Bring a recipe up to some steps; raises the first failure."""
    session = prepare(folder, targets=targets, overrides=dict(overrides or {}), note=say)
    wanted = [step for name in steps for step in session.plan.match(name)]
    outcome = Runner(session.plan.only(wanted), session.store, TerminalReporter()).build()
    for error in outcome.failed.values():
        raise error
    return session


def base_gguf(name: str) -> tuple[Path, Path]:
    """Convert the quickstart's teacher as its package ships it; return the f16 file and the folder of the recipe's rows."""
    session = build(recipe_folder(name, "recipe"), ["base/teacher"])
    file = cache_folder(name) / "base.gguf"
    convert(entry_of(session, "base/teacher").path / "model", file)
    return file, session.path.parent / "data"


def entry_of(session: Session, step: str) -> Entry:
    """Return a built step's entry."""
    entry = Store(session.store.root).load(session.plan.match(step)[0].key)
    assert entry is not None
    return entry


def targets_header(scorer: TransformersTeacher, kind: Kind, n: int) -> TargetsHeader:
    """Return the header of a file of soft targets that a bench draws, at T = 1."""
    from edgedistill.training.draws import stored_temperatures
    from edgedistill.training.targets import TargetsHeader

    return TargetsHeader(
        kind=kind,
        n=n,
        temperature=1.0,
        temperatures=stored_temperatures(1.0),
        vocab_size=scorer.vocab_size,
        tokenizer=scorer.tokenizer_hash,
        teacher="bench",
        seed=0,
    )
