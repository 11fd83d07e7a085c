"""A served teacher beside the student: each text is scored once, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from edgedistill.served import Server
from edgedistill.teachers.beside import ServedTeacher
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.training.data import Example
from tests.http_server import JsonHandler, JsonServer
from tests.unit.formats.gguf.conftest import make_model


class Scoring(JsonServer):
    """Give each token of a text as the only one, and remember the texts."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, ...]] = []
        outer = self

        class Handler(JsonHandler):
            def do_POST(self) -> None:
                ids = self.asked()["prompt"]
                outer.texts.append(tuple(ids))
                places: list[Any] = [{str(one): {"logprob": -0.1, "decoded_token": None}} for one in ids]
                self.send({"choices": [{"prompt_logprobs": places}]})

        super().__init__(Handler)


def test_rows_that_came_to_the_same_text_are_scored_once(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    examples = [
        Example(id=name, prompt_ids=(5, 6), completion_ids=(7, last)) for name, last in (("a", 8), ("b", 8), ("c", 9))
    ]
    with Scoring() as there:
        server = Server(urls=(there.url,), model="m", key_env="NO_SUCH_KEY", concurrency=2, timeout=10, retries=0)
        with OpenAITeacher(server, rows=None, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model")) as teacher:
            found = ServedTeacher(teacher, [], [], n=1).targets(None, range(3), examples)
    assert sorted(there.texts) == [(5, 6, 7, 8), (5, 6, 7, 9)]
    assert found.ids.flatten().tolist() == [7, 8, 7, 8, 7, 9]
