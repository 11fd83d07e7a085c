"""TOML in, pydantic model out; every mistake becomes one message with file, line, key and what to write instead."""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from edgedistill.errors import RecipeError, UsageError
from edgedistill.toml_lines import Key, key_lines, line_of

M = TypeVar("M", bound=BaseModel)


def load_toml(path: Path, model: type[M], *, text: str | None = None, overrides: dict[str, Any] | None = None) -> M:
    """Read ``path`` (or ``text`` in its name) and validate it as ``model``; one `RecipeError` has every mistake.

    ``overrides`` maps dotted keys to values (see `parse_override`) and is laid over the file before validating. Types
    are strict as in TOML: ``"2"`` is no number and ``2.0`` no count; a whole number does where a float is wanted.
    """
    if text is None:
        text = read_text(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, error) from None
    overrides = overrides or {}
    apply_overrides(data, overrides)
    try:
        # As JSON, because only there strict validation still takes a list for a tuple and a string for a Path.
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise _recipe_error(path, text, data, model, overrides, error) from None


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte-order mark; raise `UsageError` if missing or binary."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        found = sorted(entry.name for entry in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, found, n=1)
        instead = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"{path}: no such file{instead}", "edgedistill init quickstart   # a first recipe") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory, not a TOML file", f"ls {path}/*.toml") from None
    except PermissionError:
        raise UsageError(f"{path}: may not be read (permission denied)", f"ls -l {path}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"not UTF-8 text (byte {error.start}: {error.reason})", "save the file as UTF-8", file=path
        ) from None


def parse_override(argument: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE`` of ``--set``; the value is TOML where it parses (``1e-4``, ``true``), else a string."""
    dotted, equals, value = argument.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        raise UsageError(f"--set {argument}: not of the form KEY=VALUE", "for example --set distill.lr=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return dotted, value
    return dotted, parsed["value"] if set(parsed) == {"value"} else value


def apply_overrides(data: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set each dotted key in ``data`` in place, making tables on the way; a number selects an item of a list."""
    for dotted, value in overrides.items():
        parts = split_dotted(dotted)
        here: Any = data
        part: Any
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            if isinstance(here, list):
                if not isinstance(part, int) or part >= len(here):
                    among = f"0 to {len(here) - 1}" if here else "none: the list is empty"
                    raise UsageError(f"--set {dotted}: {show_key(parts[:depth])} is a list; its items are {among}")
            elif isinstance(here, dict):
                part = str(part)
                if not last:
                    here.setdefault(part, {})
            else:
                raise UsageError(f"--set {dotted}: {show_key(parts[:depth])} is {_found(here)}, it has no keys")
            if last:
                here[part] = copy.deepcopy(value)  # a later key may set something inside, and the caller's stays
            else:
                here = here[part]


def split_dotted(dotted: str) -> Key:
    """Split ``filter.0.kind``, ``filter[0].kind`` or ``quantize."my phone".type`` into its parts."""
    parts: list[str | int] = []
    for quoted, index, bare in re.findall(r'"([^"]*)"|\[?(\d+)\]?(?=[.\[]|$)|([^.\[\]"]+)', dotted):
        parts.append(int(index) if index else quoted or bare.strip())
    if not parts:
        raise UsageError(f"--set {dotted}: no key in it", "for example --set distill.lr=1e-4")
    return tuple(parts)


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of ``model``, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def key_error(dotted: str, message: str) -> PydanticCustomError:
    """Make an error for a validator to raise about a key below its own place; the message has that key's line."""
    return PydanticCustomError("edgedistill_key", "{text}", {"text": message, "key": dotted})


def with_line(error: RecipeError, recipe: Path, overrides: Mapping[str, Any]) -> RecipeError:
    """Return an error that names a key of a file with the line that the key stands on, or its table where it is left at its
    default; one of a key of ``recipe`` that ``overrides`` gave as theirs.
    """
    if error.line is not None or not error.key or error.file is None:
        return error
    path = Path(error.file)
    try:
        lines = key_lines(read_text(path))
    except UsageError:  # errors of --set are of no file
        return error
    own = overrides if path == recipe else {}
    return _told(path, split_dotted(error.key), error.said, error.hint, lines, own, shown=error.key)


def _told(
    path: Path,
    key: Key,
    message: str,
    hint: str,
    lines: Mapping[Key, int],
    overrides: Iterable[str],
    *,
    shown: str = "",
    missing: int | None = None,
) -> RecipeError:
    """Make the error of a key, which names its line, or the option that gave the key or a table that it stands in. ``shown`` is the
    key as it is written, ``missing`` the line of what is nowhere.
    """
    shown = shown or show_key(key)
    for dotted in overrides:
        if key[: len(over := split_dotted(dotted))] == over:
            return RecipeError(message, hint, file=f"--set {dotted}", key=dotted if key == over else shown)
    return RecipeError(message, hint, file=path, line=line_of(key, lines) or missing, key=shown)


def show_key(key: Key) -> str:
    """Write ``("filter", 0, "kind")`` as ``filter[0].kind``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def did_you_mean(name: object, among: typing.Iterable[str]) -> str:
    """Return ``; did you mean "x"?`` for the nearest of ``among``, or nothing when none is near."""
    folded = {other.casefold(): other for other in among}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    return f'; did you mean "{folded[near[0]]}"?' if near else ""


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> RecipeError:
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)", str(error))
    line = int(found.group(1)) if found else len(text.splitlines()) or 1
    reason = re.sub(r"\s*\(at [^)]*\)$", "", str(error))
    shown = text.splitlines()[line - 1].strip() if text.strip() else ""
    return RecipeError(
        f"not valid TOML: {reason[:1].lower()}{reason[1:]}" + (f", in `{shown}`" if shown else ""),
        'strings need quotes (key = "value"), lists need [brackets], tables start with [name]',
        file=path,
        line=line,
    )


# ---------------------------------------------------------------------------------------------------------- errors

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "dict": "a table",
    "model": "a table",
    "dataclass": "a table",
    "path": "a path",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
}


def _recipe_error(
    path: Path,
    text: str,
    data: dict[str, Any],
    model: type[BaseModel],
    overrides: dict[str, Any],
    error: ValidationError,
) -> RecipeError:
    lines = key_lines(text)
    messages: dict[Key, list[tuple[str, str]]] = {}  # a union reports every arm: they are joined per key
    for one in error.errors():
        key, found = _resolve(data, tuple(one["loc"]), str(one["type"]))
        if one["type"] == "edgedistill_key":
            key = (*key, *split_dotted(str(one.get("ctx", {})["key"])))
            found = None
        if one["type"] == "too_short" and isinstance(found, list) and len(found) >= one.get("ctx", {})["min_length"]:
            continue  # of entries of which one is wrong, and told of by itself
        messages.setdefault(key, []).append(_say(one, key, found, data, model))

    reports: list[tuple[int, Key, str]] = []
    for key, said in messages.items():
        expected = list(dict.fromkeys(words for kind, words in said if kind == "expected"))
        other = list(dict.fromkeys(words for kind, words in said if kind == "said"))
        if expected and not other:
            alternatives = ", ".join(expected[:-1]) + (" or " if len(expected) > 1 else "") + expected[-1]
            value = _at(data, key)
            options = [option for words in expected for option in re.findall(r'"([^"]+)"', words)]
            near = did_you_mean(value, options) if isinstance(value, str) else ""
            message = f"expected {alternatives}; found {_found(value)}{near}"
        else:
            message = "; ".join(other)
        reports.append((line_of(key, lines) or 1, key, message))
    reports.sort(key=lambda report: (report[0], str(report[1])))
    (_, first, message), *rest = reports
    more = [_told(path, key, said, "", lines, overrides, missing=1).message for _, key, said in rest]
    hint = "edgedistill schema   # every key, with its type and default"
    return _told(path, first, "\n".join([message, *more]), hint, lines, overrides, missing=1)


def _resolve(data: Any, loc: Key, kind: str) -> tuple[Key, Any]:
    """Turn pydantic's location, which also names arms of unions, into the key that stands in the file."""
    key: Key = ()
    here: Any = data
    for position, part in enumerate(loc):
        if _holds(here, part):
            key, here = (*key, part), here[part]
        elif kind == "missing" and position == len(loc) - 1:
            key, here = (*key, part), None
    return key, here


def _at(data: Any, key: Key) -> Any:
    for part in key:
        if not _holds(data, part):
            return None
        data = data[part]
    return data


def _holds(data: Any, part: Any) -> bool:
    return part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))


def _say(error: Any, key: Key, found: Any, data: dict[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """Return ("expected", what) for a wrong type, which unions join with "or", and ("said", sentence) for the rest."""
    kind, ctx = str(error["type"]), error.get("ctx", {})
    if kind == "extra_forbidden":
        names = [name for place in _models_at(model, key[:-1], data) for name in _field_names(place)]
        near = did_you_mean(key[-1], names)
        if not near:
            homes = [home for home in _homes(model, str(key[-1])) if home != show_key(key)]
            near = f"; it belongs at {homes[0]}" if homes else ""
        if not near and names:
            near = f"; known here: {', '.join(sorted(dict.fromkeys(names)))}"
        return "said", f"unknown key{near}"
    if kind == "missing":
        return "said", "this key is missing"
    if kind == "edgedistill_key":
        return "said", ctx["text"]
    if kind in ("value_error", "assertion_error"):
        return "said", str(ctx.get("error", error["msg"]))
    if kind in ("literal_error", "enum"):
        options = re.findall(r"'([^']*)'|([^\s',]+)", re.sub(r" or ", ", ", str(ctx["expected"])))
        return "expected", ", ".join(f'"{quoted}"' if quoted else bare for quoted, bare in options)
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(ctx["expected_tags"]).split(",")]
        tag = str(ctx["discriminator"]).strip("'")
        listed = ", ".join(f'"{one}"' for one in tags)
        return "said", f'{tag} = "{ctx["tag"]}" is none of {listed}{did_you_mean(ctx["tag"], tags)}'
    if kind == "union_tag_not_found":
        tag = str(ctx["discriminator"]).strip("'")
        return "said", f"the key {tag}, which says what this table is, is missing"
    base = re.sub(r"_(attributes_)?(type|parsing|parsing_size)$", "", kind)
    if base in _EXPECTED:
        return "expected", _EXPECTED[base]
    if kind == "too_short":
        return "said", f"entries needed: at least {ctx['min_length']}; found {ctx['actual_length']}"
    if kind == "string_pattern_mismatch":
        return "said", f"has characters that it may not; found {_found(found)}, the pattern is {ctx['pattern']}"
    message = str(error["msg"])
    message = re.sub(r"^Input should be ", "expected a value ", message)
    return "said", f"{message[:1].lower()}{message[1:]}; found {_found(found)}"


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, int):
        return f"{value} (a whole number)"
    if isinstance(value, float):
        return f"{value} (a number)"
    if isinstance(value, str):
        return f'"{value if len(value) < 60 else value[:57] + "..."}" (a string)'
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a table"
    return f"{value} (a {type(value).__name__})"


# ---------------------------------------------------------------------------------------- which keys a place has


def _field_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name


def _models_at(model: type[BaseModel], key: Key, data: Any) -> list[type[BaseModel]]:
    """Return the models that the table at ``key`` may be; of a tagged union only the arm whose tag the file gives."""
    places: list[Any] = [model]
    for part in key:
        data = _at(data, (part,))
        places = [inner for place in places for inner in _inside(place, part)]
    models = [arm for place in places for arm in _arms(place) if _is_model(arm)]
    if isinstance(data, dict):
        tagged = [arm for arm in models if _tag_agrees(arm, data)]
        models = tagged or models
    return models


def _inside(place: Any, part: str | int) -> Iterator[Any]:
    for arm in _arms(place):
        if _is_model(arm):
            for name, field in arm.model_fields.items():
                if (field.alias or name) == part:
                    yield field.annotation
            continue
        origin, arguments = typing.get_origin(arm), typing.get_args(arm)
        if origin is dict and len(arguments) == 2:
            yield arguments[1]
        elif origin in (list, tuple, set, frozenset) and isinstance(part, int):
            yield from (argument for argument in arguments if argument is not Ellipsis)


def _arms(place: Any) -> Iterator[Any]:
    origin = typing.get_origin(place)
    if origin is typing.Annotated:
        yield from _arms(typing.get_args(place)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(place):
            yield from _arms(argument)
    else:
        yield place


def _is_model(place: Any) -> bool:
    return isinstance(place, type) and issubclass(place, BaseModel)


def _tag_agrees(model: type[BaseModel], data: dict[str, Any]) -> bool:
    tags = {
        field.alias or name: typing.get_args(field.annotation)
        for name, field in model.model_fields.items()
        if typing.get_origin(field.annotation) is typing.Literal
    }
    return bool(tags) and all(data[name] in options for name, options in tags.items() if name in data)


def _homes(model: type[BaseModel], name: str, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the places where a key called ``name`` exists: most misplaced keys are right ones one table off."""
    if depth > 3:
        return
    for field_name, field in model.model_fields.items():
        here = f"{prefix}{field.alias or field_name}"
        if prefix and (field.alias or field_name) == name:
            yield here
        for place in _arms(field.annotation):
            wrapped = typing.get_args(place) if typing.get_origin(place) in (list, tuple) else (place,)
            for inner in wrapped:
                for arm in _arms(inner):
                    if _is_model(arm):
                        yield from _homes(arm, name, f"{here}.", depth + 1)
