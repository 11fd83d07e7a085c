"""The text that calibration runs: kept conversations with the model's own template, each with its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgedistill.data.prompts import Row

if TYPE_CHECKING:
    from edgedistill.evals.runners.gguf import GgufRunner


def encode_kept(runner: GgufRunner, lines: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[int]]:
    """Return the token ids of each line of ``kept.jsonl``, and how many of them are the prompt's."""
    prompts = [
        runner.encode(Row(id=line["id"], messages=tuple(line["messages"]), tools=tuple(line.get("tools", ()))))
        for line in lines
    ]
    texts = [
        [*prompt, *runner.encode_text(line["text"]), runner.end_token()]
        for prompt, line in zip(prompts, lines, strict=True)
    ]
    return texts, [len(prompt) for prompt in prompts]
