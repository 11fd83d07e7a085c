"""Steps of the filter over made-up answers, the same ones on every machine: many kinds of filters, teachers, rounds and verdicts.

Numbers come from `random.Random.random`, which is the same in all versions of Python.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from edgedistill.data.augmenters import REFUSING
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.data.verdicts import Verdict, changes, shown_key
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_thinking import ThinkingFilter

ANSWERS, FAILED, BEFORE, GRADES = (Key(letter * 64) for letter in "abcd")
OTHERS = (("beta", Key("e" * 64)), ("gamma", Key("f" * 64)))
RECOVERED = (("delta", Key("1" * 64)), ("omega", Key("2" * 64)))
WORDS = (
    "the old mill by river where frogs sing at night and seven green apples fall on warm grass in late summer".split()
)
SUITE = tuple(
    Row(id=f"s{n}", messages=({"role": "user", "content": text},), reference="gold")
    for n, text in enumerate(("the frogs sing at night by the old mill", "seven green apples fall on the warm grass"))
)
_One = TypeVar("_One")


class Draw:
    """Draw by numbers that are the same everywhere."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self.random() * count)

    def of(self, values: Sequence[_One]) -> _One:
        return values[self.below(len(values))]

    def likely(self, share: float) -> bool:
        return self.random() < share


def _text(draw: Draw) -> str:
    """Return an answer: short or long, a near copy of others, JSON, a refusal, or one that gives something away."""
    kind = draw.below(8)
    if kind < 3:
        return draw.of(("yes", " yes", "no", '{"a": 1}', '{"a":1}', '{"a": 2}', "gold", "forty-two, 42"))
    if kind == 3:
        return draw.of(
            ("I'm sorry, but I can't help with that.", "write to jane@acme-corp.com", "one\u2028two\u0085three")
        )
    start, length = draw.below(6), 8 + draw.below(10)
    words = [WORDS[(start + at) % len(WORDS)] for at in range(length)]
    return " ".join(word if draw.likely(0.93) else draw.of(WORDS) for word in words)


def _whole(draw: Draw, style: str | None) -> str:
    text = _text(draw)
    if style is None or draw.likely(0.1):
        return text
    thought = "" if draw.likely(0.15) else f"I think of it, and then it is {_text(draw)}"
    return join(style, thought, text)


def _rows(draw: Draw) -> tuple[Row, ...]:
    found = []
    for at in range(2 + draw.below(10)):
        prompt = f"say {draw.of(WORDS)} {draw.below(4)}"
        tools = ({"type": "function", "function": {"name": "say"}},) if draw.likely(0.1) else ()
        found.append(
            Row(
                id=f"r{at}",
                messages=({"role": "user", "content": prompt},),
                reference=None if draw.likely(0.2) else draw.of(("yes", "gold", '{"a": 1}', "no")),
                tags=draw.of(((), ("x",), ("y", "x"), (REFUSING,))),
                tools=tools,
                trace="t" if draw.likely(0.1) else None,
                evolution=draw.below(3) if draw.likely(0.1) else None,
                guidance="be brief" if draw.likely(0.1) else None,
            )
        )
    return tuple(found)


