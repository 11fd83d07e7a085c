"""What is read of a server's answers, and what becomes of those that no file can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.thinking import join, split
from edgedistill.errors import StepFailed
from edgedistill.served import Server
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Answer, Sampling
from tests.calling_server import CallingServer

ASKED = [{"role": "user", "content": "Hello"}]


def answered(folder: Path, message: dict[str, Any], *, style: str = "answer") -> list[Answer]:
    """Return what is stored of the answer to one prompt."""
    stored: list[Answer] = []
    with CallingServer(lambda body: message) as there:
        server = Server(urls=(there.url,), model="m", key_env="NO_SUCH_KEY", concurrency=1, timeout=10, retries=0)
        with OpenAITeacher(server, rows=folder / "rows.sqlite", style=style) as teacher:
            list(teacher.generate([ASKED], sampling=Sampling(max_new_tokens=10), on_batch=stored.extend))
    return stored


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Hi"}]},
        {"content": 7},
        {"content": "Hi", "reasoning_content": ["so"]},
    ],
)
def test_an_answer_that_is_no_text_is_told_of_and_not_stored(tmp_path: Path, message: dict[str, Any]) -> None:
    with pytest.raises(StepFailed, match="an answer of another form than OpenAI's"):
        answered(tmp_path, message, style="think")
    (one,) = answered(tmp_path, {"content": "Hi", "reasoning_content": " so\n"}, style="think")
    assert one.text == "<think>\nso\n</think>\nHi"


@pytest.mark.parametrize("style", ["explanation", "verification"])
def test_thoughts_before_an_answer_are_not_the_block_after_it(tmp_path: Path, style: str) -> None:
    text = join(style, "It is so because of that.", "42")
    (one,) = answered(tmp_path, {"content": text, "reasoning_content": "Let me think."}, style=style)
    assert one.text == text
    assert split(one.text)[:2] == ("It is so because of that.", "42")
