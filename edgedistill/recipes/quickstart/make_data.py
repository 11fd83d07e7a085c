"""Make the data files of the quickstart task, or check that the shipped ones are what this program makes.

`python -m edgedistill.recipes.quickstart.make_data [--check] [--out DIR]`. The task: a spoken-style request becomes
exactly one function call as compact JSON. `train` and `holdout` share wordings and differ in argument values; `ood` has
wordings that train never saw, typos, two-sentence requests and lower case without punctuation, with train's values in
calls that train does not have. `dev` and `dev-ood` are made like them, of other rows: settings are chosen by these two,
and the suites are scored with what was chosen. `general` is ordinary chat, to see what a student forgets. Everything
follows from the seeds below.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgedistill.recipes.files import as_jsonl, write_or_check
from edgedistill.recipes.quickstart.drills import MORE_FRAMES, MORE_WORDINGS, SPELLING
from edgedistill.recipes.quickstart.general import GENERAL
from edgedistill.recipes.quickstart.templates import CONTEXT, OOD, OOD_FRAMES, REMARKS, TRAIN, TRAIN_FRAMES
from edgedistill.recipes.quickstart.values import OPEN_ENDED, SLOTS, Value, clock, level, minutes
from edgedistill.recipes.quickstart.words import Chooser

HERE = Path(__file__).parent
SYSTEM = "Answer with one function call."
SIZES = {"train": 2400, "holdout": 480, "ood": 480, "dev": 240, "dev-ood": 240}
DRILLS = {  # rows of each function in a block of drills.jsonl
    "set_alarm": 4, "create_event": 4, "set_timer": 4, "add_to_list": 3, "get_weather": 2, "call_contact": 2,
    "navigate_to": 2, "play_media": 2, "send_message": 3, "take_note": 2, "set_volume": 3, "toggle_setting": 1,
}  # fmt: skip
DRILL_BLOCKS = 150
LISTS = {"words": 10, "times": 5, "numbers": 3}  # rows of each kind in a block of lists.jsonl
LIST_BLOCKS = 100
LIST_SYSTEM = "Answer with a JSON list."
SEEDS = {
    "train": 20_240_117, "holdout": 20_240_229, "ood": 20_240_331, "drills": 20_240_430, "lists": 20_241_124,
    "dev": 20_261_125, "dev-ood": 20_261_126,
}  # fmt: skip
Segment = tuple[str, bool]  # words, and whether they are an argument's
Frame = tuple[str, str, bool]  # words before, words after, whether the whole becomes a question
Row = dict[str, Any]

_SLOT = re.compile(r"\{(\w+)\}")
_NEIGHBOURS = dict(zip("aeiotnsrlmdu", "sroprmatknfy", strict=True))  # keys that lie side by side


@cache
def functions() -> list[dict[str, Any]]:
    """Read functions.json: name, description and JSON Schema of each function's arguments, in canonical order."""
    return json.loads((HERE / "functions.json").read_text(encoding="utf-8"))


def canonical_call(name: str, arguments: dict[str, Value]) -> str:
    """Write a call in the one form that the task accepts: arguments in the order of functions.json, no spaces.

    Raises KeyError for a function or an argument that functions.json does not have.
    """
    properties = next((f["parameters"]["properties"] for f in functions() if f["name"] == name), None)
    if properties is None:
        raise KeyError(name)
    if unknown := set(arguments) - set(properties):
        raise KeyError(f"{name}: {sorted(unknown)}")
    ordered = {key: arguments[key] for key in properties if key in arguments}
    return json.dumps({"name": name, "arguments": ordered}, separators=(",", ":"), ensure_ascii=False)


def fill(c: Chooser, wording: str, half: str) -> tuple[list[Segment], dict[str, Value]]:
    """Fill the slots of a wording with values of one half; return the segments and the arguments."""
    segments: list[Segment] = []
    arguments: dict[str, Value] = {}
    end = 0
    for match in _SLOT.finditer(wording):
        if match.start() > end:
            segments.append((wording[end : match.start()], False))
        argument, make = SLOTS[match[1]]
        surface, arguments[argument] = make(c, half)
        segments.append((surface, True))
        end = match.end()
    if end < len(wording):
        segments.append((wording[end:], False))
    return segments, arguments


