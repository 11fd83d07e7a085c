"""import: take a full-precision GGUF that exists into the store.

In: a file. Out: ``model.gguf``, hard-linked. Only ``quantize MODEL.gguf`` uses it: a build makes its own containers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.step import Context, Stage, unkeyed


@dataclass(frozen=True, kw_only=True)
class ImportGguf(Stage):
    """Link one GGUF into the store."""

    name: ClassVar[str] = "import"
    source_digest: str
    path: Path = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Link, or copy from another disk."""
        source = self.path.resolve()  # a link to a link would point nowhere from there
        try:
            os.link(source, ctx.out / "model.gguf")
        except OSError:
            shutil.copyfile(source, ctx.out / "model.gguf")
        return {"size": (ctx.out / "model.gguf").stat().st_size}
