"""Rows: prompts with or without a reference, read from JSONL files that people write and edit.

One line is one row::

    {"id": "h-001", "messages": [{"role": "user", "content": "wake me at seven"}], "reference": "{...}", "tags":
    ["alarm"]}

``prompt`` (a string) may stand for ``messages`` (one user message). Everything but the prompt is optional. What cannot
be right is refused with file, line and remedy, before a model is loaded: a wrong file costs a second here and hours
later. This module imports neither torch nor numpy: the command line reads rows before it plans.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")
FIELDS = (
    *("id", "messages", "prompt", "reference", "rationale", "tags", "tools", "split", "seed_id"),
    *("evolution", "reasoning_gym", "guidance"),
)
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold one prompt. ``messages`` end with the turn to answer; ``reference`` is the wanted answer, word for word, and
    ``rationale`` how one gets there, for the styles that teach it (``data/thinking.py``). ``tools`` are definitions for the
    chat template. ``trace`` names the trace that this is one turn of (``data/traces.py``). ``evolution`` is the round of evolution
    that made the prompt, 0 for a seed: what ``distill.curriculum = "evolution"`` orders by. ``reasoning_gym`` is the problem that
    the row is made of, for its verifier (``evals/reasoning.py``). ``guidance`` is a system message that the teacher alone is given:
    the student learns to answer so without it (context distillation, arXiv:2112.00861).
    """

    id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    tags: tuple[str, ...] = ()
    tools: tuple[Message, ...] = ()
    split: str | None = None
    seed_id: str | None = None
    rationale: str | None = None
    trace: str | None = None
    evolution: int | None = None
    reasoning_gym: dict[str, Any] | None = None
    guidance: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in a file, without the fields that are empty."""
        out: dict[str, Any] = {"id": self.id, "messages": list(self.messages)}
        for name in ("reference", "rationale", "split", "seed_id", "trace", "evolution", "reasoning_gym", "guidance"):
            if (value := getattr(self, name)) is not None:
                out[name] = value
        for name in ("tags", "tools"):
            if value := getattr(self, name):
                out[name] = list(value)
        return out

    @cached_property
    def line(self) -> bytes:
        """Return what digests are made of; kept, because a plan makes several of the same rows."""
        # Tools were once read and not shown to the model: what was built of such rows is not what would be built now.
        return _canonical(self.to_json()) + (b" shown\n" if self.tools else b"\n")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Name one prompt that stands in two files (or twice in one suite and the training rows)."""

    prompt: str
    first: tuple[str, str]  # (file or suite, row id)
    second: tuple[str, str]


