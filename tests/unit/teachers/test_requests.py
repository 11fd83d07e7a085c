"""The client against a real HTTP server that fails by plan."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import StepFailed
from edgedistill.served import Rate, Server
from edgedistill.spending import Budget, Ledger, most
from edgedistill.teachers import requests
from edgedistill.teachers.requests import Pace, Requests, retry_after
from tests.planned_server import USAGE, Planned


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_WAIT", 0.01)


def _server(url: str, **changes: Any) -> Server:
    table = {"urls": (url,), "concurrency": 8, "timeout": 2.0, "retries": 4, "key_env": "ED_TEST_KEY", **changes}
    return Server(model="m", **table)


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


@pytest.mark.parametrize(
    "error",
    [
        {"code": 429, "message": "slow down"},  # OpenRouter
        {"code": "502", "message": "no answer from behind"},
        {"type": "rate_limit_error", "code": None, "message": "Too fast"},
        {"type": "overloaded_error", "message": "Overloaded"},  # Anthropic
        {"status": "RESOURCE_EXHAUSTED", "message": "later"},  # Google
        {"code": "server_error", "message": "we are sorry"},
        {"message": "The request timed out"},
        "Rate limit reached for m",
    ],
)
def test_an_error_with_the_status_of_an_answer_is_what_it_names(error: Any, tmp_path: Path) -> None:
    told = json.dumps({"error": error})
    with Planned(lambda row, before: f"says {told}" if before < 2 else "ok") as planned:
        client = Requests(_server(planned.url), Ledger(tmp_path / "rows.sqlite", "a", Budget()))
        found: list[dict[str, Any]] = []
        client.post("/x", [{"row": 0, "usage": 1}], lambda at, reply: found.append(reply))
        assert client.ledger is not None
        spent = client.ledger.spent()
        client.close()
        assert found == [{"row": 0, "usage": USAGE}] and planned.asked == {0: 3}
    assert spent.requests == 3 and (spent.tokens == planned.billed) == ("timed out" not in told)  # who knows


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"error": {"code": 400, "message": "no such model, sk-secret"}}, "no such model, …"),
        ({"error": {"type": "invalid_request_error", "message": "not with this server: rate limit"}}, "not with this"),
        ({"error": {"code": "insufficient_quota", "type": "insufficient_quota", "message": "pay"}}, "pay"),
        ({"error": "the prompt is too long"}, "the prompt is too long"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"choices": [{"error": {"code": 403, "message": "flagged"}, "finish_reason": "error"}]}, "flagged"),
    ],
)
def test_an_error_with_the_status_of_an_answer_is_refused_in_the_servers_words(
    said: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ED_TEST_KEY", "sk-secret")
    with Planned(lambda row, before: f"says {json.dumps(said)}") as planned:
        with pytest.raises(StepFailed, match=f"the server refuses .*: {told}"):
            _ask(planned, 1)
        assert planned.asked == {0: 1}


def test_an_error_that_is_null_is_none() -> None:
    answer = {"error": None, "choices": [{"error": None}]}
    with Planned(lambda row, before: f"says {json.dumps(answer)}") as planned:
        assert _ask(planned, 1) == {0: answer}


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


def test_several_servers_share_the_requests_and_one_that_is_gone_is_left_alone() -> None:
    with Planned(lambda row, before: "slow 0.02") as one, Planned(lambda row, before: "slow 0.02") as two:
        urls = (one.url, two.url, "http://127.0.0.1:9")
        client = Requests(_server("", urls=urls, concurrency=4))
        found: list[int] = []
        client.post("/x", [{"row": row} for row in range(90)], lambda at, reply: found.append(at))
        client.close()
        assert sorted(found) == list(range(90))
        assert one.asked.total() + two.asked.total() == 90
        assert min(one.asked.total(), two.asked.total()) > 25
        assert max(one.most, two.most) <= 4  # places are each server's own


def test_a_rate_limit_spreads_requests_and_tokens_over_the_minute() -> None:
    with Planned(lambda row, before: "ok") as planned:
        started = time.monotonic()
        _ask(planned, 11, rate=Rate(requests=600))  # one in a tenth of a second
        assert 0.95 < time.monotonic() - started < 3
    pace = Pace(120)
    assert [pace.take(1, 10.0), pace.take(2, 10.0), pace.take(1, 10.0), pace.take(1, 20.0)] == [0, 0.5, 1.5, 0]
    assert Pace(None).take(10**9, 0.0) == 0


def _spend(planned: Planned, path: Path, rows: range, budget: Budget, **changes: Any) -> tuple[list[int], Ledger]:
    ledger, found = Ledger(path, "a", budget), list[int]()
    client = Requests(_server(planned.url, **changes), ledger)
    try:
        bodies = [{"row": row, "usage": True, "max_tokens": 10} for row in rows]
        client.post("/x", bodies, lambda at, reply: found.append(rows[at]))
    finally:
        client.close()
    return found, ledger


def test_the_budget_is_never_exceeded_and_what_a_request_did_not_need_is_given_back(tmp_path: Path) -> None:
    path, each = tmp_path / "rows.sqlite", sum(USAGE.values())
    with Planned(lambda row, before: "slow 0.01") as planned:
        with pytest.raises(
            StepFailed, match=r"teacher\.budget: [\d,]+ of 1,000 tokens are spent, a request may take"
        ) as caught:
            _spend(planned, path, range(100), Budget(tokens=1000))
        assert "raise teacher.budget" in caught.value.hint
        # a request may take over 100 tokens and takes 30: the rest came back, or these would be 9
        assert 1000 - 5 * each < planned.billed <= 1000
        spent = Ledger(path, "a", Budget()).spent()
        assert (spent.tokens, spent.requests) == (planned.billed, planned.asked.total())
        answered = planned.asked.total()
        found, _ = _spend(planned, path, range(answered, 100), Budget(tokens=10_000))
    assert len(found) == 100 - answered


def test_what_is_broken_off_has_cost_the_most(tmp_path: Path) -> None:
    """Ctrl-C during a second try: the first one's refusal, which cost nothing, says nothing of it."""
    ledger = Ledger(tmp_path / "rows.sqlite", "a", Budget())
    with Planned(lambda row, before: "503 0" if before == 0 else "slow 30") as planned:
        client = Requests(_server(planned.url, timeout=60.0), ledger)

        def interrupt() -> None:
            while planned.asked[0] < 2:
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        body = {"row": 0, "usage": True, "max_tokens": 10}
        with pytest.raises(KeyboardInterrupt):
            client.post("/x", [body], lambda at, reply: None)
        client.close()
    assert Ledger(tmp_path / "rows.sqlite", "a", Budget()).spent().tokens == most(body).tokens


