"""Requests to one teacher, which several servers may serve: some at a time, each put again until it is answered or refused.

A busy, broken or absent server is waited for: 408, 409, 425, 429, 5xx, a connection that fails or is cut, an answer that is no
JSON, and an error of these kinds that has the status of an answer. The wait doubles from half a second to a minute, with jitter, so
that requests which failed together do not come back together, and is at least what ``Retry-After`` says. Other refusals are final:
another try would be refused, too. Each try goes to the server that has least to do and is not waited for.

What a try can cost at most is taken out of the budget before it is sent (``spending.py``). A refusal costs nothing; an answer what
it says; of one that was cut or too slow nobody knows, so it has cost the most. Where the budget has too little for another
request, those under way are waited for: what they did not need may be enough.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx2

from edgedistill.errors import StepFailed
from edgedistill.served import Server, error_in, refusal, status_of
from edgedistill.spending import Ledger, Use, most, used

AGAIN = (408, 409, 425, 429)
GAVE_UP = (408, 504, 524)
"""A gateway that waits no longer: the model behind it may have answered, and be billed."""
OF_ONE = (400, 413, 422)
"""What is refused is this request, not all."""
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 60.0, 600.0  # seconds; the last bounds what a server may ask for

NOTHING = Use(0, 0)
BYTES = 4
"""Bytes of a usual token, by which servers with rate limits count a request that is on its way."""

Ask = Callable[[int], None]
Reply = Callable[[int, dict[str, Any]], None]


class Requests:
    """A connection pool to a teacher's servers, with an event loop of its own: ``close`` when done. Without a ``ledger`` nothing is
    written down, and no budget holds.
    """

    def __init__(self, server: Server, ledger: Ledger | None = None) -> None:
        self.server, self.ledger = server, ledger
        self._runner = asyncio.Runner()
        self.places = server.concurrency * len(server.urls)
        self._client = httpx2.AsyncClient(
            headers=server.headers(),
            timeout=server.timeout,
            trust_env=not server.own,
            limits=httpx2.Limits(max_connections=self.places, max_keepalive_connections=self.places),
        )
        self._hosts = [Host(url=url, places=asyncio.Semaphore(server.concurrency)) for url in server.urls]
        self._paces = (Pace(server.rate.requests), Pace(server.rate.tokens))
        self._under_way = 0  # tries whose most is taken out of the budget
        self._settled = asyncio.Condition()

    def close(self) -> None:
        """Close the connections. May be called twice."""
        if not self._client.is_closed:
            self._runner.run(self._client.aclose())
        self._runner.close()
        if self.ledger is not None:
            self.ledger.close()

    def post(
        self,
        path: str,
        bodies: Sequence[dict[str, Any]],
        on_reply: Reply,
        *,
        on_ask: Ask = lambda at: None,
        names: Sequence[str] = (),
    ) -> None:
        """Post all bodies; ``on_ask`` gets the index of each before it is sent, ``on_reply`` (index, JSON) as it arrives. ``names``
        are the bodies' in messages.

        Raises StepFailed where one is refused, fails too often, or the budget is spent: no further one is sent, those in flight
        still arrive.
        """
        self._runner.run(self._all(path, bodies, on_reply, on_ask, names))

    async def _all(
        self, path: str, bodies: Sequence[dict[str, Any]], on_reply: Reply, on_ask: Ask, names: Sequence[str]
    ) -> None:
        waiting, failed = iter(enumerate(bodies)), list[StepFailed]()

        async def work() -> None:
            for at, body in waiting:
                try:
                    name = f"row {names[at]!r}: " if names else ""
                    on_reply(at, await self._one(path, body, failed, partial(on_ask, at), name))
                except StepFailed as error:
                    failed.append(error)
                if failed:
                    break

        await asyncio.gather(*(work() for _ in range(min(self.places, len(bodies)))))
        if failed:
            raise failed[0]

    async def _one(
        self, path: str, body: dict[str, Any], failed: Sequence[StepFailed], on_ask: Callable[[], None], name: str
    ) -> dict[str, Any]:
        tries, need, tried, host = self.server.retries + 1, most(body), Tried(), self._hosts[0]
        for attempt in range(tries):
            await self._pace(body, need)
            host, tried = self._host(), Tried()  # until it is known: nobody knows what it cost
            host.busy += 1
            try:
                async with host.places:
                    await self._reserve(need, failed)
                    try:
                        if attempt == 0:
                            on_ask()
                        tried = await self._try(host.url + path, body)
                    finally:
                        await self._settle(need, tried.cost)
            finally:
                host.busy -= 1
            if tried.reply is not None:
                return tried.reply
            if tried.final:
                raise StepFailed(
                    f"{name if tried.of_one else ''}{host.url + path}: {tried.why}",
                    "what was answered is stored: mend the recipe and build again",
                )
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
            pause = max(backoff, tried.wait or 0.0)  # a Retry-After of 0 would use up all tries at once
            host.rests = max(host.rests, time.monotonic() + pause)
            if failed:  # another request, for good: nothing is waited for any more
                break
            if attempt + 1 < tries and not any(one.rests <= time.monotonic() for one in self._hosts if one is not host):
                await asyncio.sleep(pause)
        raise StepFailed(
            f"{host.url + path}: {tried.why}" + (f", {tries} times" if tries > 1 else ""),
            "what was answered is stored: see to the server and build again, or raise teacher.retries",
        )

    async def _try(self, url: str, body: dict[str, Any]) -> Tried:
        try:
            response = await self._client.post(url, json=body)
        except httpx2.RequestError as error:
            never_sent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            why = f"{type(error).__name__} {self.server.hide(str(error))}".strip()
            return Tried(why=why, cost=NOTHING if never_sent else None)
        if response.status_code == 200:
            try:
                reply = dict(response.json())
            except (ValueError, TypeError):
                return Tried(why="an answer that is no JSON")
            error = error_in(reply)
            if error is None:
                return Tried(reply=reply, cost=used(reply))
            status, cost = status_of(error), used(reply)
        else:
            status, cost = response.status_code, None
        return Tried(
            why=refusal(self.server, response),
            cost=cost or (None if status in GAVE_UP else NOTHING),
            wait=retry_after(response.headers.get("Retry-After")),
            final=status not in AGAIN and status < 500,
            of_one=status in OF_ONE,
        )

    def _host(self) -> Host:
        """Return the server to ask: of those that are not waited for the one with the fewest requests."""
        now = time.monotonic()
        return min(self._hosts, key=lambda host: (host.rests > now, host.busy))

    async def _reserve(self, need: Use, failed: Sequence[StepFailed]) -> None:
        if self.ledger is None:
            return
        async with self._settled:
            while not self.ledger.reserve(need):
                if failed:
                    raise failed[0]
                if not self._under_way:
                    raise StepFailed(
                        self.ledger.over(need),
                        "what was answered is stored: raise teacher.budget and build again, or take fewer prompts",
                    )
                await self._settled.wait()
            self._under_way += 1

    async def _settle(self, need: Use, cost: Use | None) -> None:
        if self.ledger is None:
            return
        async with self._settled:
            self._under_way -= 1
            if cost is not None:
                self.ledger.settle(need, cost)
            self._settled.notify_all()

    async def _pace(self, body: dict[str, Any], need: Use) -> None:
        """Wait until the rate limits let another request through."""
        tokens = need.completion + (need.prompt // BYTES if "messages" in body else need.prompt)
        now = time.monotonic()
        wait = max(pace.take(amount, now) for pace, amount in zip(self._paces, (1, tokens), strict=True))
        if wait > 0:
            await asyncio.sleep(wait)


@dataclass(kw_only=True)
class Host:
    """One server: its places for requests, how many have or want one, and until when (``time.monotonic``) it is left alone."""

    url: str
    places: asyncio.Semaphore
    busy: int = 0
    rests: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What came of a try. ``cost`` None: nobody knows; ``final``: another try would end the same; ``of_one``: others may not."""

    reply: dict[str, Any] | None = None
    why: str = ""
    cost: Use | None = None
    wait: float | None = None
    final: bool = False
    of_one: bool = False


class Pace:
    """Space out what is sent, so that no minute has more than ``limit`` (None: as much as there is)."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.free = limit, 0.0

    def take(self, amount: float, now: float) -> float:
        """Return the seconds to wait before so much is sent, which takes the time until the next."""
        if self.limit is None:
            return 0.0
        start = max(now, self.free)
        self.free = start + 60.0 * amount / self.limit
        return start - now


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or a date, RFC 9110 10.2.3); None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return min(max(0.0, seconds), LONGEST_ASKED) if seconds == seconds else None
