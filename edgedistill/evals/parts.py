"""Answer a suite in parts, each kept on disk when it is there: an evaluation that was killed goes on with the part that it was at.

Where one part ends depends on the number of rows and the length of answers alone, so that what was cut off ends with the same bytes
(a batch of other rows may change the last bit of a logit)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgedistill.data.prompts import Row
from edgedistill.evals.runners.base import Answer, Progress, Runner
from edgedistill.store import write_atomic

TOKENS = 65_536  # of answers in one part, so that a kill costs minutes and not hours
MOST = 512  # rows; smaller parts would leave engines idle at the end of each, while the last answers are written


def answer_in_parts(
    runner: Runner,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    grammar: str | None = None,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answer every row greedily, in their order. Parts are files ``kept``.<number>.jsonl; what is there is not answered again, and
    must be of the same model, rows and settings.
    """
    found: list[Answer] = []
    for number, part in enumerate(cut(rows, max_new_tokens)):
        path = kept.with_name(f"{kept.name}.{number:04d}.jsonl") if kept is not None else None
        answers = _read(path, part) if path is not None else None
        if answers is not None:
            runner.remember(part, answers, max_new_tokens=max_new_tokens, grammar=grammar)
        else:
            answers = runner.answer(
                part, max_new_tokens=max_new_tokens, grammar=grammar, progress=_behind(progress, len(found), len(rows))
            )
            if path is not None:
                write_atomic(path, "".join(json.dumps(vars(one)) + "\n" for one in answers))
        found += answers
    return found


def cut(rows: Sequence[Row], max_new_tokens: int) -> list[Sequence[Row]]:
    """Cut rows into parts of about the same size."""
    most = max(1, min(MOST, TOKENS // max(1, max_new_tokens)))
    count = -(-len(rows) // most)
    return [rows[len(rows) * at // count : len(rows) * (at + 1) // count] for at in range(count)]


def _behind(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a progress that counts the rows of earlier parts, too."""
    if progress is None:
        return None
    return lambda done, _, note: progress(before + done, total, note)


def _read(path: Path, rows: Sequence[Row]) -> list[Answer] | None:
    """Return the answers of a part, None where they are not there or not of these rows."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found = [Answer(**{**line, "token_ids": tuple(line["token_ids"])}) for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if [one.id for one in found] == [row.id for row in rows] else None
