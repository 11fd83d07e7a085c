"""The text that calibration runs: kept conversations with the model's own template, each with its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.data.prompts import Row
from edgedistill.jsonl import json_lines

if TYPE_CHECKING:
    from edgedistill.evals.runners.gguf import GgufRunner

LONGEST = 512  # tokens of a piece of plain text


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


def encode_for_checkpoint(
    folder: Path, kept: Path | None, rows: int, text: Sequence[str] = ()
) -> tuple[list[list[int]], list[int]]:
    """Return the same of the first ``rows`` lines of the file ``kept`` by a checkpoint's own tokenizer; where there is none, of
    plain ``text``, pieces of ``LONGEST`` tokens at most.
    """
    from transformers import AutoTokenizer

    from edgedistill.training.data import prompt_tokens, turn_end

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if kept is None:
        pieces = [list(tokenizer.encode(piece))[:LONGEST] for piece in text]
        return pieces, [1] * len(pieces)
    lines = [json.loads(line) for line in json_lines(kept)[:rows]]
    prompts = [prompt_tokens(tokenizer, line["messages"], line.get("tools", ())) for line in lines]
    texts = [
        [*prompt, *tokenizer.encode(line["text"], add_special_tokens=False), turn_end(tokenizer)]
        for prompt, line in zip(prompts, lines, strict=True)
    ]
    return texts, [len(prompt) for prompt in prompts]
