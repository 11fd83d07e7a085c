"""Requests to one server: some at a time, each put again until it is answered or refused.

A busy, broken or absent server is waited for: 408, 409, 425, 429, 5xx, a connection that fails or is cut, an answer that is no
JSON. The wait is what ``Retry-After`` says, else doubles from half a second to a minute, with jitter, so that requests which failed
together do not come back together. Other refusals are final: another try would be refused, too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from edgedistill.errors import StepFailed
from edgedistill.served import Server, refusal

AGAIN = (408, 409, 425, 429)
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 60.0, 600.0  # seconds; the last bounds what a server may ask for

Ask = Callable[[int], None]
Reply = Callable[[int, dict[str, Any]], None]


class Requests:
    """A connection pool to one server, with an event loop of its own: ``close`` when done."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._runner = asyncio.Runner()
        self._client = httpx2.AsyncClient(
            headers=server.headers(),
            timeout=server.timeout,
            limits=httpx2.Limits(max_connections=server.concurrency, max_keepalive_connections=server.concurrency),
        )

    def close(self) -> None:
        """Close the connections. May be called twice."""
        if not self._client.is_closed:
            self._runner.run(self._client.aclose())
        self._runner.close()

    def post(
        self, path: str, bodies: Sequence[dict[str, Any]], on_reply: Reply, *, on_ask: Ask = lambda at: None
    ) -> None:
        """Post all bodies; ``on_ask`` gets the index of each before it is sent, ``on_reply`` (index, JSON) as it arrives.

        Raises StepFailed where one is refused, or fails too often: no further one is sent, those in flight still arrive.
        """
        self._runner.run(self._all(path, bodies, on_reply, on_ask))

    async def _all(self, path: str, bodies: Sequence[dict[str, Any]], on_reply: Reply, on_ask: Ask) -> None:
        waiting, failed = iter(enumerate(bodies)), list[StepFailed]()

        async def work() -> None:
            for at, body in waiting:
                on_ask(at)
                try:
                    reply = await self._one(path, body, failed)
                except StepFailed as error:
                    failed.append(error)
                else:
                    on_reply(at, reply)
                if failed:
                    break

        await asyncio.gather(*(work() for _ in range(min(self.server.concurrency, len(bodies)))))
        if failed:
            raise failed[0]

    async def _one(self, path: str, body: dict[str, Any], failed: Sequence[StepFailed]) -> dict[str, Any]:
        url, tries = self.server.url + path, self.server.retries + 1
        for attempt in range(tries):
            wait = None
            try:
                response = await self._client.post(url, json=body)
            except httpx2.RequestError as error:
                why = f"{type(error).__name__} {self.server.hide(str(error))}".strip()
            else:
                if response.status_code == 200:
                    try:
                        return dict(response.json())
                    except (ValueError, TypeError):
                        why = "an answer that is no JSON"
                else:
                    why = refusal(self.server, response)
                    if response.status_code not in AGAIN and response.status_code < 500:
                        raise StepFailed(
                            f"{url}: {why}", "what was answered is stored: mend the recipe and build again"
                        )
                    wait = retry_after(response.headers.get("Retry-After"))
            if failed:  # by another request: nothing is waited for any more
                break
            if attempt + 1 < tries:
                backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff if wait is None else wait)
        raise StepFailed(
            f"{url}: {why}, {tries} times" if tries > 1 else f"{url}: {why}",
            "what was answered is stored: see to the server and build again, or raise teacher.retries",
        )


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
