"""Recipes that ``edgedistill init`` copies: each a folder with ``recipe.toml`` and its data.

Each data file is in the package once. A recipe that learns from the data of another says so in its ``__init__.py``::

    TAKES = {"quickstart": ("data/train.jsonl", "data/holdout.jsonl")}

and ``init`` copies these files beside its own: what a user gets is complete by itself.
"""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

from edgedistill.errors import UsageError

HERE = Path(__file__).parent


def packaged() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.parent.name for path in HERE.glob("*/recipe.toml"))


def taken(name: str) -> dict[str, Path]:
    """Return what a packaged recipe takes from others: path in its own folder -> the packaged file."""
    takes: dict[str, tuple[str, ...]] = getattr(import_module(f"{__name__}.{name}"), "TAKES", {})
    return {file: HERE / other / file for other, files in takes.items() for file in files}


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a packaged recipe to a new folder and return it; a folder with something in it is never written over."""
    if name not in packaged():
        raise UsageError(f"no packaged recipe {name!r}", f"there is: {', '.join(packaged())}")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: already there", f"build it: edgedistill build {folder}, or name another folder")
    try:
        shutil.copytree(
            HERE / name, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py", "*.txt"), dirs_exist_ok=True
        )
        for file, source in taken(name).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / file)
    except OSError as error:  # of copytree's own kind it has no strerror
        why = error.strerror or "not all files were copied"
        raise UsageError(
            f"{folder}: cannot be written ({why})", f"name another folder: edgedistill init {name} DIR"
        ) from None
    return folder
