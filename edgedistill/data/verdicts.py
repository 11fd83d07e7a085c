"""What people said of answers that the filters kept: one line a verdict, in a file beside the recipe.

    {"id": "h-001", "shown": "5f2c…", "verdict": "edit", "text": "{…}", "reason": "wrong hour", "by": "mia", "when": "2026-…", …}

The file is the reviewer's: plain, only ever added to, and the last verdict on what was shown counts. ``shown`` is a digest of the
conversation, the tools and the answer: a verdict says nothing of a text that has changed since. No numpy: ``plan`` reads this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Message
from edgedistill.errors import UsageError
from edgedistill.evals.metrics import parse_json
from edgedistill.fingerprint import digest

VERDICTS = ("accept", "reject", "edit")
WRONG = ("reject", "edit")
"""Verdicts that say an answer was wrong, and that change what is taught."""
SIXTEEN = 16  # hexadecimal digits of ``shown``: the row's id stands beside it
DRAWN = ("random", "by-tag")
SHOWN = "shown.jsonl"
"""The file of a filter step that says which answers could have been judged."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Hold one verdict. ``text`` is the answer as edited, ``sample`` how the answer came to be shown (``DRAWN``), ``when`` UTC."""

    id: str
    shown: str
    verdict: str
    text: str = ""
    reason: str = ""
    by: str = ""
    when: str = ""
    sample: str = "random"

    @property
    def key(self) -> str:
        """Return what the verdict is on."""
        return f"{self.id} {self.shown}"

    def to_json(self) -> dict[str, str]:
        """Return the line, without what is empty."""
        return {name: value for name, value in vars(self).items() if value}


def shown_key(row_id: str, messages: Sequence[Message], tools: Sequence[Message], text: str) -> str:
    """Return the key of an answer as it is shown: the row's id, and a digest of conversation, tools and text."""
    shown = {"messages": list(messages), "text": text, **({"tools": list(tools)} if tools else {})}
    return f"{row_id} {digest(shown)[:SIXTEEN]}"


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Return the last verdict on each answer, by `shown_key`. Raises UsageError with file:line for a line that is none."""
    found: dict[str, Verdict] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "edgedistill review RECIPE writes it") from None
    for number, raw in enumerate(lines, 1):
        if raw.strip():
            one = _parsed(raw, f"{path}:{number}")
            found.pop(one.key, None)
            found[one.key] = one
    return found


def _parsed(raw: bytes, where: str) -> Verdict:
    hint = "mend the line or take it out; edgedistill review asks for that verdict again"
    try:
        line = parse_json(raw.decode("utf-8"))[1]
    except UnicodeDecodeError:
        line = None
    if not isinstance(line, dict):
        raise UsageError(f"{where}: no JSON object", hint)
    names = {field.name for field in dataclasses.fields(Verdict)}
    if unknown := [name for name in line if name not in names]:
        raise UsageError(f"{where}: {unknown[0]!r} is no field of a verdict", f"fields: {', '.join(sorted(names))}")
    for name in ("id", "shown", "verdict"):
        if name not in line:
            raise UsageError(f"{where}: {name} is missing", hint)
    if wrong := [name for name, value in line.items() if not isinstance(value, str)]:
        raise UsageError(f"{where}: {wrong[0]} is no text", hint)
    one = Verdict(**line)
    if one.verdict not in VERDICTS:
        raise UsageError(f"{where}: no verdict {one.verdict!r}", f"a verdict is {', '.join(VERDICTS)}")
    if one.verdict == "edit" and not one.text.strip():
        raise UsageError(f"{where}: an edit without its text", hint)
    if one.sample not in DRAWN:
        raise UsageError(f"{where}: no sample {one.sample!r}", f"a sample is {' or '.join(DRAWN)}")
    return one


def add_verdict(path: Path, verdict: Verdict) -> None:
    """Add a line in one write, and wait until the disk has it. A last line that has no end (an editor's) gets one first."""
    line = json.dumps(verdict.to_json(), ensure_ascii=False) + "\n"
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode("utf-8"))
        os.fsync(file.fileno())


def changes(verdicts: Mapping[str, Verdict]) -> str:
    """Return the digest of what the verdicts change: of answers that are rejected, and why, and of edited ones. Who said so and
    what was accepted change nothing that is taught.
    """
    return digest({key: [one.verdict, one.text, one.reason] for key, one in verdicts.items() if one.verdict in WRONG})


