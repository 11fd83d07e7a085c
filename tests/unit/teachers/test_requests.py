"""The client against a real HTTP server that fails by plan."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edgedistill.errors import StepFailed
from edgedistill.served import Server
from edgedistill.teachers import requests
from edgedistill.teachers.requests import Requests, retry_after

Plan = Callable[[int, int], str]
"""(number of the row, how often it was asked before) -> what the server does."""


class Planned:
    """Answer {"row": n} with {"row": n}, or fail as the plan says; knows what was asked when, and how many at a time."""

    def __init__(self, plan: Plan) -> None:
        self.asked, self.times, self.lock = Counter[int](), dict[int, list[float]](), threading.Lock()
        self.now = self.most = 0
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                row = json.loads(body)["row"]
                with outer.lock:
                    before = outer.asked[row]
                    outer.asked[row] += 1
                    outer.times.setdefault(row, []).append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.keys.add(self.headers["Authorization"])
                try:
                    self.act(plan(row, before), body)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def act(self, deed: str, body: bytes) -> None:
                what, _, more = deed.partition(" ")
                if what == "slow":
                    time.sleep(float(more))
                if what == "cut":  # in the middle of the answer
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                status = int(what) if what.isdigit() else 200
                said = {"error": {"message": "no, my sk-secret friend"}}
                raw = b'{"row": ' if what == "truncated" else body if status == 200 else json.dumps(said).encode()
                self.send_response(status)
                if status != 200 and more:
                    self.send_header("Retry-After", more)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Planned:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_WAIT", 0.01)


def _server(url: str, **changes: Any) -> Server:
    table = {"concurrency": 8, "timeout": 2.0, "retries": 4, "key_env": "ED_TEST_KEY", **changes}
    return Server(url=url, model="m", **table)


def _ask(planned: Planned, count: int, **changes: Any) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    client = Requests(_server(planned.url, **changes))
    try:
        client.post("/x", [{"row": row} for row in range(count)], lambda at, reply: found.update({at: reply}))
    finally:
        client.close()
        client.close()  # twice does no harm
    return found


def test_whatever_fails_is_asked_again_and_nothing_else() -> None:
    deeds = ["429", "500", "503", "cut", "truncated", "ok"]

    def plan(row: int, before: int) -> str:
        return deeds[row % 6] if before == 0 else deeds[(row + 1) % 6] if before == 1 and row % 2 else "ok"

    with Planned(plan) as planned:
        found = _ask(planned, 120)
        asked = dict(planned.asked)
    assert found == {row: {"row": row} for row in range(120)}
    # a row is asked once more for every deed of its plan that is no answer
    expected = {}
    for row in range(120):
        tries = 0
        while plan(row, tries) != "ok":
            tries += 1
        expected[row] = tries + 1
    assert asked == expected
    assert planned.most <= 8


def test_a_server_is_waited_for_as_long_as_it_asks() -> None:
    with Planned(lambda row, before: "429 0.4" if before == 0 else "ok") as planned:
        _ask(planned, 4)
        gaps = [times[1] - times[0] for times in planned.times.values()]
    assert min(gaps) >= 0.4


def test_a_slow_answer_is_given_up_and_asked_for_again() -> None:
    with Planned(lambda row, before: "slow 1.5" if row == 0 and before == 0 else "ok") as planned:
        assert len(_ask(planned, 3, timeout=0.5)) == 3
        assert planned.asked == {0: 2, 1: 1, 2: 1}


def test_a_refusal_is_final_and_what_is_in_flight_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ED_TEST_KEY", "sk-secret")
    found: list[int] = []
    with Planned(lambda row, before: "400" if row == 3 else "slow 0.1") as planned:
        client = Requests(_server(planned.url, concurrency=4))
        with pytest.raises(StepFailed, match="refuses \\(400\\): no, my … friend") as caught:
            client.post("/x", [{"row": row} for row in range(50)], lambda at, reply: found.append(at))
        client.close()
        assert planned.asked == {0: 1, 1: 1, 2: 1, 3: 1}
        assert planned.keys == {"Bearer sk-secret"}
    assert sorted(found) == [0, 1, 2]
    assert "sk-secret" not in str(caught.value) + caught.value.hint


def test_a_server_that_stays_broken_ends_the_step_with_what_to_do() -> None:
    with Planned(lambda row, before: "503") as planned:
        with pytest.raises(StepFailed, match="3 times") as caught:
            _ask(planned, 2, retries=2, concurrency=1)
        assert planned.asked == {0: 3}
    assert "teacher.retries" in caught.value.hint


def test_a_server_that_is_not_there() -> None:
    client = Requests(_server("http://127.0.0.1:9", retries=1))
    with pytest.raises(StepFailed, match=r"127\.0\.0\.1:9/x: ConnectError"):
        client.post("/x", [{"row": 0}], lambda at, reply: None)
    client.close()


@pytest.fixture
def dates() -> Iterator[tuple[str, str]]:
    now = datetime.now(UTC)
    yield (
        format_datetime(now + timedelta(seconds=30), usegmt=True),
        format_datetime(now - timedelta(hours=1), usegmt=True),
    )


def test_retry_after_is_a_number_or_a_date(dates: tuple[str, str]) -> None:
    assert retry_after("7") == 7.0
    assert retry_after("-3") == 0.0
    assert retry_after("99999") == requests.LONGEST_ASKED
    assert 28 < (retry_after(dates[0]) or 0) <= 30
    assert retry_after(dates[1]) == 0.0
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert retry_after("nan") is None
