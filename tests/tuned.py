"""The section of a recipe that tunes the quickstart's phone: no part of the packaged recipe."""

from __future__ import annotations

from typing import Any

TUNE: dict[str, Any] = {
    "targets": ["phone-midrange"],
    "files": ["data/train.jsonl", "data/drills.jsonl"],
    "skip": [1200, 1700],  # rows that nothing else is taught
    "rows": [250, 450],
}
