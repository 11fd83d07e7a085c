"""Rows: prompts with or without a reference, read from files that people write and edit, or have from elsewhere.

One line is one row::

    {"id": "h-001", "messages": [{"role": "user", "content": "wake me at seven"}], "reference": "{...}", "tags":
    ["alarm"]}

``prompt`` (a string) may stand for ``messages`` (one user message). Everything but the prompt is optional. Other containers and
forms come to the same records (``sources.py``, ``forms.py``, ``columns.py``). What cannot be right is refused with file, line and
remedy, before a model is loaded: a wrong file costs a second here and hours later. This module imports neither torch nor numpy:
the command line reads rows before it plans.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.data.columns import ColumnError, Columns, counted
from edgedistill.data.forms import plain
from edgedistill.data.sources import records
from edgedistill.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")
FIELDS = (
    *("id", "messages", "prompt", "reference", "rationale", "tags", "tools", "split", "seed_id"),
    *("evolution", "reasoning_gym", "tests", "guidance"),
)
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_IN_ROWS, _IN_MESSAGES = frozenset(FIELDS), frozenset(MESSAGE_FIELDS)

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold one prompt. ``messages`` end with the turn to answer; ``reference`` is the wanted answer, word for word, and
    ``rationale`` how one gets there, for the styles that teach it (``data/thinking.py``). ``tools`` are definitions for the
    chat template. ``trace`` names the trace that this is one turn of (``data/traces.py``). ``evolution`` is the round of evolution
    that made the prompt, 0 for a seed: what ``distill.curriculum = "evolution"`` orders by. ``reasoning_gym`` is the problem that
    the row is made of, for its verifier (``evals/reasoning.py``). ``tests`` is Python that is run after the code of an answer: an
    exception, a failed assertion among them, says that the code is wrong (``evals/execution.py``). ``guidance`` is a system message
    that the teacher alone is given: the student learns to answer so without it (context distillation, arXiv:2112.00861).
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
    tests: str | None = None
    guidance: str | None = None

    @property
    def problem(self) -> Mapping[str, Any] | None:
        """Return what metrics judge by beside the reference: the problem of reasoning-gym, and ``tests``."""
        found = {**(self.reasoning_gym or {}), **({} if self.tests is None else {"tests": self.tests})}
        return found or self.reasoning_gym

    def to_json(self) -> dict[str, Any]:
        """Return the row as it stands in a file, without the fields that are empty."""
        out: dict[str, Any] = {"id": self.id, "messages": list(self.messages)}
        names = (
            "reference",
            "rationale",
            "split",
            "seed_id",
            "trace",
            "evolution",
            "reasoning_gym",
            "tests",
            "guidance",
        )
        for name in names:
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


def load_rows(
    path: Path,
    *,
    need_reference: bool = False,
    need_tests: bool = False,
    traces: bool = False,
    columns: Columns | None = None,
) -> list[Row]:
    """Read the rows of a file, in file order: JSONL or another container (``sources.py``), in our form or another (``forms.py``).
    With ``traces`` a row may end with the assistant's turn, its reference. ``columns`` make rows of a table and pick some.

    Blank lines are skipped. A row without ``id`` gets one from its messages, so that it keeps its name when lines move.
    Raises UsageError (file:line and a remedy) for a missing or empty file, malformed JSON, an unusable message, a wrong
    type, a duplicate id, and, with ``need_reference``, for a row without a reference; with ``need_tests`` for one without tests,
    or with tests that are no Python.
    """
    columns = columns or Columns()
    rows, spots = placed_rows(path, traces=traces, columns=columns)
    return picked(rows, spots, path, columns, need_reference=need_reference, need_tests=need_tests)


def placed_rows(
    path: Path, *, traces: bool = False, columns: Columns | None = None
) -> tuple[list[Row], dict[str, str]]:
    """Read all rows of a file; return them, and id -> line. Raises UsageError, as ``load_rows``."""
    path, columns = Path(path), columns or Columns()
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for record, spot in records(path):
        where = f"{path}:{spot}"
        row = parse_row(columns.fill(record, where), where, traces=traces)
        if columns.system is not None and row.messages[0]["role"] != "system":
            row = dataclasses.replace(row, messages=({"role": "system", "content": columns.system}, *row.messages))
        if row.id in seen:
            before = f"on line {seen[row.id]}" if seen[row.id].isdecimal() else f"in {seen[row.id]}"
            raise UsageError(
                f"{where}: id {row.id!r} was used before, {before}",
                "Ids name rows in the store and must be unique in a file: rename one, or remove the repeated row.",
            )
        _refuse_unwritable(row, where)
        seen[row.id] = spot
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: no rows", 'Write one JSON object a line, such as {"id": "a1", "prompt": "Hello"}.')
    return rows, seen


def _refuse_unwritable(row: Row, where: str) -> None:
    texts = [row.id, row.reference, row.rationale, row.split, row.seed_id, row.tests, row.guidance, *row.tags]
    texts += [message.get("content") for message in row.messages]
    nested = [row.tools, [message for message in row.messages if len(message) > 2]]
    text = "".join(filter(None, texts))
    try:
        text += (_STRICT.encode(nested) if any(nested) else "") + _ENCODER.encode(row.reasoning_gym)
    except (TypeError, ValueError) as error:  # NaN; dates in a column of a table
        raise UsageError(
            f"{where}: row {row.id!r} holds what is no JSON: {error}", "Take it out, or write text."
        ) from None
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: row {row.id!r} holds half of a character ({text[error.start]!a}, of a surrogate pair)",
            "Take it out, or write \\ufffd (U+FFFD) for it: JSON may hold it, and no tokenizer reads it.",
        ) from None


def _check_tests(row: Row, where: str) -> None:
    if row.tests is None or not row.tests.strip():
        raise UsageError(
            f"{where}: row {row.id!r} has no tests, and the code of its answers is to be run",
            'Add "tests": "assert add(2, 3) == 5", Python that is run after the answer\'s code, or take the row out.',
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tests, to whoever wrote them
            compile(row.tests, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        at = f", line {error.lineno} of it" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UsageError(
            f"{where}: the tests of row {row.id!r} are no Python: {getattr(error, 'msg', error)}{at}",
            "Mend them: assertions that name what the answer is to define.",
        ) from None


def picked(
    rows: Sequence[Row],
    spots: Mapping[str, str],
    path: Path,
    columns: Columns,
    *,
    need_reference: bool = False,
    need_tests: bool = False,
) -> list[Row]:
    """Return the rows of the split, and with one of the tags, that ``columns`` name; all where it names none. Raises UsageError
    for a row that has no split, where none is left, and, with ``need_reference``, for one of them without a reference; with
    ``need_tests`` for one without tests, or with tests that are no Python.
    """
    split, tags = columns.split, set(columns.tags)
    found: list[Row] = []
    for row in rows:
        if split is not None and row.split is None:
            raise ColumnError(
                f"{path}:{spots[row.id]}: row {row.id!r} has no split, and rows are picked by it",
                f'Write "split": "{split}", or the name of another split, into every row of the file.',
                key="split",
            )
        if split not in (None, row.split) or (tags and tags.isdisjoint(row.tags)):
            continue
        if need_reference and row.reference is None and row.messages[-1]["role"] != "assistant":
            raise UsageError(
                f"{path}:{spots[row.id]}: row {row.id!r} has no reference, and this file is scored against references",
                'Add "reference": the wanted answer as a string, or take the row out.',
            )
        if need_tests:
            _check_tests(row, f"{path}:{spots[row.id]}")
        found.append(row)
    if not found:
        there = {
            "split": counted(row.split or "" for row in rows),
            "tags": counted(tag for row in rows if split in (None, row.split) for tag in row.tags),
        }
        key = "split" if split is not None and all(row.split != split for row in rows) else "tags"
        wanted = f'the split "{split}"' if key == "split" else "one of the tags " + ", ".join(map(repr, columns.tags))
        raise ColumnError(f"{path}: no row has {wanted}", f"There are: {there[key]}.", key=key)
    return found


def parse_row(record: Any, where: str, *, traces: bool = False) -> Row:
    """Check one decoded record and return its Row. ``where`` (file:line) starts every message; ``traces`` as ``load_rows``.
    Raises UsageError.
    """
    if not isinstance(record, dict):
        raise UsageError(
            f"{where}: a row must be a JSON object, not {_kind(record)}", 'Write {"id": "a1", "prompt": "Hello"}.'
        )
    record = plain(record, where, traces=traces)
    for name in record:
        # Columns of one's own are fine; a misspelt one of ours would silently lose what it was to say.
        close = None if name in _IN_ROWS else _meant(name)
        if close and close not in record:
            raise UsageError(f"{where}: unknown field {name!r}", f"Did you mean {close!r}?")
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
    for name in ("rationale", "split", "seed_id", "tests", "guidance"):
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
        tests=record.get("tests"),
        guidance=record.get("guidance"),
    )


@functools.lru_cache(maxsize=256)
def _meant(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)), None)


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
            'Write "prompt": "Hello", or "messages": [{"role": "user", "content": "Hello"}]; columns of your own make a prompt '
            'by a template: prompts.template = "{topic}".',
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
        if not message.keys() <= _IN_MESSAGES:
            unknown = min(message.keys() - _IN_MESSAGES)
            raise UsageError(f"{at}: unknown field {unknown!r}", "A message has: " + ", ".join(MESSAGE_FIELDS) + ".")
        content = message.get("content")
        calls_only = role == "assistant" and message.get("tool_calls") and content is None
        if not isinstance(content, str) and not calls_only:
            raise UsageError(
                f"{at}: content must be a string, not {_kind(content)}", "Only text is supported: no images, no audio."
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UsageError(
                f"{at}: tool_calls must be a list of JSON objects",
                'Write [{"type": "function", "function": {"name": "...", "arguments": {...}}}].',
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
_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


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


def appended(messages: Sequence[Message], text: str) -> list[Message]:
    """Return a conversation with something more at the end of its last message."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n\n{text}"}]


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
