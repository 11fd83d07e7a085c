"""Requests in batches (OpenAI's Batch API, https://platform.openai.com/docs/guides/batch): a file of them goes up, the server works
it off when it has time, a file of answers comes down.

Nothing is sent twice where that can be known. A batch is written down before it is sent (``batch_book.py``) and bears a name of
ours at the server: of one that was created by a build which died before it read the answer, the server's list tells. A batch whose
creation is not in that list was never created, and costs nothing. The server gets another chance at what it left unanswered, in
another batch; what it refused is put again by ordinary requests, which wait for a server that is busy and say why one is refused.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import httpx2

from edgedistill.errors import StepFailed, UsageError
from edgedistill.served import Server, refusal
from edgedistill.spending import Use, most, used
from edgedistill.teachers.batch_book import Batch, Book, total
from edgedistill.teachers.requests import AGAIN, FIRST_WAIT, LONGEST_WAIT, Ask, retry_after

MOST_BYTES = 200_000_000
"""OpenAI's bound on the file of a batch."""
TAG = "edgedistill"
"""The key of a batch's metadata that has our name for it."""
ENDED = ("completed", "failed", "expired", "cancelled")
UNTRIED = ("batch_expired", "batch_cancelled")
"""Errors of requests that a batch did not come to before it ended (OpenAI has a third, of those that took too long)."""
FULL = "token_limit_exceeded"
"""Why OpenAI fails a batch where too many tokens are queued already: it may be sent again when another has ended."""
NONE_HERE = (404, 405, 501)
STORED_AT_ONCE = 500

NOTHING = Use(0, 0)
Replies = Callable[[list[tuple[int, dict[str, Any]]]], list[int]]
"""Takes (index of the request, JSON) of some answers; returns the indices of those that it cannot read."""
Others = Callable[[list[tuple[str, dict[str, Any]]]], None]
"""Takes (name of the request, JSON) of answers to what was asked before, and not now: they are paid for, too."""
Count = Callable[[int, str], None]


@dataclass(kw_only=True)
class _Work:
    """What is still to do: requests that are in no batch, batches under way (with how many requests of each are done), and requests
    to be put one by one. ``full``: the server takes no further batch before one ends.
    """

    waiting: dict[int, None]
    open: list[Batch]
    done: dict[str, int] = field(default_factory=dict)
    singly: list[int] = field(default_factory=list)
    arrived: int = 0
    full: bool = False


class _NoBatches(UsageError):
    """The server has no such address."""


class _Refused(StepFailed):
    """The server refuses for good: what was to be created is not there."""


