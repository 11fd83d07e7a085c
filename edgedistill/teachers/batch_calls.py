"""Calls of a server's addresses for files and batches, each put again until it is answered or refused."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import IO, Any

import httpx2

from edgedistill.errors import StepFailed, UsageError
from edgedistill.served import Server, error_in, refusal, status_of
from edgedistill.teachers.requests import AGAIN, FIRST_WAIT, GAVE_UP, LONGEST_WAIT, retry_after

NONE_HERE = (404, 405, 501)


class NoBatches(UsageError):
    """The server has no such address."""


class Refused(StepFailed):
    """The server refuses for good: what was to be created is not there."""


class Calls:
    """Call a server: ``close`` when done."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._client = httpx2.Client(headers=server.headers(), timeout=server.timeout)

    def close(self) -> None:
        """Close the connections. May be called twice."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        into: IO[bytes] | None = None,
        again: Callable[[bool], Any] = lambda unclear: None,
        **more: Any,
    ) -> Any:
        """Call the server until it answers; return the JSON, or write what comes ``into`` a file. Before another try ``again`` may
        know the answer; it is told whether the server may still be at the try before. Raises as `Requests.post`; UsageError for an
        address that the server does not have.
        """
        url, why, tries, unclear = self.server.url + path, "", self.server.retries + 1, False
        for attempt in range(tries):
            if attempt and (known := again(unclear)) is not None:
                return known
            wait: float | None = None
            unclear = True
            try:
                with self._client.stream(method, url, **more) as response:
                    if response.status_code == 200 and into is not None:
                        into.seek(0)
                        into.truncate()
                        for part in response.iter_bytes():
                            into.write(part)
                        return None
                    response.read()
                status = response.status_code
                if status in (200, 201):
                    reply = dict(response.json())
                    if (error := error_in(reply)) is None:
                        return reply
                    status = status_of(error)
                why = refusal(self.server, response)
                if status in NONE_HERE:
                    raise NoBatches(
                        f"teacher.batch: {self.server.url} has no batches ({status} at {path})",
                        "take teacher.batch out: requests are put one by one",
                    )
                if status not in AGAIN and status < 500:
                    raise Refused(f"{url}: {why}", "mend the recipe and build again")
                unclear = status in GAVE_UP
                wait = retry_after(response.headers.get("Retry-After"))
            except httpx2.RequestError as error:
                unclear = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                why = f"{type(error).__name__} {self.server.hide(str(error))}".strip()
            except (ValueError, TypeError):
                why = "an answer that is no JSON"
            if attempt + 1 < tries:
                backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                time.sleep(max(backoff, wait or 0.0))
        raise StepFailed(
            f"{url}: {why}" + (f", {tries} times" if tries > 1 else ""),
            "batches go on at the server: see to it and build again, or raise teacher.retries",
        )

    def id_of(self, reply: Any, path: str) -> str:
        """Return the id of what a reply tells of. Raises StepFailed."""
        try:
            return str(reply["id"])
        except (KeyError, TypeError) as error:
            raise self.other(path, error) from None

    def other(self, path: str, error: Exception) -> StepFailed:
        """Return what is said of a reply of another form."""
        return StepFailed(
            f"{self.server.url + path}: an answer of another form than OpenAI's ({type(error).__name__}: {error})",
            "take teacher.batch out: requests are put one by one",
        )
