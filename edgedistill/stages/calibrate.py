"""calibrate: measure which inputs of each matrix matter on the task's own text (importance matrix).

In: the converted full-precision GGUF, kept rows, conversations of its own where it wrote some. Out: ``imatrix.gguf`` (llama.cpp's
format), ``tokens.json``, the text that was run. Shared by every target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.step import Context, Stage, later


def _general(ctx: Context, key: Key | None) -> list[list[int]]:
    """Return the token ids of what the model wrote itself."""
    from edgedistill.evals.own_text import FILE, read_conversations

    return read_conversations(ctx.path(key, FILE) if key else None)[0]


@dataclass(frozen=True, kw_only=True)
class Calibrate(Stage):
    """Collect squared activations over the first ``rows`` kept conversations."""

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 2  # 2: tokens.json
    model: Key
    kept: Key
    rows: int
    tool: str
    general: Key | None = later(None)

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Render the conversations with the model's own template and run them."""
        from edgedistill.evals.calibration_text import encode_kept
        from edgedistill.evals.runners.gguf import GgufRunner
        from edgedistill.formats.gguf.imatrix import collect

        gguf = ctx.path(self.model, "model.gguf")
        lines = [json.loads(line) for line in json_lines(ctx.path(self.kept, "kept.jsonl"))[: self.rows]]
        with GgufRunner(gguf, threads=ctx.threads) as runner:
            token_rows, _ = encode_kept(runner, lines)
        token_rows += _general(ctx, self.general)
        (ctx.out / "tokens.json").write_text(json.dumps(token_rows))
        report = collect(gguf, token_rows, ctx.out / "imatrix.gguf", threads=ctx.threads, progress=ctx.progress)
        return {"imatrix": report.to_json()}


@dataclass(frozen=True, kw_only=True)
class CalibrateText(Stage):
    """Collect squared activations over plain text: ``quantize MODEL --calibration FILE``."""

    name: ClassVar[str] = "calibrate-text"
    version: ClassVar[int] = 3  # 2: tokens.json; 3: pieces begin as the model's text does
    model: Key
    text: tuple[str, ...]
    tool: str
    general: Key | None = later(None)

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Tokenize each piece by itself and run it."""
        from edgedistill.evals.runners.gguf import GgufRunner
        from edgedistill.formats.gguf.imatrix import collect
        from edgedistill.formats.gguf.read import first_token

        gguf = ctx.path(self.model, "model.gguf")
        bos = first_token(gguf)  # without it a model that was taught with it is another one
        with GgufRunner(gguf, threads=ctx.threads) as runner:
            token_rows = [[*bos, *runner.encode_text(piece)][:512] for piece in self.text]
        token_rows += _general(ctx, self.general)
        (ctx.out / "tokens.json").write_text(json.dumps(token_rows))
        report = collect(gguf, token_rows, ctx.out / "imatrix.gguf", threads=ctx.threads, progress=ctx.progress)
        return {"imatrix": report.to_json()}