class Batches:
    """Put requests to a server in batches: ``close`` when done."""

    def __init__(self, server: Server, book: Book, *, note: Callable[[str], None]) -> None:
        assert server.batch is not None
        self.server, self.book, self.note, self.how = server, book, note, server.batch
        self._client = httpx2.Client(headers=server.headers(), timeout=server.timeout)

    def close(self) -> None:
        """Close the connections; batches go on. May be called twice."""
        self._client.close()
        self.book.close()

    def post(
        self,
        path: str,
        names: Sequence[str],
        bodies: Sequence[Mapping[str, Any]],
        on_replies: Replies,
        *,
        on_ask: Ask = lambda at: None,
        on_others: Others = lambda found: None,
        on_count: Count = lambda done, text: None,
    ) -> list[int]:
        """Post all bodies, each by its name, and wait for the answers: ``on_ask`` gets the index of each before its batch is
        created, ``on_replies`` the answers of a batch once it has ended, ``on_others`` what a batch of an earlier build brings
        beside them, ``on_count`` how many are done at the server.

        Returns the indices of those that are to be put one by one. Raises UsageError where the server takes no batches; StepFailed
        where one is refused, cancelled, or brings nothing, and where the budget is spent.
        """
        index = {name: at for at, name in enumerate(names)}
        work = _Work(waiting=dict.fromkeys(range(len(names))), open=[])
        try:
            for batch in self.book.under_way(self.server.url):
                if any(name in index for name in batch.uses) and (found := self._found(batch)) is not None:
                    work.open.append(found)
                    for name in found.uses.keys() & index.keys():
                        work.waiting.pop(index[name], None)
            while work.waiting or work.open:
                while work.waiting and not work.full and (sent := self._send(path, names, bodies, work, on_ask)):
                    work.open.append(sent)
                if not work.open:
                    at = next(iter(work.waiting))
                    raise StepFailed(
                        self.book.over(most(bodies[at])),
                        "what was answered is stored: raise teacher.budget and build again, or take fewer prompts",
                    )
                batch, told = self._wait(work, on_count)
                work.open.remove(batch)
                self._end(batch, told, index, work, on_replies, on_others)
        except KeyboardInterrupt:
            if work.open:
                running = ", ".join(batch.id for batch in work.open)
                self.note(f"{running} at {self.server.url}: not cancelled, the next build waits for the answers")
            raise
        return sorted(work.singly)

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send(
        self,
        path: str,
        names: Sequence[str],
        bodies: Sequence[Mapping[str, Any]],
        work: _Work,
        on_ask: Ask,
    ) -> Batch | None:
        """Put the first of what waits into a batch; None where the budget has no room for one request."""
        index, lines, size = dict[str, int](), dict[str, bytes](), 0
        for at in work.waiting:
            line = {"custom_id": names[at], "method": "POST", "url": f"/v1{path}", "body": bodies[at]}
            raw = json.dumps(line).encode() + b"\n"
            if lines and (size + len(raw) > MOST_BYTES or len(lines) == self.how.requests):
                break
            index[names[at]], lines[names[at]], size = at, raw, size + len(raw)
        batch = self.book.open(self.server.url, {name: most(bodies[at]) for name, at in index.items()})
        if batch is None:
            return None
        try:
            batch = self.book.name(batch, file=self._upload(batch, b"".join(lines[name] for name in batch.uses)))
            for name in batch.uses:
                on_ask(index[name])
            batch = self._create(batch, path)
        except (_NoBatches, _Refused):  # so nothing was asked
            self.book.end(batch, None)
            raise
        for name in batch.uses:
            del work.waiting[index[name]]
        self.note(f"{batch.id} is under way with {len(batch.uses):,} requests; a stopped build leaves it running")
        return batch

    def _upload(self, batch: Batch, raw: bytes) -> str:
        """Send the file of a batch; return what the server calls it. One that is sent twice costs nothing."""
        parts = {
            "files": {"file": (f"{TAG}-{batch.tag}.jsonl", raw, "application/jsonl")},
            "data": {"purpose": "batch"},
        }
        return self._id(self._call("POST", "/files", **parts), "/files")

    def _create(self, batch: Batch, path: str) -> Batch:
        """Create a batch of an uploaded file. Before another try the server's list tells whether the one before did it."""
        body = {
            "input_file_id": batch.file,
            "endpoint": f"/v1{path}",
            "completion_window": self.how.window,
            "metadata": {TAG: batch.tag},
        }

        reply = self._call("POST", "/batches", json=body, again=lambda: self._listed(batch))
        found = reply if isinstance(reply, Batch) else replace(batch, id=self._id(reply, "/batches"))
        return self.book.name(batch, file=batch.file, id=found.id)

    def _found(self, batch: Batch) -> Batch | None:
        """Return a batch that an earlier build began if the server has it, else None: then it has cost nothing."""
        if not batch.id:
            found = self._listed(batch) if batch.file else None
            if found is None:
                self.book.end(batch, None)
                return None
            batch = self.book.name(batch, file=batch.file, id=found.id)
        self.note(f"{batch.id} with {len(batch.uses):,} requests is under way since an earlier build: waiting for it")
        return batch

    def _listed(self, batch: Batch) -> Batch | None:
        """Look a batch up in the server's list by our name for it, or by its file."""
        after = ""
        while True:
            try:
                reply = self._call("GET", "/batches", params={"limit": 100, **({"after": after} if after else {})})
            except _NoBatches:  # it shows no list
                return None
            try:
                page = reply["data"]
                for one in page:
                    if (one.get("metadata") or {}).get(TAG) == batch.tag or one.get("input_file_id") == batch.file:
                        return replace(batch, id=str(one["id"]))
                if not page or not reply.get("has_more"):
                    return None
                after = str(page[-1]["id"])
            except (KeyError, TypeError, AttributeError) as error:
                raise self._other("/batches", error) from None

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, work: _Work, on_count: Count) -> tuple[Batch, dict[str, Any]]:
        """Return the first batch that ends, with what the server says of it."""
        while True:
            for batch in work.open:
                told = self._told(batch)
                if told.get("status") in (*ENDED, "gone"):
                    return batch, told
                work.done[batch.id] = int((told.get("request_counts") or {}).get("completed") or 0)
            under_way = sum(work.done.get(batch.id, 0) for batch in work.open)
            on_count(work.arrived + under_way, f"answers, {len(work.open)} batch{'es' * (len(work.open) > 1)}")
            time.sleep(self.how.poll)

    def _told(self, batch: Batch) -> dict[str, Any]:
        """Return what the server says of a batch; "gone" where neither it nor the list of its batches knows that one."""
        try:
            return self._call("GET", f"/batches/{batch.id}")
        except _NoBatches:
            if self._listed(batch) is None:
                return {"status": "gone"}
            return {}

    def _end(
        self,
        batch: Batch,
        told: Mapping[str, Any],
        index: Mapping[str, int],
        work: _Work,
        on_replies: Replies,
        on_others: Others,
    ) -> None:
        """Take in what a batch brought, and settle what it cost."""
        status, own = told["status"], {name: index[name] for name in batch.uses if name in index}
        if status == "gone":  # what it did cost, nobody knows
            self.book.end(batch, batch.most)
            self.note(f"{batch.id}: {self.server.url} has no such batch any more; its requests are put again")
            work.waiting.update(dict.fromkeys(own.values()))
            return
        if status == "failed":
            self.book.end(batch, NOTHING)
            errors = (told.get("errors") or {}).get("data") or [{}]
            if errors[0].get("code") == FULL and work.open:
                work.waiting.update(dict.fromkeys(own.values()))
                work.full = True
                return
            said = self.server.hide(str(errors[0].get("message") or "it does not say why"))
            raise StepFailed(
                f"{self.server.url}: {batch.id} failed: {said}",
                "fewer requests in a batch: teacher.batch.requests"
                if errors[0].get("code") == FULL
                else "mend [teacher]",
            )
        work.full = False
        costs, chunk, nothing = dict[str, Use](), list[tuple[int, dict[str, Any]]](), True
        others = list[tuple[str, dict[str, Any]]]()

        def store() -> None:
            work.singly += on_replies(chunk)
            work.arrived += len(chunk)
            on_others(others)
            chunk.clear()
            others.clear()

        for name, reply, asked in self._lines(told):
            if name not in batch.uses:
                continue
            costs[name] = NOTHING if reply is None else used(reply) or batch.uses[name]
            if not asked:
                continue
            nothing = False
            if (at := own.pop(name, None)) is not None and reply is not None:
                chunk.append((at, reply))
            elif at is not None:
                work.singly.append(at)
            elif reply is not None and name not in index:
                others.append((name, reply))
            if len(chunk) + len(others) == STORED_AT_ONCE:
                store()
        store()
        # of what no line tells, nobody knows what it cost
        self.book.end(batch, total(costs.get(name, use) for name, use in batch.uses.items()))
        if status == "cancelled" and own:
            raise StepFailed(
                f"{self.server.url}: {batch.id} was cancelled",
                "what was answered is stored: build again to ask the rest, or take teacher.batch out",
            )
        if own and nothing:
            raise StepFailed(
                f"{self.server.url}: {batch.id} {'has expired' if status == 'expired' else 'ended'} without an answer",
                "build again to put its requests anew, or take teacher.batch out",
            )
        work.waiting.update(dict.fromkeys(own.values()))

    def _lines(self, told: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, bool]]:
        """Yield of each line of a batch's files: the name of the request, the answer or None, and whether it was tried at all."""
        for key in ("output_file_id", "error_file_id"):
            if not told.get(key):
                continue
            with tempfile.TemporaryFile() as file:
                try:
                    self._call("GET", f"/files/{told[key]}/content", into=file)
                except _NoBatches:
                    self.note(f"{self.server.url} has the file {told[key]} no more: what stood in it is lost")
                    continue
                file.seek(0)
                for raw in file:
                    try:
                        line: dict[str, Any] = json.loads(raw)
                        name, reply = str(line["custom_id"]), line.get("response") or {}
                        body: Any = reply.get("body")
                        good = reply.get("status_code") == 200 and isinstance(body, dict)
                        untried = (line.get("error") or {}).get("code") in UNTRIED
                    except (ValueError, KeyError, TypeError, AttributeError):
                        continue  # it tells of no request
                    yield name, body if good else None, not untried

    # ── one call ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(
        self,
        method: str,
        path: str,
        *,
        into: IO[bytes] | None = None,
        again: Callable[[], Any] = lambda: None,
        **more: Any,
    ) -> Any:
        """Call the server until it answers; return the JSON, or write what comes ``into`` a file. Before another try ``again`` may
        know the answer. Raises as `Requests.post`; UsageError for an address that the server does not have.
        """
        url, why, tries = self.server.url + path, "", self.server.retries + 1
        for attempt in range(tries):
            if attempt and (known := again()) is not None:
                return known
            wait: float | None = None
            try:
                with self._client.stream(method, url, **more) as response:
                    if response.status_code == 200 and into is not None:
                        into.seek(0)
                        into.truncate()
                        for part in response.iter_bytes():
                            into.write(part)
                        return None
                    response.read()
                if response.status_code in (200, 201):
                    return dict(response.json())
                why = refusal(self.server, response)
                if response.status_code in NONE_HERE:
                    raise _NoBatches(
                        f"teacher.batch: {self.server.url} has no batches ({response.status_code} at {path})",
                        "take teacher.batch out: requests are put one by one",
                    )
                if response.status_code not in AGAIN and response.status_code < 500:
                    raise _Refused(f"{url}: {why}", "mend the recipe and build again")
                wait = retry_after(response.headers.get("Retry-After"))
            except httpx2.RequestError as error:
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

    def _id(self, reply: Any, path: str) -> str:
        try:
            return str(reply["id"])
        except (KeyError, TypeError) as error:
            raise self._other(path, error) from None

    def _other(self, path: str, error: Exception) -> StepFailed:
        return StepFailed(
            f"{self.server.url + path}: an answer of another form than OpenAI's ({type(error).__name__}: {error})",
            "take teacher.batch out: requests are put one by one",
        )
