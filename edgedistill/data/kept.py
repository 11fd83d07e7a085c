"""What a filter step kept, as rows of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CARRIED = ("tools", "evolution", "source", "task", "trace", "weight")
"""Fields of a kept line that stay beside its row."""


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the kept lines of an entry of the filter step as rows: ``reference`` is the text that is learnt."""
    found = []
    with (folder / "kept.jsonl").open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            row = {"id": line["id"], "messages": line["messages"], "reference": line["text"]}
            found.append(row | {name: line[name] for name in CARRIED if line.get(name) is not None})
    return found
