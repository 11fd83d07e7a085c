"""Recipes that ``edgedistill init`` copies: each a folder with ``recipe.toml`` and its data."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgedistill.errors import UsageError

HERE = Path(__file__).parent


def packaged() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(path.parent.name for path in HERE.glob("*/recipe.toml"))


def copy_recipe(name: str, folder: Path) -> Path:
    """Copy a packaged recipe to a new folder and return it; a folder with something in it is never written over."""
    if name not in packaged():
        raise UsageError(f"no packaged recipe {name!r}", f"there is: {', '.join(packaged())}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: already there", f"build it: edgedistill build {folder}, or name another folder")
    shutil.copytree(
        HERE / name, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py", "*.txt"), dirs_exist_ok=True
    )
    return folder