def load_rows(path: Path, *, need_reference: bool = False, traces: bool = False) -> list[Row]:
    """Read the rows of a JSONL file, in file order. With ``traces`` a row may end with the assistant's turn, its reference.

    Blank lines are skipped. A row without ``id`` gets one from its messages, so that it keeps its name when lines move.
    Raises UsageError (file:line and a remedy) for a missing or empty file, malformed JSON, an unusable message, a wrong
    type, a duplicate id, and, with ``need_reference``, for a row without a reference.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f"{path}: is a folder, not a JSONL file", f"Name a file in it, such as {path / 'prompts.jsonl'}."
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", _nearby(path)) from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", f"Check the file: ls -l {path}") from None
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        row = parse_row(_decode(raw, where), where, traces=traces)
        if need_reference and row.reference is None and row.messages[-1]["role"] != "assistant":
            raise UsageError(
                f"{where}: row {row.id!r} has no reference, and this file is scored against references",
                'Add "reference": the wanted answer as a string, or take the row out.',
            )
        if row.id in seen:
            raise UsageError(
                f"{where}: id {row.id!r} was used before, on line {seen[row.id]}",
                "Ids name rows in the store and must be unique in a file: rename one, or remove the repeated row.",
            )
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: no rows", 'Write one JSON object a line, such as {"id": "a1", "prompt": "Hello"}.')
    return rows


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either. Paths in a recipe are relative to the recipe."
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".jsonl", ".json"))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {folder / close[0]}?"
    return f"{folder} has: {', '.join(names[:8])}." if names else f"There is no JSONL file in {folder}."


def _decode(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        text = raw.decode("utf-8").strip()
        hint = "Every line must be one complete JSON object, without a comma at its end."
        if text in ("[", "{", "]") or text.startswith("["):
            hint = "This looks like one JSON document over many lines; convert it: jq -c '.[]' FILE > FILE.jsonl"
        raise UsageError(f"{where}: malformed JSON, column {error.colno}: {error.msg}", hint) from None
    except RecursionError:
        raise UsageError(f"{where}: JSON nested too deeply", "Take this row out.") from None


def parse_row(record: Any, where: str, *, traces: bool = False) -> Row:
    """Check one decoded record and return its Row. ``where`` (file:line) starts every message; ``traces`` as ``load_rows``.
    Raises UsageError.
    """
    if not isinstance(record, dict):
        raise UsageError(
            f"{where}: a row must be a JSON object, not {_kind(record)}", 'Write {"id": "a1", "prompt": "Hello"}.'
        )
    for name in record:
        # Columns of one's own are fine; a misspelt one of ours would silently lose what it was to say.
        close = [] if name in FIELDS else difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if close and close[0] not in record:
            raise UsageError(f"{where}: unknown field {name!r}", f"Did you mean {close[0]!r}?")
    messages = _messages(record, where, traces=traces)
    reference = record.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise UsageError(
            f"{where}: reference must be a string, not {_kind(reference)}",
            "Write a JSON answer as a string: what the model should print, character for character.",
        )
    if reference is not None and messages[-1]["role"] == "assistant":
        raise UsageError(
            f"{where}: the last message is from 'assistant', and there is a reference beside it",
            "Keep one: the last turn of a trace is its reference.",
        )
    identity = record.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if identity is None:
        identity = hashlib.sha256(_canonical([list(messages), record.get("tools") or []])).hexdigest()[:16]
    if not isinstance(identity, str) or not identity.strip():
        raise UsageError(f"{where}: id must be a string that is not empty", "Give every row a short unique id.")
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(
            f"{where}: tools must be a list of JSON objects", 'Write "tools": [{"type": "function", ...}].'
        )
    tags = record.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UsageError(f"{where}: tags must be a list of strings", 'Write "tags": ["alarm"].')
    for name in ("rationale", "split", "seed_id", "guidance"):
        if record.get(name) is not None and not isinstance(record[name], str):
            raise UsageError(f"{where}: {name} must be a string, not {_kind(record[name])}", f'Write "{name}": "...".')
    evolution = record.get("evolution")
    if evolution is not None and (not isinstance(evolution, int) or isinstance(evolution, bool) or evolution < 0):
        raise UsageError(
            f"{where}: evolution must be a whole number from 0", 'Write "evolution": 2 for a prompt evolved twice.'
        )
    problem = record.get("reasoning_gym")
    if problem is not None and not isinstance(problem, dict):
        raise UsageError(
            f"{where}: reasoning_gym must be an object, not {_kind(problem)}",
            "Make rows with: edgedistill data make TASK",
        )
    return Row(
        id=identity,
        messages=messages,
        reference=reference,
        tags=tuple(tags),
        tools=tuple(tools),
        split=record.get("split"),
        seed_id=record.get("seed_id"),
        rationale=record.get("rationale"),
        evolution=evolution,
        reasoning_gym=problem,
        guidance=record.get("guidance"),
    )


def _messages(record: Mapping[str, Any], where: str, *, traces: bool) -> tuple[Message, ...]:
    if "prompt" in record and "messages" in record:
        raise UsageError(f"{where}: has both prompt and messages", "Keep one: prompt is short for one user message.")
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"{where}: prompt must be a string that is not empty", 'Write "prompt": "Hello".')
        return ({"role": "user", "content": prompt},)
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(
            f"{where}: no messages",
            'Write "prompt": "Hello", or "messages": [{"role": "user", "content": "Hello"}].',
        )
    for index, message in enumerate(messages):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise UsageError(
                f"{at}: must be an object, not {_kind(message)}", 'Write {"role": "user", "content": "..."}.'
            )
        role = message.get("role")
        if role not in ROLES:
            hint = "A role is one of " + ", ".join(ROLES) + "."
            if isinstance(role, str) and (close := difflib.get_close_matches(role.lower(), ROLES, n=1)):
                hint += f" Did you mean {close[0]!r}?"
            raise UsageError(f"{at}: wrong role {role!r}", hint)
        if unknown := sorted(set(message) - set(MESSAGE_FIELDS)):
            raise UsageError(f"{at}: unknown field {unknown[0]!r}", "A message has: " + ", ".join(MESSAGE_FIELDS) + ".")
        content = message.get("content")
        calls_only = role == "assistant" and message.get("tool_calls") and content is None
        if not isinstance(content, str) and not calls_only:
            raise UsageError(
                f"{at}: content must be a string, not {_kind(content)}", "Only text is supported: no images, no audio."
            )
        if role == "system" and index != 0:
            raise UsageError(
                f"{at}: a system message must come first", "Move it to the start, or make it a user message."
            )
    if messages[-1]["role"] not in (("user", "tool", "assistant") if traces else ("user", "tool")):
        raise UsageError(
            f"{where}: the last message is from {messages[-1]['role']!r}, so there is nothing to answer",
            'End with a user message, and put the wanted answer into "reference" (whole traces: generate.style = "tool-trace").',
        )
    return tuple(messages)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))  # json.dumps makes one a call


def _canonical(value: Any) -> bytes:
    # surrogatepass: JSON may hold a lone surrogate (\ud83d), which plain UTF-8 refuses to encode.
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def guided(messages: Sequence[Message], guidance: str | None) -> list[Message]:
    """Return a conversation as the teacher is asked it: with what it alone is told in the system message, after the row's own."""
    if not guidance:
        return list(messages)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{guidance}"}, *messages[1:]]
    return [{"role": "system", "content": guidance}, *messages]


