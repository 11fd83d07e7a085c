"""The forms that rows come in from elsewhere, told by their fields and turned into ours; and back, for other trainers.

    Alpaca            instruction, input, output (system, history)     instruction, blank line, input -> user; output -> reference
    ShareGPT          conversations: [{from, value}] (system, tools)   messages; a last turn of the model's -> reference
    OpenAI            messages that end with the assistant's turn      that turn -> reference
    prompt/completion prompt, completion: texts, or lists of messages  completion -> reference
    question/answer   question, answer                                 answer -> reference

In the style ``tool-trace`` (``traces``) conversations stay whole: there every turn of the assistant's is learnt. A record of two
forms is refused, unless it has a ``reference`` beside our own prompt: then other columns are its owner's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.errors import UsageError

SPEAKERS = {
    **{"human": "user", "user": "user", "system": "system"},
    **{"gpt": "assistant", "assistant": "assistant", "function_call": "assistant"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}
ALPACA = ("instruction", "input", "output")
JSON_FIELDS = ("messages", "tools", "reasoning_gym")
"""Fields of ours that tables hold as JSON in a string; those of other forms are decoded with them."""
FORM_FIELDS = ("messages", "prompt", "completion", "question", "answer", *ALPACA, "conversations", "history")
OURS = ("messages", "prompt")


def plain(record: dict[str, Any], where: str, *, traces: bool = False) -> dict[str, Any]:
    """Return a record in our own form: messages or prompt, and reference. ``where`` (file:line) starts every message.

    Raises UsageError for a record that is of two forms, or of one that it does not keep to.
    """
    if None in record.values():  # says as much as nothing, and is all that a table can say of it
        record = {name: value for name, value in record.items() if value is not None}
    listed = type(record.get("messages")) is list
    if "reference" in record and (listed or "prompt" in record) and record.keys().isdisjoint(JSON_FIELDS[1:]):
        return record  # as most rows are: nothing to tell
    for name in JSON_FIELDS:
        if isinstance(record.get(name), str):
            record = {**record, name: _decoded(record[name], name, where)}
    own = next((name for name in OURS if name in record), None)
    if not (own and "reference" in record):
        forms = {form: made for form, made in MAKERS.items() if form(record)}
        if len(forms) > 1 or (forms and own and not _completes(record)):
            raise UsageError(
                f"{where}: two forms in one row: {_told(record)}",
                'Take the fields of one of them out, or say what is meant: prompts.template = "{…}"',
            )
        for made in forms.values():
            record = made(record, where)
    messages = record.get("messages")
    if not traces and isinstance(messages, list) and "reference" not in record and len(messages) > 1:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") == "assistant" and not last.get("tool_calls"):
            text = last.get("content")
            if isinstance(text, str) and text.strip() and set(last) <= {"role", "content", "name", "tool_calls"}:
                return {**record, "messages": messages[:-1], "reference": text}
    return record


def _decoded(text: str, name: str, where: str) -> Any:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{where}: {name} is a text that is no JSON", f"Write the {name} as JSON, or leave the field out."
        ) from None


def _told(record: Mapping[str, Any]) -> str:
    names = [name for name in FORM_FIELDS if name in record]
    return ", ".join(names[:-1]) + " and " + names[-1]


# ── told by their fields ──


def _completes(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is a prompt and its completion, and of no other form."""
    return "completion" in record and "prompt" in record and "messages" not in record


def _is_alpaca(record: Mapping[str, Any]) -> bool:
    return "instruction" in record and ("output" in record or "input" in record)


def _is_sharegpt(record: Mapping[str, Any]) -> bool:
    return "conversations" in record


def _is_question(record: Mapping[str, Any]) -> bool:
    return "question" in record and ("answer" in record or "reference" in record)


# ── turned into ours ──


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name, "")
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} must be a string", f'Write "{name}": "…".')
    return value


def _list(value: Any, name: str, where: str) -> Any:
    return _decoded(value, name, where) if isinstance(value, str) else value


def _rest(record: Mapping[str, Any], where: str, reference: str | None, *used: str) -> dict[str, Any]:
    """Return the other fields of a record, and what the form says of its reference."""
    rest = {name: value for name, value in record.items() if name not in used}
    if reference is not None and "reference" in rest:
        raise UsageError(f"{where}: has a reference, and {used[-1]} says what it is, too", "Keep one of them.")
    return rest if reference is None else {**rest, "reference": reference}


