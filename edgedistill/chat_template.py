"""Chat templates that a recipe names, for checkpoints that have none or another one: base models, mostly.

A name is that of a built-in template, "teacher" (the one that the teacher is shown), or a Jinja file beside the recipe. Whatever it
is, it has to end an answer with one special token of the model's tokenizer: that becomes the model's EOS, so that every engine ends
there, whatever list of names it goes by. No torch: ``plan`` reads this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.chat import Chat, own_chat, read_chat
from edgedistill.data.prompts import Row
from edgedistill.errors import RecipeError, UsageError
from edgedistill.models import Resolved, Template

TEACHER = "teacher"
MARK = "xyzzy"
ASKED = ({"role": "user", "content": "hi"},)
ANSWERED = (*ASKED, {"role": "assistant", "content": MARK})
CHECKED = 64
"""Rows of each file that a template has to print."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' + (message['content'] or '') + END + '\\n\\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '### Tool:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""Headings that every tokenizer can spell; ``END`` stands for the model's own EOS."""
BUILT_IN = ("chatml", "plain")
CHOICE = 'write "chatml", "plain", "teacher", or a Jinja file beside the recipe'


def plain_template(eos: str, bos: str = "") -> str:
    """Return the template "plain" for a model that ends texts with ``eos`` and, where ``bos`` is not "", begins them with it.

    Both are written out: not every engine tells a template what they are.
    """
    return _literal(bos) + PLAIN.replace("END", json.dumps(eos, ensure_ascii=False))


def _literal(text: str) -> str:
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def named_template(name: str, model: Resolved, teacher: Resolved, *, key: str, recipe: Path) -> Template:
    """Return the template that ``key`` of the recipe names, for ``model``. Raises RecipeError where there is none, or where it
    cannot tell the model's answers where to begin and to end.
    """
    try:
        text = _text(name, model, teacher, recipe.parent)
        chat = replace(own_chat(model), source=name, template=text, for_tools=text)
        return Template(name=name, text=text, end=_end_of_turn(chat, model))
    except UsageError as error:
        message = error.message if name in error.message else f"{name}: {error.message}"
        raise RecipeError(message, error.hint, key=key, file=recipe) from None


def _text(name: str, model: Resolved, teacher: Resolved, folder: Path) -> str:
    own = own_chat(model)
    if name == TEACHER:
        if teacher.server is not None and teacher.server.launch is None:
            raise UsageError(f"the template of {teacher.source} is known to its server alone", CHOICE)
        return read_chat(teacher).template
    if name == "chatml":
        if missing := [token for token in CHATML_TOKENS if token not in special_tokens(model.path)]:
            raise UsageError(
                f"ChatML is written with {' and '.join(CHATML_TOKENS)}, and the tokenizer of {model.source} has no special token "
                f"{missing[0]}",
                'take "plain", whose turns end with the model\'s own EOS',
            )
        return _literal(first_token(model.path)) + CHATML
    if name == "plain":
        if not own.eos:
            raise UsageError(
                f"the tokenizer of {model.source} names no EOS token: nothing could end an answer",
                "set eos_token in its tokenizer_config.json",
            )
        return plain_template(own.eos, first_token(model.path))
    path = folder / name
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")  # as jinja2 does; not every engine
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UsageError(f"{path}: {why}", CHOICE) from None


def _end_of_turn(chat: Chat, model: Resolved) -> str:
    """Return the special token with which a template ends an answer. Raises UsageError for a template that does not say where an
    answer begins, or ends it otherwise.
    """
    asked, whole = chat.render(ASKED, generation=False), chat.render(ANSWERED, generation=False)
    prompt = chat.render(ASKED)
    if MARK not in whole:
        raise UsageError(
            f"{chat.source}: the template does not print what the assistant says", "print message['content']"
        )
    if prompt == asked and not whole.startswith(prompt + MARK):
        raise UsageError(
            f"{chat.source}: the template does not say where an answer begins",
            "end it so: {% if add_generation_prompt %}…{% endif %}, with what stands before an answer",
        )
    rest = whole.rpartition(MARK)[2]
    starts = [token for token in special_tokens(model.path) if rest.lstrip().startswith(token)]
    if not starts:
        raise UsageError(
            f"{chat.source}: the template ends an answer with {rest[:40]!r}, and the tokenizer of {model.source} has no special "
            "token there: generation would not end",
            'end the assistant\'s turns with {{ eos_token }}, or take "plain"',
        )
    end = max(starts, key=len)
    if end != chat.eos and replace(chat, eos=end).render(ANSWERED, generation=False) != whole:
        raise UsageError(
            f"{chat.source}: the template ends answers with {end}, which becomes the model's EOS, and prints eos_token elsewhere",
            "write that token out",
        )
    return end


