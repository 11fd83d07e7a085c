"""A real HTTP server that speaks as OpenAI's does and answers each conversation by a function: a judge with known opinions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """Serve the model "judge" while the ``with`` block runs; ``asked`` has the last message of each conversation."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply({"data": [{"id": "judge", "max_model_len": 4096}]})

            def do_POST(self) -> None:
                text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
                said = "Hello."
                if text != "Hi":  # what `plan` asks
                    outer.asked.append(text)
                    said = says(text)
                choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
                self.reply({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}})

            def reply(self, body: dict[str, Any]) -> None:
                raw = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # of connections that are not accepted yet

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