def ends_open(wording: str) -> bool:
    """Say whether a wording ends in free text, which would swallow whatever follows."""
    return wording.endswith(tuple(f"{{{slot}}}" for slot in OPEN_ENDED))


def frame(c: Chooser, wording: str, segments: list[Segment], frames: Sequence[Frame]) -> tuple[list[Segment], bool]:
    """Put polite words around an imperative; return the segments and whether they ask a question."""
    if wording.startswith("="):
        return segments, wording.endswith("?")
    while True:
        before, after, question = c.pick(frames)
        twice = after == " for me" and re.search(r"\b(for|me|my)\b", wording)
        if not (after and ends_open(wording)) and not twice:
            break
    return [(before, False), *segments, (after, False)], question


def capitalised(segments: list[Segment], arguments: dict[str, Value]) -> list[Segment]:
    """Start with a capital, unless an argument that is copied as written stands first."""
    out = [s for s in segments if s[0]]
    text, is_value = out[0]
    return out if text in arguments.values() else [(text[:1].upper() + text[1:], is_value), *out[1:]]


def bare(segments: list[Segment]) -> list[Segment]:
    """Write as a hurried thumb does: lower case, no punctuation; arguments stay as they are."""
    return [(t if is_value else re.sub(r"[,.:?]", "", t).lower(), is_value) for t, is_value in segments]


def typed_badly(c: Chooser, segments: list[Segment]) -> list[Segment]:
    """Put one or two typos into words of four letters or more that belong to no argument, never into a first letter."""
    places = [
        (i, m.start(), m.end())
        for i, (t, is_value) in enumerate(segments)
        if not is_value
        for m in re.finditer(r"[a-z]{4,}", t)
    ]
    out = list(segments)
    for i, start, end in sorted(c.shuffled(places)[: 1 + c.below(2)], reverse=True):
        text = out[i][0]
        out[i] = (text[:start] + _typo(c, text[start:end]) + text[end:], False)
    return out


def _typo(c: Chooser, word: str) -> str:
    at = 1 + c.below(len(word) - 2)
    kind = c.below(4)
    if kind == 0 and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2 and word[at] in _NEIGHBOURS:
        return word[:at] + _NEIGHBOURS[word[at]] + word[at + 1 :]
    return word[: at + 1] + word[at] + word[at + 1 :]


def text_of(segments: Sequence[Segment]) -> str:
    return "".join(t for t, _ in segments)


def in_domain(
    c: Chooser, wording: str, half: str, frames: Sequence[Frame] = TRAIN_FRAMES
) -> tuple[str, dict[str, Value], list[str]]:
    """Make one request of train, holdout or drills."""
    segments, arguments = fill(c, wording.removeprefix("="), half)
    segments, question = frame(c, wording, segments, frames)
    style = c.below(10)
    if style < 3:
        return text_of(bare(segments)), arguments, []
    text = text_of(capitalised(segments, arguments))
    if question:
        return (text if text.endswith("?") else text + "?"), arguments, []
    return text + ("." if style < 8 and not text.endswith("?") else ""), arguments, []


def out_of_domain(c: Chooser, function: str, wording: str, kind: str) -> tuple[str, dict[str, Value], list[str]]:
    """Make one ood request of the given kind: plain, bare, typo, bare_typo, two, two_typo."""
    segments, arguments = fill(c, wording.removeprefix("="), "train")
    segments, question = frame(c, wording, segments, OOD_FRAMES)
    segments = [s for s in segments if s[0]]
    if "typo" in kind:
        clean = segments
        segments = typed_badly(c, segments)
        if segments == clean:  # every long word belongs to an argument
            kind = kind.removesuffix("typo").rstrip("_") or "plain"
    if kind.startswith("bare"):
        return text_of(bare(segments)), arguments, ["bare", *(["typo"] if "typo" in kind else [])]
    text = text_of(capitalised(segments, arguments))
    text = text if text.endswith("?") else text + ("?" if question else ".")
    if kind.startswith("two"):
        if ends_open(wording) or c.chance(0.6):
            text = f"{c.pick(CONTEXT[function])} {text}"
        else:
            text = f"{text} {c.pick(REMARKS)}"
    tags = ["two_sentences"] if kind.startswith("two") else []
    return text, arguments, [*tags, *(["typo"] if "typo" in kind else [])]


