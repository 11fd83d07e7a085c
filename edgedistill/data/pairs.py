"""Preferences: what the filters kept beside what they rejected, as TRL's preference trainers (DPO and its kin) take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RIGHT = ("best", "duplicates", "decontaminate", "pii")
"""Reasons for which answers are rejected that are as right as what was kept; some are not to be handed on at all."""


def preference_pairs(folder: Path) -> list[dict[str, Any]]:
    """Pair the first kept text of each prompt with every rejected answer to it that came to an end.

    ``folder`` is an entry of the filter step. Each pair has id, prompt (messages), chosen and rejected (a message each), TRL's
    conversational form.
    """
    kept: dict[str, dict[str, Any]] = {}
    for line in _lines(folder / "kept.jsonl"):
        # a second text of a row is ID#1, and an id may hold such a sign itself
        first = kept.get(line["id"].rpartition("#")[0])
        further = first is not None and first["messages"] == line["messages"]
        if line.get("task") is None and not further:  # nor the rationale of an answer
            kept[line["id"]] = line
    pairs = []
    for answer in _lines(folder / "rejected.jsonl"):
        chosen = kept.get(answer["id"])
        if chosen is None or answer["finish"] != "stop" or answer["text"] == chosen["text"]:
            continue
        if answer["why"].startswith(RIGHT):
            continue
        pairs.append(
            {
                "id": answer["id"],
                "prompt": chosen["messages"],
                "chosen": [{"role": "assistant", "content": chosen["text"]}],
                "rejected": [{"role": "assistant", "content": answer["text"]}],
                **({"tools": chosen["tools"]} if "tools" in chosen else {}),
            }
        )
    return pairs


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