def test_money_is_counted_at_its_price(tmp_path: Path) -> None:
    budget = Budget(money=0.02, input=10.0, output=100.0)  # 20 and 10 tokens: 0.0012 each
    with Planned(lambda row, before: "ok") as planned:
        with pytest.raises(StepFailed, match=r"of 0\.02 is spent, a request may cost"):
            _spend(planned, tmp_path / "rows.sqlite", range(100), budget)
        spent = Ledger(tmp_path / "rows.sqlite", "a", budget).spent()
    assert spent.money == pytest.approx(0.0012 * planned.asked.total())
    assert 0.01 < spent.money <= 0.02


def test_a_refused_request_costs_nothing_and_a_lost_one_the_most(tmp_path: Path) -> None:
    budget, each = Budget(tokens=10**6), sum(USAGE.values())
    with Planned(lambda row, before: "503" if before == 0 else "ok") as planned:
        _, ledger = _spend(planned, tmp_path / "refused.sqlite", range(5), budget)
    assert ledger.spent().tokens == 5 * each
    with Planned(lambda row, before: ("cut", "truncated", "slow 1")[row % 3] if before == 0 else "ok") as planned:
        _, ledger = _spend(planned, tmp_path / "lost.sqlite", range(6), budget, timeout=0.4)
        assert ledger.spent().tokens >= planned.billed == 2 * 6 * each
    with pytest.raises(StepFailed):
        _spend(planned, tmp_path / "gone.sqlite", range(2), budget, retries=0)  # nobody is there any more
    assert Ledger(tmp_path / "gone.sqlite", "a", budget).spent().tokens == 0
