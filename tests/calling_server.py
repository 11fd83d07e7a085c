"""A real HTTP server whose model calls tools by a script, and which refuses what OpenAI's refuses of a conversation with calls."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class CallingServer:
    """Answer each chat with the message that ``say`` makes of its body; ``bodies`` are those that were asked."""

    def __init__(self, say: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.bodies = list[dict[str, Any]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": "m"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if why := flaw(body):
                    self.send(400, {"error": {"message": why}})
                    return
                outer.bodies.append(body)
                message = {"role": "assistant", "content": None, **say(body)}
                reason = "tool_calls" if message.get("tool_calls") else "stop"
                usage = {"prompt_tokens": 20, "completion_tokens": 10}
                self.send(200, {"choices": [{"message": message, "finish_reason": reason}], "usage": usage})

            def send(self, status: int, body: Any) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> CallingServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def call(name: str, arguments: str) -> dict[str, Any]:
    """Return a call as OpenAI's API has it."""
    return {
        "id": f"call_{abs(hash(arguments))}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def flaw(body: dict[str, Any]) -> str:
    """Say what OpenAI's API would refuse of tools, calls and results; "" for nothing."""
    for tool in body.get("tools", []):
        if tool.get("type") != "function" or "name" not in tool.get("function", {}):
            return "tools[0].type is missing"
    open_calls: list[str] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_calls:
                return "messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
            open_calls.remove(message["tool_call_id"])
            continue
        if open_calls:
            return "an assistant message with 'tool_calls' must be followed by tool messages"
        for one in message.get("tool_calls") or ():
            if one.get("type") != "function" or not isinstance(one["function"]["arguments"], str):
                return "tool_calls[0].function.arguments must be a string"
            open_calls.append(one["id"])
    return ""