OOD_KINDS = ("plain", "bare", "typo", "bare_typo", "two", "two", "two_typo", "plain", "bare", "typo")


def balanced(name: str, wordings: Sequence[str]) -> list[str]:
    """Repeat wordings until those with an optional argument (a label, a volume's stream...) are about as many as those
    without: where few have one, a model learns to leave it out.
    """
    required = next(f for f in functions() if f["name"] == name)["parameters"]["required"]
    groups: tuple[list[str], list[str]] = ([], [])
    for wording in wordings:
        groups[any(SLOTS[slot][0] not in required for slot in _SLOT.findall(wording))].append(wording)
    most = max(map(len, groups))
    return [wording for group in groups if group for wording in group * round(most / len(group))]


CLOSED = ("time", "minutes", "level", "stream", "setting", "on")  # arguments of few values


def key_of(prompt: str) -> str:
    """Fold a prompt for the comparison of prompts: letters and digits only, lower case."""
    return " ".join(re.findall(r"[a-z0-9]+", prompt.lower()))


def make_split(split: str, seen: set[str], train_calls: set[str]) -> list[Row]:
    """Make one split, in blocks that hold each function once (``drills``: as DRILLS says), so that any prefix is balanced.

    seen: folded prompts of every split so far, extended here. train_calls: calls that must not come again,
    unless their arguments are closed (settings and volumes, alarms and timers without a label).
    """
    c = Chooser(SEEDS[split], invents=split == "drills")
    foreign = split in ("ood", "dev-ood")
    source = OOD if foreign else TRAIN
    half = "holdout" if split in ("holdout", "dev") else "train"
    names = [f["name"] for f in functions()]
    frames, blocks = TRAIN_FRAMES, SIZES.get(split, 0) // len(names)
    if split == "drills":
        names = [name for name, count in DRILLS.items() for _ in range(count)]
        source = {name: (*TRAIN[name], *MORE_WORDINGS[name]) for name in TRAIN}
        frames, blocks = (*TRAIN_FRAMES, *MORE_FRAMES), DRILL_BLOCKS
    decks: dict[str, list[str]] = {name: [] for name in names}
    rows: list[Row] = []
    for block in range(blocks):
        for name in c.shuffled(names):
            for _ in range(1000):
                if not decks[name]:
                    decks[name] = c.shuffled(balanced(name, source[name]) if split == "drills" else source[name])
                wording = decks[name].pop()
                if foreign:
                    kind = OOD_KINDS[(block + names.index(name)) % len(OOD_KINDS)]
                    prompt, arguments, tags = out_of_domain(c, name, wording, kind)
                else:
                    prompt, arguments, tags = in_domain(c, wording, half, frames)
                call = canonical_call(name, arguments)
                repeated = call in train_calls and any(key not in CLOSED for key in arguments)
                untimed = split == "drills" and name == "create_event" and "time" not in arguments
                if key_of(prompt) in seen or repeated or untimed:
                    continue
                break
            else:
                raise RuntimeError(f"{split}: no new request for {name} in 1000 tries; add wordings or values")
            seen.add(key_of(prompt))
            rows.append(_row(f"{split}-{len(rows):04d}", prompt, call, [name, *tags]))
    return rows


def _row(row_id: str, prompt: str, reference: str, tags: list[str], system: str | None = SYSTEM) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "id": row_id,
        "messages": [*messages, {"role": "user", "content": prompt}],
        "reference": reference,
        "tags": tags,
    }


