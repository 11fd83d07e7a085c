"""A real HTTP server whose model calls tools by a script, and which refuses what OpenAI's refuses of a conversation with calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.http_server import JsonHandler, JsonServer


class CallingServer(JsonServer):
    """Answer each chat with the message that ``say`` makes of its body; ``bodies`` are those that were asked."""

    def __init__(self, say: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.bodies = list[dict[str, Any]]()
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "m"}]})

            def do_POST(self) -> None:
                body = self.asked()
                if why := flaw(body):
                    self.send({"error": {"message": why}}, 400)
                    return
                outer.bodies.append(body)
                message = {"role": "assistant", "content": None, **say(body)}
                reason = "tool_calls" if message.get("tool_calls") else "stop"
                usage = {"prompt_tokens": 20, "completion_tokens": 10}
                self.send({"choices": [{"message": message, "finish_reason": reason}], "usage": usage})

        super().__init__(Handler, under="/v1")


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
