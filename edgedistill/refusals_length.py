"""Rows that are longer than the context of a model that reads them: told with file and line, before anything is trained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgedistill.chat import Chat, read_chat
from edgedistill.data.prompts import Row, guided
from edgedistill.devices.protocol import Settings
from edgedistill.errors import RecipeError, UsageError
from edgedistill.inputs import Inputs, all_targets, few_shots, files_of_rows, placed
from edgedistill.models import Resolved
from edgedistill.recipe import Recipe, Suite
from edgedistill.recipe_teacher import Teacher
from edgedistill.served import KIND as SERVED_KIND
from edgedistill.stages.evaluate import with_shots

CHECKED = 64
"""The longest rows of a file that are encoded: the others are shorter, and a plan takes a second."""
BYTES = 3.3  # of a row that make a token, about; one that comes to half a context by it is encoded
MEASURED = 2048
"""The context in which teacher and student are timed (``expand.py``); each target's artifact is in its own."""
SHORTEN = "shorten it, or take it out"


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Rows of one file's key that a model reads: with their references and the token that ends them, or with room for ``new``
    tokens that it writes.
    """

    key: str
    rows: Sequence[Row]
    model: Resolved
    context: int
    what: str
    """Whose context it is."""
    new: int | None = None
    guide: bool = False
    shots: tuple[Mapping[str, str], ...] = ()
    hint: str = SHORTEN


def refuse_long(inputs: Inputs) -> list[str]:
    """Raise RecipeError for a row that does not fit the context of a model that reads it; return a warning for those that a target
    has no room for. Rows near the limit are encoded, where the model's tokenizer is here.
    """
    counts = _Counts()
    for reading in _readings(inputs):
        for row, tokens in counts.too_long(reading):
            new = "" if reading.new is None else f" and {reading.new} new ones"
            raise RecipeError(
                f"{placed(inputs, reading.key, row)}: {tokens} tokens{new} do not fit {reading.what} of {reading.context}",
                reading.hint,
                key=reading.key,
                file=inputs.path,
            )
    found = []
    for reading in _on_targets(inputs):
        if long := list(counts.too_long(reading)):
            row, tokens = long[0]
            found.append(
                f"{placed(inputs, reading.key, row)}: {tokens} tokens and {reading.new} new ones are more than {reading.what} of "
                f"{reading.context}"
                + (f", as of {len(long) - 1} other rows of {reading.key}" if len(long) > 1 else "")
                + ": they are scored here, and no such device could answer them"
            )
    return found


class _Counts:
    """Counts tokens, each row's by each model once."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[Path, str, int, bool, bool, int], int] = {}
        self._chats: dict[tuple[Path, str], Chat | None] = {}

    def too_long(self, reading: _Reading) -> Iterator[tuple[Row, int]]:
        """Yield the rows that do not fit, with what they have without the new tokens, the longest first."""
        model, new = reading.model, 0 if reading.new is None else reading.new
        if not reading.context:
            return
        # A row as it is digested anyway. By bytes: of other scripts than ours a letter may be two tokens.
        least = (reading.context / 2 - new) * BYTES - len(str(reading.shots))
        near = [(size, at) for at, row in enumerate(reading.rows) if (size := len(row.line)) > least]
        if not near:
            return
        encode = _encoder(model.path)
        if encode is None:
            return
        for _, at in sorted(near, reverse=True)[:CHECKED]:
            row = reading.rows[at]
            tokens = self._count(encode, row, reading)
            if tokens is not None and tokens + new > reading.context:
                yield row, tokens

    def _count(self, encode: Callable[[str], int], row: Row, reading: _Reading) -> int | None:
        """Return the tokens of a prompt, with its reference where that is read; None where the template does not print it."""
        whole = reading.new is None
        name = reading.model.template.text if reading.model.template else ""
        known = (reading.model.path, name, id(row), whole, reading.guide, len(reading.shots))
        if known not in self._tokens:
            chat = self._chat(reading.model, name)
            if chat is None:
                return None
            (shown,) = with_shots((row,), reading.shots)
            messages = guided(row.messages, row.guidance) if reading.guide else shown.messages
            try:
                tokens = encode(chat.render(messages, row.tools))
            except UsageError:  # refused by row and file where templates are looked at
                return None
            self._tokens[known] = tokens + (encode(row.reference or "") + 1 if whole else 0)
        return self._tokens[known]

    def _chat(self, model: Resolved, name: str) -> Chat | None:
        if (model.path, name) not in self._chats:
            try:
                self._chats[model.path, name] = read_chat(model)
            except UsageError:
                self._chats[model.path, name] = None
        return self._chats[model.path, name]


