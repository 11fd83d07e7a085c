"""sensitivity: predict what each type would cost in each matrix of a model, on the task's own text.

In: the converted full-precision GGUF, the checkpoint it came from, kept rows or plain text, conversations of the model's own.
Out: ``table.json`` (bytes and predicted KLD by matrix and type), ``imatrix.gguf`` (columns weighed by what their errors cost),
``text.json`` (what was run). Shared by every target.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.jsonl import json_lines
from edgedistill.step import Context, Stage, later


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Stage):
    """Take gradients on the answers of the first ``rows`` kept conversations, or on all of ``text`` where there are none.

    ``checkpoint`` None: the weights of ``model`` itself, brought back into a checkpoint.
    """

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 3  # 2: tokens are drawn by what their gradients add; 3: types are tried on the whole model
    deterministic: ClassVar[bool] = False
    model: Key
    checkpoint: Key | None
    kept: Key | None
    text: tuple[str, ...]
    rows: int
    tool: str
    general: Key | None = later(None)

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Encode, take gradients, quantize every matrix to every type."""
        from edgedistill.evals.calibration_text import encode_kept
        from edgedistill.evals.own_text import FILE, read_conversations
        from edgedistill.evals.runners.gguf import GgufRunner
        from edgedistill.formats.gguf.dequantize import gguf_to_hf
        from edgedistill.formats.gguf.read import first_token, read_info
        from edgedistill.formats.gguf.sensitivity import measure

        gguf = ctx.path(self.model, "model.gguf")
        with GgufRunner(gguf, threads=ctx.threads) as runner:
            if self.kept is not None:
                lines = json_lines(ctx.path(self.kept, "kept.jsonl"))[: self.rows]
                token_rows, starts = encode_kept(runner, [json.loads(line) for line in lines])
            else:
                most = min(512, int(read_info(gguf).of_arch("context_length", 512)))
                bos = first_token(gguf)  # without it a model that was taught with it is another one
                token_rows = [[*bos, *runner.encode_text(piece)][:most] for piece in self.text]
                starts = [1] * len(token_rows)
        more, begun = read_conversations(ctx.path(self.general, FILE) if self.general else None)
        token_rows, starts = [*token_rows, *more], [*starts, *begun]
        if self.checkpoint is not None:
            folder = ctx.path(self.checkpoint, "model")
        else:
            folder = ctx.work / "checkpoint"
            shutil.rmtree(folder, ignore_errors=True)
            gguf_to_hf(gguf, folder)
        report = measure(
            gguf, folder, token_rows, starts, ctx.out, aside=True, threads=ctx.threads, progress=ctx.progress
        )
        return {"sensitivity": report.to_json()}
