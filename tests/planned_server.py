"""A real HTTP server that fails by plan, knows what was asked when and how many at a time, and what its answers would be billed."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.http_server import JsonHandler, JsonServer

Plan = Callable[[int, int], str]
"""(number of the row, how often it was asked before) -> what the server does: "ok", a status with perhaps seconds for Retry-After
("429 0.5"), "slow 1.5" (answers after so long), "cut" (the answer breaks off), "truncated" (whole, and no JSON), "says {…}" (that
JSON with the status 200, and no bill)."""
USAGE = {"prompt_tokens": 20, "completion_tokens": 10}


class Planned(JsonServer):
    """Answer the request of row n, {"row": n} or a chat that ends with the number, or fail as the plan says. With ``say`` a chat
    gets what that makes of its messages, and ``chats`` counts their last ones.
    """

    def __init__(self, plan: Plan, say: Callable[[list[dict[str, Any]]], str] | None = None) -> None:
        self.chats = Counter[str]()
        self.asked, self.times, self.lock = Counter[int](), dict[int, list[float]](), threading.Lock()
        self.now = self.most = self.billed = 0
        self.keys: set[str | None] = set()
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "m"}]})

            def do_POST(self) -> None:
                body = self.asked()
                if say is not None and "messages" in body:
                    with outer.lock:
                        outer.chats[body["messages"][-1]["content"]] += 1
                        at = outer.chats.total() - 1
                    self.act(plan(at, 0), answer(body, 0, say(body["messages"])))
                    return
                row = number_of(body)
                if row is None:  # what `plan` asks
                    self.send(answer(body, 0))
                    return
                with outer.lock:
                    before = outer.asked[row]
                    outer.asked[row] += 1
                    outer.times.setdefault(row, []).append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.keys.add(self.headers["Authorization"])
                try:
                    self.act(plan(row, before), answer(body, row))
                except (BrokenPipeError, ConnectionResetError):  # whoever asked is gone
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.now -= 1

            def act(self, deed: str, body: bytes) -> None:
                what, _, more = deed.partition(" ")
                status = int(what) if what.isdigit() else 200
                if status == 200 and what != "says":  # whether it arrives or not
                    with outer.lock:
                        outer.billed += sum(USAGE.values())
                if what == "slow":
                    time.sleep(float(more))
                if what == "cut":  # in the middle of the answer
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                said = {"error": {"message": "no, my sk-secret friend"}}
                raw = (
                    more.encode()
                    if what == "says"
                    else b'{"row": '
                    if what == "truncated"
                    else body
                    if status == 200
                    else json.dumps(said).encode()
                )
                self.send(raw, status, {"Retry-After": more} if status != 200 and more else None)

        super().__init__(Handler)


def number_of(body: dict[str, Any]) -> int | None:
    """Return the number of the row that is asked for."""
    if "row" in body:
        return int(body["row"])
    found = re.search(r"(\d+)$", body["messages"][-1]["content"])
    return int(found.group(1)) if found else None


def answer(body: dict[str, Any], row: int, said: str = "") -> bytes:
    """Return what is answered to the request of a row."""
    if "row" in body:
        return json.dumps({"row": row, **({"usage": USAGE} if body.get("usage") else {})}).encode()
    choice = {"message": {"role": "assistant", "content": said or f"answer {row}"}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": USAGE}).encode()