def make_lists(seen: set[str]) -> list[Row]:
    """Make rows of nothing but what a call is hard in: ten words to spell, or times and numbers to write in digits.

    A tokenizer cuts " renovation" and "renovation" differently, so a model that copies a word to the start of a string
    spells it. A call has one or two such words, a list has ten for the same number of tokens.
    """
    c = Chooser(SEEDS["lists"])
    kinds = [kind for kind, count in LISTS.items() for _ in range(count)]
    deck: list[str] = []

    def word() -> str:
        if not deck:
            deck.extend(c.shuffled(SPELLING))
        return deck.pop()

    rows: list[Row] = []
    while len(rows) < LIST_BLOCKS * len(kinds):
        for kind in c.shuffled(kinds):
            if kind == "words":
                said = [f"{word()} {word()}" if c.chance(0.15) else word() for _ in range(10)]
                items: list[Value] = list(said)
            else:
                makers = (clock,) if kind == "times" else (minutes, minutes, level)
                made = [c.pick(makers)(c, "train") for _ in range(6 if kind == "times" else 8)]
                said, items = [text for text, _ in made], [value for _, value in made]
            prompt = ", ".join(said)
            if key_of(prompt) in seen:
                continue
            seen.add(key_of(prompt))
            reference = json.dumps(items, separators=(",", ":"), ensure_ascii=False)
            rows.append(_row(f"lists-{len(rows):04d}", prompt, reference, [kind], LIST_SYSTEM))
    return rows


def make_all() -> dict[str, list[Row]]:
    """Make every split: name -> rows."""
    seen = {key_of(question) for _, question, _ in GENERAL}
    train = make_split("train", seen, set())
    calls = {row["reference"] for row in train}
    holdout, ood = make_split("holdout", seen, calls), make_split("ood", seen, calls)
    # More of what is hard: spoken times, other wordings, and words that can only be copied. Made last, so that the suites
    # above stay what they were, and with no call of the suites in it.
    suites = {row["reference"] for row in [*holdout, *ood]}
    drills, lists = make_split("drills", seen, suites), make_lists(seen)
    calls |= suites | {row["reference"] for row in drills}
    dev = make_split("dev", seen, calls)
    return {
        "train": train,
        "drills": drills,
        "lists": lists,
        "holdout": holdout,
        "ood": ood,
        "dev": dev,
        "dev-ood": make_split("dev-ood", seen, calls | {row["reference"] for row in dev}),
        "general": [
            _row(f"general-{i:04d}", question, answer, [tag], None) for i, (tag, question, answer) in enumerate(GENERAL)
        ],
    }


def grammar() -> str:
    """Write the GBNF grammar that accepts exactly the calls of functions.json in canonical form."""
    rules: list[str] = []
    calls: list[str] = []
    for function in functions():
        rule = function["name"].replace("_", "-")
        calls.append(rule)
        schema = function["parameters"]
        body = ""
        for i, (key, kind) in enumerate(schema["properties"].items()):
            part = f'"{"," if i else ""}\\"{key}\\":" {_value_rule(kind)}'
            body += f" {part}" if key in schema["required"] else f" ({part})?"
        rules.append(f'{rule} ::= "{{\\"name\\":\\"{function["name"]}\\",\\"arguments\\":{{"{body} "}}}}"')
    return "\n".join([f"root ::= {' | '.join(calls)}", *rules, *_GRAMMAR_TERMINALS, ""])


def _value_rule(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return "(" + " | ".join(f'"\\"{v}\\""' for v in kind["enum"]) + ")"
    if kind["type"] == "boolean":
        return "boolean"
    if kind["type"] == "integer":
        return {(1, 999): "to-999", (0, 100): "to-100"}[kind["minimum"], kind["maximum"]]
    return "time" if "pattern" in kind else "string"


_GRAMMAR_TERMINALS = (
    'boolean ::= "true" | "false"',
    "to-999 ::= [1-9] [0-9]? [0-9]?",
    'to-100 ::= "100" | [1-9] [0-9]? | "0"',
    r'time ::= "\"" ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] "\""',
    r'string ::= "\"" char+ "\""',
    r'char ::= [^"\\\x00-\x1F] | "\\" ["\\nrtbf] | "\\u00" [01] [0-9a-f]',
)


def rendered() -> dict[str, bytes]:
    """Render every file that this program makes: path relative to the recipe's folder -> bytes."""
    files = as_jsonl(make_all())
    files["grammar.gbnf"] = grammar().encode()
    hashed = {**files, "functions.json": (HERE / "functions.json").read_bytes()}
    digests = {Path(path).name: hashlib.sha256(content).hexdigest() for path, content in sorted(hashed.items())}
    files["data/DIGESTS.json"] = (json.dumps(digests, indent=2) + "\n").encode()
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them; return 1 where one differs."""
    return write_or_check(rendered, HERE, prog="edgedistill.recipes.quickstart.make_data", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