def _specs(draw: Draw, style: str | None, rows: Sequence[Row], said: dict[str, Verdict]) -> tuple[dict[str, Any], ...]:
    """Return up to five filters; one by verdicts stands behind those by grades, as an edited answer has none."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {
            "kind": "reference",
            "metric": "exact",
            "missing": draw.of(("pass", "reject")),
            "corrections": draw.below(3),
        },
        lambda: {"kind": "reference", "metric": "contains"},
        lambda: {"kind": "format", "min_chars": draw.below(6), "max_chars": 60 + draw.below(60)},
        lambda: {"kind": "format", "json_schema": json.dumps({"type": "object"})},
        lambda: {"kind": "refusals"},
        lambda: {"kind": "pii"},
        lambda: {"kind": "best", "keep": 1 + draw.below(2), "by": draw.of(("likelihood", "shortest", "drawn"))},
        lambda: {"kind": "agreement", "metric": "exact", "share": draw.of((0.3, 0.5)), "samples": 3},
        lambda: {"kind": "duplicates", "similarity": draw.of((0.5, 0.8, 1.0))},
        lambda: {"kind": "decontaminate", "words": 5, "suites": {"suite": "digest"}},
        lambda: {"kind": "perplexity", "min": 0.2, "max": 0.9, "grades": GRADES},
        lambda: {"kind": "reward", "keep": 1 + draw.below(2), "grades": (GRADES,)},
    ]
    if style is not None:
        kinds.append(lambda: {"kind": "thinking", "min_words": 3, "max_words": 30, "supports": draw.likely(0.5)})
    found = [draw.of(kinds)() for _ in range(draw.below(5))]
    if draw.likely(0.3):
        found.append({"kind": "review", "file": changes(said)})
        found += [kinds[at]() for at in (4, 8) if draw.likely(0.4)]
    otherwise = draw.of(("drop", "drop", "gold", "hedge"))
    more = {"otherwise": otherwise, **({"hedge": "I do not know."} if otherwise == "hedge" else {})}
    at = draw.below(max(1, len(found)))
    return tuple(
        {"metric": "json-exact", "otherwise": "drop", **one, **(more if number == at else {})}
        for number, one in enumerate(found)
    )


def _answers(draw: Draw, rows: Sequence[Row], style: str | None, by: str, asked: float = 1.0) -> list[dict[str, Any]]:
    found = [
        {"id": row.id, "row": f"{by}-{row.id}-{sample}", "sample": sample, "text": _whole(draw, style)}
        for row in rows
        if draw.likely(asked)
        for sample in range(1 + draw.below(3))
    ]
    for one in found:
        one |= {"finish": draw.of(("stop",) * 8 + ("length", "no call")), "logprob": round(-5 * draw.random(), 4)}
    if draw.likely(0.3):  # of several requests, as they came
        found.sort(key=lambda one: (one["sample"], one["id"]))
    return found


def made(seed: int, folder: Path, rounds: Sequence[Any]) -> tuple[Filter, Any]:
    """Write the entries that a step reads; return the step, and the context of its run. ``rounds``: the steps' classes in rounds
    (one without thinking, one with it).
    """
    draw = Draw(seed)
    style = draw.of((None, None, "think", "rationale", "explanation"))
    rows = _rows(draw)
    files: dict[tuple[Key, str], list[dict[str, Any]]] = {}
    asked = draw.of((1.0, 0.8, 0.0 if draw.likely(0.2) else 1.0))
    files[ANSWERS, "rows.jsonl"] = _answers(draw, rows, style, "alpha", asked)
    in_round = draw.likely(0.25)
    others, recovered = (), ()
    if not in_round:
        others, recovered = OTHERS[: draw.of((0, 0, 1, 2))], RECOVERED[: draw.of((0, 0, 1, 2))]
    for name, key in (*others, *recovered):
        files[key, "rows.jsonl"] = _answers(draw, rows, style, name, 0.4)
    every = [one for lines in files.values() for one in lines]
    said = {}
    for one in every:
        if draw.likely(0.2):
            row = next(row for row in rows if row.id == one["id"])
            key = shown_key(row.id, row.messages, row.tools, one["text"])
            verdict = draw.of(("accept", "reject", "edit"))
            extra = {"text": _text(draw)} if verdict == "edit" else {"reason": draw.of(("", "rude"))}
            kind = draw.of(("random", "random", "by-tag"))
            said[key] = Verdict(id=row.id, shown=key.split(" ")[-1], verdict=verdict, sample=kind, **extra)
    if draw.likely(0.5):
        said["gone 0123456789abcdef"] = Verdict(id="gone", shown="0123456789abcdef", verdict="reject")
    files[GRADES, "grades.jsonl"] = [
        {"row": one["row"], "grade": None if draw.likely(0.1) else round(draw.random(), 3)} for one in every
    ]
    files[FAILED, "rejected.jsonl"] = [
        {**one, "why": draw.of(("reference (exact)", "refusals", "did not end"))} for one in every if draw.likely(0.4)
    ]
    taught = [
        {"id": f"r{at}", "messages": [], "text": _text(draw), "reference": "x", "source": "teacher"}
        for at in range(draw.below(6))
    ]
    files[BEFORE, "kept.jsonl"] = taught
    specs = _specs(draw, style, rows, said)
    fields: dict[str, Any] = {
        "answers": ANSWERS,
        "rows_digest": "",
        "filters": specs,
        "rows": rows,
        "suites": {"suite": SUITE},
        "reviews": {changes(said): said} if any(one["kind"] == "review" for one in specs) else {},
    }
    if style is not None:
        fields["style"] = style
    if in_round:
        before = BEFORE if draw.likely(0.5) else None
        keep, replay = 1 + draw.below(2), draw.of((0.0, 0.3, 1.0))
        stage = rounds[style is not None](
            **fields, by=draw.of(("student", "teacher")), keep=keep, before=before, replay=replay
        )
    else:
        fields |= {"others": others, "recovered": recovered, "more": draw.likely(0.2)}
        fields["failed"] = FAILED if recovered else None
        stage = (Filter if style is None else ThinkingFilter)(**fields)
    out = folder / "out"
    out.mkdir(parents=True)
    for (key, name), lines in files.items():
        (folder / key[:1]).mkdir(exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / key[:1] / name).write_text(text, encoding="utf-8")
    notes: list[str] = []
    ctx: Any = SimpleNamespace(
        progress=lambda *_: None,
        out=out,
        path=lambda key, name: folder / key[:1] / name,
        note=notes.append,
        notes=notes,
    )
    return stage, ctx


def outcome(stage: Filter, ctx: Any) -> dict[str, Any]:
    """Run a step; return its facts, what it noted and the files that it wrote, or why it failed, as plain JSON values."""
    try:
        facts = json.loads(json.dumps(stage.run(ctx), sort_keys=True))
    except StepFailed as error:
        return {"failed": [error.message, error.hint]}
    files = {file.name: file.read_text(encoding="utf-8") for file in sorted(ctx.out.iterdir())}
    return {"facts": facts, "notes": ctx.notes, "files": files}
