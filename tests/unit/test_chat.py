"""What a chat template prints is known before anything is built, and is what transformers prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.chat import check_tools, read_chat
from edgedistill.data.prompts import parse_row
from edgedistill.errors import RecipeError, UsageError
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from tests.unit.formats.gguf.conftest import TEMPLATE as PLAIN
from tests.unit.formats.gguf.conftest import make_tokenizer
from tests.unit.test_plan import FACTS
from tests.unit.tool_template import TEMPLATE, TOOL, trace

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "wake me"}]


def resolved(path: Path) -> Resolved:
    return Resolved(
        source=f"path:{path.name}", kind="path", revision="1", digest="d", path=path, facts=ModelFacts(**FACTS)
    )


def folder(path: Path, template: Any, *, file: bool = False) -> Resolved:
    make_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    if file:
        (path / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return resolved(path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}" + TEMPLATE + "{{ eos_token }}",
        [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TEMPLATE}],
    ],
)
def test_a_folder_is_read_as_transformers_reads_it(template: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat = read_chat(folder(tmp_path / "model", template))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    for tools in ([], [TOOL]):
        for generation in (True, False):
            text = theirs.apply_chat_template(
                MESSAGES, tools=tools or None, add_generation_prompt=generation, tokenize=False
            )
            assert chat.render(MESSAGES, tools, generation) == text
    assert "weather" in chat.render(MESSAGES, [TOOL])


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    assert read_chat(folder(tmp_path / "model", TEMPLATE, file=True)).template == TEMPLATE
    with pytest.raises(UsageError, match="path:none has no chat template"):
        read_chat(folder(tmp_path / "none", ""))


def test_a_gguf_is_read_too(smollm2_gguf: Path) -> None:
    text = read_chat(resolved(smollm2_gguf)).render([{"role": "system", "content": "s"}, *MESSAGES])
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nwake me<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "change", "message", "hint"),
    [
        (PLAIN, {}, "row 't' has tools, and the chat template of path:model", "in the system message"),
        (PLAIN, {"tools": []}, "row 't' has tool_calls", 'into "content"'),
        (
            TEMPLATE.replace("{{ m.content }}", "result", 1),
            {},
            "row 't' has results of tools",
            "messages of the user's",
        ),
        (TEMPLATE.replace("{% if tools", "{{ raise_exception('no') }}{% if tools"), {}, "refuses the conversation", ""),
    ],
)
def test_what_a_template_leaves_out_is_refused_with_its_row_and_key(
    template: str, change: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    model, good = folder(tmp_path / "model", template), folder(tmp_path / "good", TEMPLATE)
    row = parse_row(trace(**change), "x:1", traces=True)
    check_tools([good], {"prompts.files": [row]}, tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=message) as error:
        check_tools([good, model], {"adapt.files": [], "prompts.files": [row]}, tmp_path / "recipe.toml")
    assert error.value.key == "prompts.files" and hint in (error.value.hint or "")


def test_rows_without_tools_need_no_template(tmp_path: Path) -> None:
    row = parse_row({"prompt": "wake me"}, "x:1")
    check_tools([resolved(tmp_path / "nothing")], {"prompts.files": [row]}, tmp_path / "recipe.toml")