# ── the sample ──────────────────────────────────────────────────────────────────────────────────────────────────────


def sample(keys: Mapping[str, str], count: int, seed: int, *, by_tag: bool = False) -> list[str]:
    """Return ``count`` of the keys (key -> tag) in a random order that depends on the seed and each key alone, so that a larger
    sample begins with a smaller one, also when rows were added elsewhere. ``by_tag``: each tag in turn.
    """
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest())
    if by_tag:
        turns: dict[str, int] = {}
        turn: dict[str, int] = {}
        for key in order:
            turn[key] = turns.get(keys[key], 0)
            turns[keys[key]] = turn[key] + 1
        order.sort(key=turn.__getitem__)
    return order[:count]


# ── what it says of the others ──────────────────────────────────────────────────────────────────────────────────────


def remaining(answers: Iterable[tuple[str, str, bool]], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """Estimate how many answers that nobody has judged are wrong, from those that were.

    ``answers``: (key, tag, whether it is taught as it stands) of each that could have been shown, once. Returns counts (judged,
    accepted, rejected, edited, rest: taught and not judged) and ``wrong``, the estimate of the share of the rest as JSON, or None
    where nothing was judged or nothing is left. Its interval is exact for answers drawn without replacement. Where some were
    drawn by tag, tags weigh by what is left of them, and the interval is that of a random sample as large as theirs is worth
    (Kish 1965; Korn and Graubard 1998): near, not exact. ``unseen_tags``: rows of tags that nobody looked at; no estimate holds
    for them.
    """
    from edgedistill.evals.statistics import wrong_of_rest

    judged: dict[str, list[bool]] = {}
    left: dict[str, int] = {}
    counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
    drawn = "random"
    for key, tag, taught in answers:
        if (one := verdicts.get(key)) is not None:
            counts[one.verdict] += 1
            judged.setdefault(tag, []).append(one.verdict in WRONG)
            drawn = one.sample if one.sample != "random" else drawn
        elif taught:
            left[tag] = left.get(tag, 0) + 1
    n, rest = sum(counts.values()), sum(left.values())
    wrong, blind = float(counts["reject"] + counts["edit"]), 0
    size = float(n)
    if drawn != "random" and n:
        blind = sum(rows for tag, rows in left.items() if tag not in judged)
        seen = {tag: rows for tag, rows in left.items() if tag in judged}
        whole = sum(seen.values())
        if whole:
            share = sum(rows / whole * sum(judged[tag]) / len(judged[tag]) for tag, rows in seen.items())
            size = min(size, 1 / sum((rows / whole) ** 2 / len(judged[tag]) for tag, rows in seen.items()))
            wrong = share * size
    estimate = wrong_of_rest(wrong, size, rest - blind) if n and rest - blind else None
    return {
        "judged": n,
        "accepted": counts["accept"],
        "rejected": counts["reject"],
        "edited": counts["edit"],
        "rest": rest,
        "unseen_tags": blind,
        "sample": drawn,
        "wrong": estimate and estimate.to_json(),
    }


def shown_in(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield which answers could have been judged, as an entry of the filter step has them, for `remaining`."""
    with (folder / SHOWN).open(encoding="utf-8") as file:
        for one in map(json.loads, file):
            yield one["key"], one["tag"], one["taught"]


def told(found: Mapping[str, Any]) -> str:
    """Say in one line what `remaining` found."""
    bad, n, rest = found["rejected"] + found["edited"], found["judged"], found["rest"]
    head, wrong = f"{bad} wrong of {n} judged", found["wrong"]
    if wrong is None:
        return head if n and rest else f"{head}, {rest:,} others are kept"
    how = f"{100 * wrong['level']:g} %" + (", weighed by tag" if found["sample"] != "random" else "")
    others = f"{rest - found['unseen_tags']:,} others"
    blind = f"; nothing is known of {found['unseen_tags']:,} more, of other tags" if found["unseen_tags"] else ""
    if not bad:
        return f"{head}: at most {100 * wrong['high']:.1f} % of {others} are wrong ({how}){blind}"
    low, high = (f"{100 * wrong[name]:.1f}" for name in ("low", "high"))
    return f"{head}: of {others} {100 * wrong['value']:.1f} % are wrong, [{low}, {high}] ({how}){blind}"
