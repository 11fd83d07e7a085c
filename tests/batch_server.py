"""A real HTTP server with OpenAI's files and batches: it works a batch off by plan, and knows what was sent how often."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from email import message_from_bytes
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.http_server import JsonHandler, JsonServer
from tests.planned_server import USAGE, answer, number_of

Plan = Callable[[int, int], str]
"""(number of the row, of the batch from 1) -> what comes of it: "ok", "500" (a line in the file of errors), "expired", "lost" (no
line), "cancelled", "odd" (an answer of no form), "error" (one with the status of an answer)."""
Fate = Callable[[int], str]
"""Number of the batch -> how it ends: "completed", "expired", "cancelled", "failed CODE"; "… after N" only at the Nth look."""

LATE = 0.5
"""Seconds until a server does what it was asked by somebody who is gone."""


class BatchServer(JsonServer):
    """Answer row n, a chat that ends with the number, in batches or one by one. ``hang`` names the step ("upload", "create",
    "poll", "download", "single") that it never answers: it does its part, sets ``hanging`` and waits until whoever asked is gone.
    With "before" ahead of the step it does nothing at all, with "late" it does its part after that. A step that is ``slow`` takes
    so many seconds more.
    """

    def __init__(self, plan: Plan = lambda row, batch: "ok", fate: Fate = lambda batch: "completed") -> None:
        self.plan, self.fate, self.lock = plan, fate, threading.Lock()
        self.files, self.batches = dict[str, bytes](), dict[str, dict[str, Any]]()
        self.batched, self.single, self.calls = Counter[int](), Counter[int](), Counter[str]()
        self.looks, self.billed, self.absent = Counter[str](), 0, set[str]()
        self.hang, self.hanging, self.slow = "", threading.Event(), dict[str, float]()
        self.flaky = 0  # so many of the next calls about batches fail, after they were done
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                parts = url.path.split("/")[1:]
                if parts == ["models"]:
                    self.send({"data": [{"id": "m"}]})
                elif parts[0] in outer.absent:
                    self.send({"error": {"message": "no such address"}}, 404)
                elif parts == ["batches"]:
                    outer.calls["list"] += 1
                    self.send(outer.page(parse_qs(url.query).get("after", [""])[0]))
                elif parts[0] == "batches":
                    told = outer.look(parts[1])
                    self.act("poll", lambda: told or {"error": {"message": "no such batch"}}, 200 if told else 404)
                elif parts[0] == "files":
                    there = parts[1] in outer.files
                    self.act("download", lambda: outer.files.get(parts[1], {"error": "gone"}), 200 if there else 404)

            def do_POST(self) -> None:
                raw = self.body()
                if self.path.strip("/") in outer.absent:
                    self.send({"error": {"message": "no such address"}}, 404)
                elif self.path == "/files":
                    self.act("upload", lambda: outer.upload(raw, self.headers["Content-Type"]))
                elif self.path == "/batches":
                    self.act("create", lambda: outer.create(json.loads(raw)))
                else:
                    self.act("single", lambda: outer.answer(json.loads(raw)))

            def act(self, step: str, deed: Callable[[], Any], status: int = 200) -> None:
                outer.calls[step] += 1
                if step in outer.slow:
                    outer.hanging.set()
                    time.sleep(outer.slow[step])
                when, _, hangs = outer.hang.rpartition(" ")
                body = deed() if hangs != step or not when else None
                if hangs == step:
                    outer.hanging.set()
                    self.rfile.read(1)  # until the other end closes
                    if when == "late":
                        time.sleep(LATE)
                        deed()
                    self.close_connection = True
                    return
                with outer.lock:
                    fails = outer.flaky > 0
                    outer.flaky -= fails
                if fails:
                    self.close_connection = True
                    return
                self.send(body, status)

        super().__init__(Handler)

    def answer(self, body: dict[str, Any]) -> bytes:
        """Answer one request by itself."""
        row = number_of(body)
        with self.lock:
            self.single.update([] if row is None else [row])  # none: what `plan` asks
            self.billed += sum(USAGE.values())
        return answer(body, row or 0)

    def upload(self, raw: bytes, kind: str) -> dict[str, Any]:
        parts: Any = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw).get_payload()
        named = {re.findall(r'name="(\w+)"', part["Content-Disposition"])[0]: part for part in parts}
        assert named["purpose"].get_payload() == "batch"
        name = self.upload_lines([named["file"].get_payload(decode=True)])
        return {"id": name, "object": "file", "purpose": "batch"}

    def upload_lines(self, lines: list[bytes]) -> str:
        with self.lock:
            name = f"file-{len(self.files)}"
            self.files[name] = b"".join(lines)
        return name

    def create(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Make a batch, and do all of its work."""
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        with self.lock:
            number = len(self.batches) + 1
            batch: dict[str, Any] = {"id": f"batch_{number}", **body, "status": "in_progress"}
            self.batches[batch["id"]] = batch
            status, _, looks = self.fate(number).partition(" after ")
            status, _, code = status.partition(" ")
            good, bad = list[dict[str, Any]](), list[dict[str, Any]]()
            for line in lines if status != "failed" else ():
                row = number_of(line["body"])
                assert row is not None and line["url"] == body["endpoint"] and line["method"] == "POST"
                self.batched[row] += 1
                deed, name = self.plan(row, number), line["custom_id"]
                reply = json.loads(answer(line["body"], row))
                if deed in ("ok", "odd"):
                    self.billed += sum(USAGE.values())
                    reply = reply if deed == "ok" else {"usage": USAGE, "choices": []}
                    good.append({"custom_id": name, "response": {"status_code": 200, "body": reply}, "error": None})
                elif deed == "error":
                    no = {"error": {"code": 503, "message": "overloaded"}}
                    good.append({"custom_id": name, "response": {"status_code": 200, "body": no}, "error": None})
                elif deed in ("expired", "cancelled"):
                    bad.append({"custom_id": name, "response": None, "error": {"code": f"batch_{deed}"}})
                elif deed == "500":
                    bad.append({"custom_id": name, "response": {"status_code": 500, "body": {}}, "error": None})
            for key, found in (("output_file_id", good), ("error_file_id", bad)):
                if found:
                    self.files[f"{key}-{number}"] = b"".join(json.dumps(line).encode() + b"\n" for line in found)
                batch[key] = f"{key}-{number}" if found else None
            batch["ends"] = {"status": status, "looks": int(looks or 1)}
            if code:
                batch["errors"] = {"data": [{"code": code, "message": f"too much: {code}"}]}
            batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}
        return self.shown(batch)

    def look(self, name: str) -> dict[str, Any] | None:
        with self.lock:
            self.looks[name] += 1
            batch = self.batches.get(name)
            if batch and self.looks[name] >= batch["ends"]["looks"]:
                batch["status"] = batch["ends"]["status"]
            return batch and self.shown(batch)

    def page(self, after: str) -> dict[str, Any]:
        """Return a page of the list of batches, two at a time, the newest first."""
        with self.lock:
            names = list(self.batches)[::-1]
            names = names[names.index(after) + 1 if after else 0 :]
            return {"data": [self.shown(self.batches[name]) for name in names[:2]], "has_more": len(names) > 2}

    def shown(self, batch: dict[str, Any]) -> dict[str, Any]:
        hidden = ("ends", "output_file_id", "error_file_id") if batch["status"] == "in_progress" else ("ends",)
        return {key: value for key, value in batch.items() if key not in hidden}


def wait_for(event: threading.Event, seconds: float = 60.0) -> None:
    """Wait until a server hangs. Raises AssertionError where it never does."""
    started = time.monotonic()
    assert event.wait(seconds), f"nothing in {time.monotonic() - started:.0f} s"
