"""Chat templates at plan time: what a model is shown of a conversation, and whether it is shown its tools at all.

No torch: a template is text that lies beside the weights, and jinja2 renders it as transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Message, Row
from edgedistill.errors import RecipeError, UsageError
from edgedistill.models import Resolved

CHECKED = 64
"""Rows of each file whose tools and results are looked for in what the template prints."""
REMEDIES = {
    "tools": "describe the functions in the system message and leave the field out, or take a model whose template knows tools",
    "tool_calls": 'write the calls into "content", or take a model whose template knows calls',
    "results of tools": "write them as messages of the user's, or take a model whose template knows the role",
}


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The chat template of one model; ``for_tools`` is the one that transformers takes where a conversation has tools."""

    source: str
    template: str
    for_tools: str
    bos: str
    eos: str

    def render(self, messages: Sequence[Message], tools: Sequence[Message] = (), generation: bool = True) -> str:
        """Return the text that the model reads; with ``generation`` up to where it starts to write. Raises UsageError."""
        from edgedistill.evals.runners.base import render_chat

        template = self.for_tools if tools else self.template
        return render_chat(template, messages, tools=tools, bos=self.bos, eos=self.eos, generation_prompt=generation)

    def misses(self, row: Row) -> str:
        """Say what of a row the template leaves out: its tools, calls, or their results; "" where it prints all."""
        text = self.render(row.messages, row.tools)
        if row.tools and text == self.render(row.messages):
            return "tools"
        for at, message in enumerate(row.messages):
            other, what = message, ""
            if message["role"] == "tool":
                other, what = {**message, "content": f"{message['content']} xyzzy"}, "results of tools"
            elif message.get("tool_calls"):
                other, what = {"role": "assistant", "content": message.get("content")}, "tool_calls"
            if what and text == self.render([*row.messages[:at], other, *row.messages[at + 1 :]], row.tools):
                return what
        return ""


def own_chat(model: Resolved) -> Chat:
    """Read the chat template that a model comes with, from a folder or a GGUF; where it has none, that is ""."""
    found = _of_gguf(model.path) if model.path.is_file() else _of_folder(model.path)
    return replace(found, source=model.source)


def read_chat(model: Resolved) -> Chat:
    """Return a model's chat template: the recipe's where it gives one, else its own. Raises UsageError where there is none."""
    found, given = own_chat(model), model.template
    if given is not None:
        name = f"{model.source} (chat_template = {given.name!r})"
        return replace(found, source=name, template=given.text, for_tools=given.text, eos=given.end)
    if not found.template:
        raise UsageError(
            f"{model.source} has no chat template",
            'use an instruction-tuned model, or name a template: chat_template = "chatml", "plain", or a Jinja file',
        )
    return found


def _of_gguf(path: Path) -> Chat:
    from edgedistill.formats.gguf.read import read_info

    info = read_info(path)
    bos, eos = info.special_token("bos"), info.special_token("eos")
    return Chat(source="", template=info.chat_template, for_tools=info.chat_template, bos=bos, eos=eos)


def _of_folder(folder: Path) -> Chat:
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = config.get("chat_template") or ""
    if (file := folder / "chat_template.jinja").is_file():  # wins over the configuration, as in transformers
        named = file.read_text(encoding="utf-8")
    if isinstance(named, list):
        named = {one["name"]: one["template"] for one in named}
    plain, for_tools = (
        (named.get("default", ""), named.get("tool_use", named.get("default", "")))
        if isinstance(named, dict)
        else (named, named)
    )
    special = {}
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token") or ""
        special[name] = token.get("content", "") if isinstance(token, dict) else str(token)
    return Chat(source="", template=plain, for_tools=for_tools, **special)


def check_tools(models: Iterable[Resolved], files: Mapping[str, Sequence[Row]], recipe: Path) -> None:
    """Refuse rows whose tools, or the results of whose calls, a model's template does not print: it would be trained to
    call what it is never shown. ``files`` maps keys of the recipe to rows. Raises RecipeError.
    """
    chats: list[Chat] | None = None
    for key, rows in files.items():
        some = [
            row for row in rows if row.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in row.messages)
        ]
        for row in some[:CHECKED]:
            try:
                chats = chats or [
                    read_chat(one) for one in {(one.source, one.template): one for one in models}.values()
                ]
                missed = next(((chat, what) for chat in chats if (what := chat.misses(row))), None)
            except UsageError as error:
                raise RecipeError(f"row {row.id!r}: {error.message}", error.hint, key=key, file=recipe) from None
            if missed is not None:
                raise RecipeError(
                    f"row {row.id!r} has {missed[1]}, and the chat template of {missed[0].source} does not print them",
                    REMEDIES[missed[1]],
                    key=key,
                    file=recipe,
                )
