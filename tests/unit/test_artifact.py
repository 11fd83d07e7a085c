"""The commands of a card: each is what a shell reads as one program, and it asks what the model was taught."""

from __future__ import annotations

import ast
import json
import shlex
from dataclasses import replace
from typing import Any

from edgedistill.artifact import Manifest, commands
from tests.unit.stages.test_package_draft import manifest

SYSTEM = "Answer with one function call."
SAID = 'don\'t pay "$5" für\nÖl now'


def asking(*messages: tuple[str, Any], **changes: Any) -> Manifest:
    example = [{"role": role, "content": content} for role, content in messages]
    return replace(manifest({}), example=example, **changes)


def words(of: Manifest, program: str) -> list[str]:
    return shlex.split(next(line for line in commands(of) if line.startswith(program)))


def test_llama_cli_is_asked_with_the_system_message_and_ends() -> None:
    found = words(asking(("system", SYSTEM), ("user", SAID)), "llama-cli")
    assert found[-5:] == ["-st", "-sys", SYSTEM, "-p", SAID] and "--no-escape" not in found
    found = words(asking(("user", SAID)), "llama-cli")
    assert found[-3:] == ["-st", "-p", SAID] and "-sys" not in found


def test_what_looks_like_an_escape_stays_what_it_is() -> None:
    found = words(asking(("user", r"split at \n")), "llama-cli")
    assert found[-4:] == ["-st", "--no-escape", "-p", r"split at \n"]


def test_python_is_given_the_whole_example_as_python_writes_it() -> None:
    of = asking(("system", SYSTEM), ("user", SAID), ("assistant", None))
    found = words(of, "python -c")
    assert len(found) == 3
    calls = [one for one in ast.walk(ast.parse(found[2])) if isinstance(one, ast.keyword) and one.arg == "messages"]
    assert [ast.literal_eval(one.value) for one in calls] == [of.example]
    assert "n_ctx=2048" in found[2]


def test_onnx_is_asked_the_same() -> None:
    of = asking(("system", SYSTEM), ("user", SAID), format="onnx")
    found = words(of, "python -c")
    texts = [
        one.args[0].value
        for one in ast.walk(ast.parse(found[2]))
        if isinstance(one, ast.Call)
        and isinstance(one.func, ast.Attribute)
        and one.func.attr == "apply_chat_template"
        and isinstance(one.args[0], ast.Constant)
    ]
    assert [json.loads(str(text)) for text in texts] == [of.example] and "\n" not in found[2]
