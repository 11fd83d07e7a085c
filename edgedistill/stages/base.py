"""base: bring a source model into the store as a full-precision HF folder.

In: a resolved source. Out: ``model/`` (config, tokenizer, safetensors). A GGUF is dequantized, and its tokenizer
rebuilt and compared with llama.cpp's; a folder is hard-linked. The key holds the digest of the source, not where it
lies. A chat template that the recipe gives takes the place of the model's own, and the token that ends its answers that of
its EOS."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgedistill.chat_template import write_template
from edgedistill.model_facts import model_files
from edgedistill.step import Context, Stage, later, unkeyed


@dataclass(frozen=True, kw_only=True)
class Served(Stage):
    """Name a teacher that stands behind a server: its answers are kept as those of ``identity``, wherever the server is."""

    name: ClassVar[str] = "served"
    identity: Mapping[str, Any]

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Write down who it is."""
        (ctx.out / "served.json").write_text(json.dumps(self.identity, indent=1, sort_keys=True) + "\n")
        return {}


@dataclass(frozen=True, kw_only=True)
class Base(Stage):
    """Make one full-precision checkpoint of one source model."""

    name: ClassVar[str] = "base"
    source_digest: str
    dtype: str
    tool: str  # the gguf version that dequantizes; "" for a folder
    path: Path = unkeyed()
    chat_template: str | None = later(None)  # its text
    end_of_turn: str | None = later(None)  # the token that ends an answer under it

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Dequantize or link, and write the chat template."""
        facts = self.bring(ctx, ctx.out / "model")
        if self.chat_template is not None and self.end_of_turn is not None:
            write_template(ctx.out / "model", self.chat_template, self.end_of_turn)
        return facts

    def bring(self, ctx: Context, model: Path) -> Mapping[str, Any]:
        """Dequantize or link."""
        if self.path.is_file():
            from edgedistill.formats.gguf.dequantize import gguf_to_hf

            ctx.progress(0, 1, f"dequantizing {self.path.name}")
            return {"dequantized": gguf_to_hf(self.path, model, dtype=self.dtype)}
        model.mkdir()
        for file in model_files(self.path):
            _link(file.resolve(), model / file.name)
        return {"linked": True}


@dataclass(frozen=True, kw_only=True)
class Gguf(Stage):
    """Take a GGUF file as it is: a teacher that llama.cpp runs."""

    name: ClassVar[str] = "gguf"
    source_digest: str
    path: Path = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Link."""
        _link(self.path.resolve(), ctx.out / "model.gguf")
        return {"linked": True}


def _link(source: Path, goal: Path) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another disk
        shutil.copyfile(source, goal)
