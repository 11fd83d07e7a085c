"""A real HTTP server that speaks as OpenAI's does and answers each conversation by a function: a judge with known opinions."""

from __future__ import annotations

from collections.abc import Callable

from tests.http_server import JsonHandler, JsonServer


class JudgeServer(JsonServer):
    """Serve the model "judge" while the ``with`` block runs; ``asked`` has the last message of each conversation."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "judge", "max_model_len": 4096}]})

            def do_POST(self) -> None:
                text = self.asked()["messages"][-1]["content"]
                said = "Hello."
                if text != "Hi":  # what `plan` asks
                    outer.asked.append(text)
                    said = says(text)
                choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                self.send({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}})

        super().__init__(Handler, under="/v1")