def _of_alpaca(record: dict[str, Any], where: str) -> dict[str, Any]:
    asked = [text for name in ALPACA[:2] if (text := _text(record, name, where)).strip()]
    if not asked or not _text(record, "instruction", where).strip():
        raise UsageError(f"{where}: instruction is empty", 'Write "instruction": "…".')
    messages = [{"role": "system", "content": record["system"]}] if _text(record, "system", where).strip() else []
    for turn in _list(record.get("history") or [], "history", where):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UsageError(f"{where}: history must be a list of pairs", 'Write [["question", "answer"], …].')
        messages += [{"role": role, "content": one} for role, one in zip(("user", "assistant"), turn, strict=True)]
    messages.append({"role": "user", "content": "\n\n".join(asked)})
    output = _text(record, "output", where) or None
    used = ("instruction", "input", "system", "history", "output")
    return {**_rest(record, where, output, *used), "messages": messages}


def _of_sharegpt(record: dict[str, Any], where: str) -> dict[str, Any]:
    turns = _list(record["conversations"], "conversations", where)
    if not isinstance(turns, list) or not turns:
        raise UsageError(
            f"{where}: conversations must be a list of turns", 'Write [{"from": "human", "value": "…"}, …].'
        )
    messages = [_turn(turn, f"{where}: conversations[{at}]") for at, turn in enumerate(turns)]
    if (told := _text(record, "system", where)).strip():
        if messages[0]["role"] == "system":
            raise UsageError(f"{where}: has a system column, and a first turn from 'system'", "Keep one of them.")
        messages.insert(0, {"role": "system", "content": told})
    return {**_rest(record, where, None, "system", "conversations"), "messages": messages}


def _turn(turn: Any, at: str) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn:  # messages of OpenAI's under ShareGPT's name
        return turn
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise UsageError(f"{at}: not a turn", 'Write {"from": "human", "value": "…"}.')
    speaker, said = turn.get("from"), turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UsageError(f"{at}: wrong speaker {speaker!r}", "A turn is from one of " + ", ".join(SPEAKERS) + ".")
    if speaker == "function_call" and (calls := _calls(said)):
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": SPEAKERS[speaker], "content": said}


def _calls(said: str) -> list[dict[str, Any]]:
    """Return the calls that the text of a turn holds as JSON; none where it is a call in other words."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
        return []
    return [{"type": "function", "function": one} for one in calls]


def _of_completion(record: dict[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # as in TRL: two parts of one conversation
        return {**_rest(record, where, None, "prompt", "completion"), "messages": [*prompt, *completion]}
    if isinstance(prompt, list):
        raise UsageError(f"{where}: prompt is a list, and completion is none", "Write both as texts, or both as lists.")
    completion = _text(record, "completion", where)
    return _rest(record, where, completion or None, "completion")


def _of_question(record: dict[str, Any], where: str) -> dict[str, Any]:
    reference = _text(record, "answer", where) or None
    return {**_rest(record, where, reference, "question", "answer"), "prompt": record["question"]}


MAKERS = {
    _completes: _of_completion,
    _is_alpaca: _of_alpaca,
    _is_sharegpt: _of_sharegpt,
    _is_question: _of_question,
}


# ── and back ──


def as_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ours in Alpaca's form, earlier turns in ``history``. Raises UsageError for what it cannot say."""
    messages = list(row["messages"])
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    *before, last = messages
    roles = [one["role"] for one in before]
    if row.get("tools") or last["role"] != "user" or roles != ["user", "assistant"] * (len(before) // 2):
        raise UsageError(
            f"row {row['id']!r}: Alpaca's form has no tools, and one answer to each question",
            "Take another form: --as sharegpt, or --as jsonl",
        )
    pairs = [[asked["content"], told["content"]] for asked, told in zip(before[::2], before[1::2], strict=True)]
    out = {"id": row["id"], "instruction": last["content"], "input": "", "output": row.get("reference") or ""}
    out |= {"system": system} if system is not None else {}
    return out | ({"history": pairs} if pairs else {})


def as_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ours in ShareGPT's form, its tools as JSON. Raises UsageError for what it cannot say."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    turns: list[dict[str, str]] = []
    for message in row["messages"]:
        if calls := message.get("tool_calls"):
            if message.get("content"):
                raise UsageError(
                    f"row {row['id']!r}: ShareGPT's form has no turn with text and calls", "Take another: --as jsonl"
                )
            functions = [call.get("function", call) for call in calls]
            said = functions[0] if len(functions) == 1 else functions
            turns.append({"from": "function_call", "value": json.dumps(said, ensure_ascii=False)})
        else:
            turns.append({"from": speakers[message["role"]], "value": message["content"]})
    if row.get("reference"):
        turns.append({"from": "gpt", "value": row["reference"]})
    out: dict[str, Any] = {"id": row["id"], "conversations": turns}
    return out | ({"tools": json.dumps(row["tools"], ensure_ascii=False)} if row.get("tools") else {})


def exported(found: Sequence[Mapping[str, Any]], form: str) -> list[Mapping[str, Any]]:
    """Return rows of ours in the form named: alpaca, sharegpt, or as they are."""
    write = {"alpaca": as_alpaca, "sharegpt": as_sharegpt}.get(form)
    return [write(one) for one in found] if write else list(found)