def special_tokens(path: Path) -> frozenset[str]:
    """Return the tokens that text is never cut through: those added to the tokenizer of a folder, or marked in a GGUF."""
    if path.is_file():
        from edgedistill.formats.gguf.read import read_info
        from edgedistill.formats.gguf.vocabulary import CONTROL, USER_DEFINED

        metadata = read_info(path).metadata
        tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
        return frozenset(token for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED))
    return frozenset(token["content"] for token in _read(path / "tokenizer.json").get("added_tokens", []))


def first_token(path: Path) -> str:
    """Return the special token that the tokenizer puts before every text, "" where there is none: a template has to print it."""
    if path.is_file():
        from edgedistill.formats.gguf.read import read_info

        metadata = read_info(path).metadata
        number = metadata.get("tokenizer.ggml.bos_token_id")
        begins = number is not None and metadata.get("tokenizer.ggml.add_bos_token")
        return str(metadata["tokenizer.ggml.tokens"][number]) if begins else ""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).tokens for special in (False, True))
    return "" if whole[:1] == plain[:1] else str(whole[0])


def check_rows(model: Resolved, files: Mapping[str, Sequence[Row]], *, key: str, recipe: Path) -> list[str]:
    """Refuse a template of the recipe's that fails on its rows, or leaves out what the user or the system says; return what
    deserves a word. ``files`` maps keys of the recipe to rows. Raises RecipeError.
    """
    assert model.template is not None
    chat, own, name = read_chat(model), own_chat(model), model.template.name
    told = []
    if own.template and own.template != chat.template:
        told.append(f'{model.source} has a chat template of its own: {key} = "{name}" replaces it')
    first = first_token(model.path)
    if first and not chat.render(ASKED).startswith(first):
        told.append(
            f"the tokenizer of {model.source} begins texts with {first}, and {name} does not print it: "
            "the model was not trained on texts without it"
        )
    for place, rows in files.items():
        for row in rows[:CHECKED]:
            where = f"row {row.id!r} of {place}"
            try:
                text = chat.render(row.messages, row.tools)
            except UsageError as error:
                raise RecipeError(f"{name}: {where}: {error.message}", error.hint, key=key, file=recipe) from None
            for message in row.messages:
                content = message.get("content")
                if message["role"] in ("system", "user") and isinstance(content, str) and content.strip() not in text:
                    raise RecipeError(
                        f"{name}: {where}: the template leaves out what the {message['role']} says",
                        "print message['content'] of every message",
                        key=key,
                        file=recipe,
                    )
    return told


def write_template(folder: Path, text: str, end: str) -> None:
    """Give the checkpoint in ``folder`` a chat template, and ``end``, the token that ends its answers, for its EOS; what else ended
    a text still does in generation_config.json. Files are written anew: those that are there may be links.
    """
    (folder / "chat_template.json").unlink(missing_ok=True)
    _write(folder / "chat_template.jinja", text)
    number = next(token["id"] for token in _read(folder / "tokenizer.json")["added_tokens"] if token["content"] == end)
    config = _read(folder / "config.json")
    old = config.get("eos_token_id")
    _write(folder / "config.json", {**config, "eos_token_id": number})
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer.pop("chat_template", None)
    _write(folder / "tokenizer_config.json", {**tokenizer, "eos_token": end})
    if (legacy := folder / "special_tokens_map.json").is_file():
        _write(legacy, {**_read(legacy), "eos_token": end})
    generation = _read(folder / "generation_config.json")
    old = generation.get("eos_token_id", old)
    every = list(dict.fromkeys([number, *(old if isinstance(old, list) else [] if old is None else [old])]))
    _write(folder / "generation_config.json", {**generation, "eos_token_id": every if len(every) > 1 else number})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, value: Mapping[str, Any] | str) -> None:
    path.unlink(missing_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="")