@functools.lru_cache(maxsize=8)
def _encoder(path: Path) -> Callable[[str], int] | None:
    """Return what counts the tokens of a text as the model at ``path`` reads it; None where its tokenizer cannot be had."""
    from tokenizers import Tokenizer

    try:
        if path.is_file():
            from edgedistill.formats.gguf.dequantize import tokenizer_json
            from edgedistill.formats.gguf.read import read_info

            tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(read_info(path))))
        else:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:  # of ours, and the bare one of the library: what a step cannot read either, it tells of itself
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _readings(inputs: Inputs) -> Iterator[_Reading]:
    """Yield what models read, in about the order of the steps: a model that cannot take a row makes its step fail."""
    recipe, student = inputs.recipe, inputs.student
    files = {key: rows for key, rows in files_of_rows(inputs).items() if rows}
    for spec, model in zip((recipe.teacher, *recipe.teachers), (inputs.teacher, *inputs.others), strict=True):
        if model.kind != SERVED_KIND:  # whose server alone knows how it cuts text
            yield from _of_teacher(recipe, spec, model, files)
    if shots := few_shots(inputs.gold, recipe.baselines.few_shot):
        for key, rows in files.items():
            if (suite := _suite(recipe, key)) and suite.metric != "perplexity":
                yield _Reading(
                    key=key,
                    rows=rows,
                    shots=shots,
                    model=inputs.teacher,
                    context=inputs.teacher.facts.context,
                    what=f"the context of {inputs.teacher.source}",
                    new=suite.max_new_tokens,
                    hint=f"lower baselines.few_shot, whose {len(shots)} examples stand before it, or {SHORTEN}",
                )
    for key, rows in files.items():
        new = None  # what is learnt, or has its likelihood taken, has a reference
        if suite := _suite(recipe, key):
            new = None if suite.metric == "perplexity" else 1  # an answer may end with the context, if it begins
        elif key in ("prompts.files", "draft.files"):
            new = 2 if key == "prompts.files" else 1  # what is learnt of an answer has a token at least, and its end
        elif key == "adapt.files":
            continue
        what = f"the context of {student.source}"
        yield _Reading(key=key, rows=rows, model=student, context=student.facts.context, what=what, new=new)
    scored = next(
        (key for key in files if (suite := _suite(recipe, key)) and suite.metric != "perplexity"), "prompts.files"
    )
    timed = Settings(threads=1)
    contexts = {f"{target.name}'s runtime.context": target.runtime.context for target in all_targets(inputs)}
    for what, context in {"the context in which speed is measured": MEASURED, **contexts}.items():
        yield _Reading(
            key=scored,
            rows=files[scored][: timed.ttft_prompts],
            model=student,
            context=context,
            what=what,
            new=timed.answer_tokens,
            hint=f"put it after the first {timed.ttft_prompts} rows, whose time to the first token is measured, or shorten it",
        )


def _of_teacher(
    recipe: Recipe, spec: Teacher, model: Resolved, files: Mapping[str, Sequence[Row]]
) -> Iterator[_Reading]:
    """Yield what one teacher whose weights are here reads."""
    first, role = spec is recipe.teacher, getattr(spec, "role", "")
    context = (model.server and model.server.launch and model.server.launch.context) or model.facts.context
    of = partial(_Reading, model=model, context=context, what=f"the context of {model.source}")
    if first and "adapt.files" in files:
        yield of(key="adapt.files", rows=files["adapt.files"])
    for key in (one for one in files if first or spec.min_score):
        if (suite := _suite(recipe, key)) is None:
            continue
        if suite.metric != "perplexity":
            yield of(key=key, rows=files[key], new=1 if spec.backend == "llama_cpp" else suite.max_new_tokens)
        elif first and model.server is None:
            yield of(key=key, rows=files[key])
    if role == "recovery":  # it may never be asked
        return
    tags = {tag for one in recipe.teachers for tag in one.tags if role != "routed" or one is spec}
    rows = [row for row in files["prompts.files"] if tags.isdisjoint(row.tags) != (role == "routed")]
    by_logits = recipe.labels is not None and recipe.labels.by == "logits"
    new = 1 if by_logits else recipe.generate.max_new_tokens
    hint = f"{SHORTEN}; or lower generate.max_new_tokens"
    yield of(key="prompts.files", rows=rows, new=new, guide=True, hint=hint)


def _on_targets(inputs: Inputs) -> Iterator[_Reading]:
    """Yield the suites as they would be answered in the contexts of targets that are shorter than the student's own."""
    student, recipe = inputs.student, inputs.recipe
    contexts: dict[int, list[str]] = {}
    for target in all_targets(inputs):
        if target.runtime.context < student.facts.context:
            contexts.setdefault(target.runtime.context, []).append(target.name)
    for name, rows in inputs.suites.items():
        for context, names in contexts.items():
            what, suite = f"the runtime.context of {', '.join(names)}", recipe.suites[name]
            if suite.metric != "perplexity":
                yield _Reading(
                    key=f"suites.{name}.files",
                    rows=rows,
                    model=student,
                    context=context,
                    what=what,
                    new=suite.max_new_tokens,
                )


def _suite(recipe: Recipe, key: str) -> Suite | None:
    """Return the suite whose files a key names; None for other files."""
    return recipe.suites[key.removeprefix("suites.").removesuffix(".files")] if key.startswith("suites.") else None