def rows_digest(rows: Iterable[Row]) -> str:
    """Return the sha256 (hex) of what the rows say, in their order; spacing and key order do not change it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.line)
    return digest.hexdigest()


def prompt_key(row: Row) -> str:
    """Return the conversation without its system message, lower-case, spaces collapsed: equal for "the same prompt"."""
    turns = [[m["role"], _plain(m)] for m in row.messages if m["role"] != "system"]
    return json.dumps(turns, ensure_ascii=False)


def _plain(message: Message) -> str:
    return " ".join(str(message.get("content") or "").casefold().split())


def leaks(train: Sequence[Row], suites: Mapping[str, Sequence[Row]]) -> list[Leak]:
    """Find prompts that stand in two places: in ``train`` and a suite, or in two suites.

    Compared are the turns without the system message, regardless of case and spacing. Repeats inside one file are no
    leak.
    """
    found: list[Leak] = []
    first: dict[str, tuple[str, str]] = {}
    for name, rows in (("train", train), *suites.items()):
        for row in rows:
            key = prompt_key(row)
            known = first.setdefault(key, (name, row.id))
            if known[0] != name:
                found.append(Leak(prompt=_plain(row.messages[-1]), first=known, second=(name, row.id)))
    return found


def with_shots(rows: Sequence[Row], shots: Sequence[Row]) -> list[Row]:
    """Return the rows with the shots' turns and references before their own turns (few-shot prompting).

    The row's system message stays first; those of the shots are left out. Raises UsageError for a shot without
    reference.
    """
    turns: list[Message] = []
    for shot in shots:
        if shot.reference is None:
            raise UsageError(f"few-shot example {shot.id!r} has no reference", "Take examples that have one.")
        turns += [m for m in shot.messages if m["role"] != "system"]
        turns.append({"role": "assistant", "content": shot.reference})
    out = []
    for row in rows:
        head = [m for m in row.messages[:1] if m["role"] == "system"]
        out.append(dataclasses.replace(row, messages=(*head, *turns, *row.messages[len(head) :])))
    return out
