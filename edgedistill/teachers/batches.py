"""Requests in batches (OpenAI's Batch API, https://platform.openai.com/docs/guides/batch): a file of them goes up, the server works
it off when it has time, a file of answers comes down.

Nothing is sent twice where that can be known. A batch is written down before it is sent (``batch_book.py``) and bears a name of
ours at the server: of one that was created by a build which died before it read the answer, the server's list tells. A batch whose
creation is not in that list was never created, and costs nothing. What another build that lives has asked is waited for: its
answers come into the row store. The server gets another chance at what it left unanswered, in another batch; what it refused is put
again by ordinary requests, which wait for a server that is busy and say why one is refused.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from edgedistill.errors import StepFailed
from edgedistill.served import Server, error_in
from edgedistill.spending import Use, most, used
from edgedistill.teachers.batch_book import OTHERS_S, Batch, Book, total
from edgedistill.teachers.batch_calls import Calls, NoBatches, Refused
from edgedistill.teachers.requests import Ask

MOST_BYTES = 200_000_000
"""OpenAI's bound on the file of a batch."""
TAG = "edgedistill"
"""The key of a batch's metadata that has our name for it."""
ENDED = ("completed", "failed", "expired", "cancelled")
UNTRIED = ("batch_expired", "batch_cancelled")
"""Errors of requests that a batch did not come to before it ended (OpenAI has a third, of those that took too long)."""
FULL = "token_limit_exceeded"
"""Why OpenAI fails a batch where too many tokens are queued already: it may be sent again when another has ended."""
STORED_AT_ONCE = 500
CREATING_S = 10.0
"""Seconds that the creation of a batch may take to come into the server's list after whoever asked for it is gone."""
RECENT_S = 300.0
"""Seconds after the last sign of life of whoever asked in which its creation may still be under way."""

NOTHING = Use(0, 0)
Replies = Callable[[list[tuple[int, dict[str, Any]]]], list[int]]
"""Takes (index of the request, JSON) of some answers; returns the indices of those that it cannot read."""
Singly = Callable[[list[int]], None]
"""Takes the indices of requests that are to be put one by one, and puts them."""
Others = Callable[[list[tuple[str, dict[str, Any]]]], None]
"""Takes (name of the request, JSON) of answers to what was asked before, and not now: they are paid for, too."""
Count = Callable[[int, str], None]


@dataclass(kw_only=True)
class _Work:
    """What is still to do, by the names of requests: those that are in no batch, batches under way (with how many requests of each
    are done), those that other builds ask (and who), and those to be put one by one. ``left``: batches, by their tags, of which the
    server tells us nothing; ``full``: the server takes no further batch before one ends.
    """

    index: Mapping[str, int]
    waiting: dict[str, None]
    open: list[Batch] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    singly: list[int] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    arrived: int = 0
    full: bool = False


class Batches:
    """Put requests to a server in batches: ``close`` when done."""

    def __init__(self, server: Server, book: Book, *, note: Callable[[str], None]) -> None:
        assert server.batch is not None
        self.server, self.book, self.note, self.how = server, book, note, server.batch
        self._calls = Calls(server)

    def close(self) -> None:
        """Close the connections; batches go on. May be called twice."""
        self._calls.close()
        self.book.close()

    def post(
        self,
        path: str,
        names: Sequence[str],
        bodies: Sequence[Mapping[str, Any]],
        on_replies: Replies,
        singly: Singly,
        *,
        on_ask: Ask = lambda at: None,
        on_others: Others = lambda found: None,
        on_count: Count = lambda done, text: None,
    ) -> None:
        """Post all bodies, each by its name, and wait for the answers: ``on_ask`` gets the index of each before its batch is
        created, ``on_replies`` the answers of a batch once it has ended, ``on_others`` what a batch of another build brings
        beside them, ``on_count`` how many are done at the server. What a batch failed at ``singly`` puts one by one. What another
        build asks meanwhile is waited for, and not given to anybody here: it is in the row store.

        Raises UsageError where the server takes no batches; StepFailed where one is refused, cancelled, or brings nothing, and
        where the budget is spent.
        """
        work = _Work(index={name: at for at, name in enumerate(names)}, waiting=dict.fromkeys(names))
        with self.book.at_work():
            try:
                self._settle()
                while work.waiting or work.open or work.held or work.singly:
                    fits = self._send_all(path, bodies, work, on_ask)
                    if work.singly and not work.open:  # others may wait for them: so before we wait for others
                        singly(sorted(work.singly))
                        work.arrived += len(work.singly)
                        work.singly = []
                        self.book.put()
                    elif work.open or work.held:
                        if (ended := self._wait(work, on_count)) is not None:
                            work.open.remove(ended[0])
                            self._end(*ended, work, on_replies, on_others)
                    elif not fits:
                        raise StepFailed(
                            self.book.over(most(bodies[work.index[next(iter(work.waiting))]])),
                            "what was answered is stored: raise teacher.budget and build again, or take fewer prompts",
                        )
            except KeyboardInterrupt:
                if work.open:
                    running = ", ".join(batch.id for batch in work.open)
                    self.note(f"{running} at {self.server.url}: not cancelled, the next build waits for the answers")
                raise

    # ── what others ask ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self) -> None:
        """Write down what batches did cost whose questions are all answered, for builds that died before they could do so."""
        for one in self.book.unsettled(self.server.url):
            if (batch := self._found(one, set())) is None:
                continue
            told = self._told(batch)
            if told.get("status") == "failed":
                self.book.end(batch, NOTHING)
            elif told.get("status") in (*ENDED, "gone"):
                self._end(batch, told, _Work(index={}, waiting={}), lambda replies: [], lambda found: None)
            else:
                self.book.leave(batch)

    def _look(self, work: _Work, names: Collection[str]) -> dict[str, str]:
        """Look which of the names are in batches under way: what nobody is at is taken over, the rest is waited for. Return that,
        with who asks it.
        """
        found, held = self.book.look(self.server.url, names, work.left)
        for batch in found:
            if (known := self._found(batch, work.left)) is not None:
                work.open.append(known)
                self.note(
                    f"{known.id} with {len(known.uses):,} requests is under way since an earlier build: waiting for it"
                )
                for name in known.uses:
                    work.waiting.pop(name, None)
                    work.held.pop(name, None)
        for who, count in Counter(who for name, who in held.items() if name not in work.held).items():
            self.note(f"{who} asks {count:,} of the questions: waiting for its answers")
        for name, who in held.items():
            work.waiting.pop(name, None)
            work.held[name] = who
        return held

    def _freed(self, work: _Work) -> bool:
        """Tell whether other builds are done with something that was waited for: it is answered, or to be asked here, or a batch of
        theirs is ours now.
        """
        under_way = len(work.open)
        held = self._look(work, list(work.held))
        free = [name for name in work.held if name not in held]
        answered = self.book.answered(free)
        work.arrived += len(answered)
        for name in free:
            del work.held[name]
            if name not in answered:
                work.waiting[name] = None
        return bool(free) or len(work.open) > under_way

    # ── sending ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_all(self, path: str, bodies: Sequence[Mapping[str, Any]], work: _Work, on_ask: Ask) -> bool:
        """Put what waits into batches, as far as server and budget have room; False where the budget has none for one request."""
        while work.waiting and not work.full:
            self._look(work, work.waiting)
            if not work.waiting:
                break
            batch = self._send(path, bodies, work, on_ask)
            if batch is None:
                return False
            if batch.id:
                work.open.append(batch)
        return True

    def _send(self, path: str, bodies: Sequence[Mapping[str, Any]], work: _Work, on_ask: Ask) -> Batch | None:
        """Put the first of what waits into a batch; None where the budget has no room for one request. A batch without an id was
        not sent: others were faster.
        """
        first = list(islice(work.waiting, self.how.requests))
        answered = self.book.answered(first)
        work.arrived += len(answered)
        lines, size = dict[str, bytes](), 0
        for name in first:
            if name in answered:
                del work.waiting[name]
                continue
            body = bodies[work.index[name]]
            raw = json.dumps({"custom_id": name, "method": "POST", "url": f"/v1{path}", "body": body}).encode() + b"\n"
            if lines and size + len(raw) > MOST_BYTES:
                break
            lines[name], size = raw, size + len(raw)
        batch = self.book.open(self.server.url, {name: most(bodies[work.index[name]]) for name in lines}, work.left)
        if batch is None or not batch.uses:
            return batch
        try:
            batch = self.book.name(batch, file=self._upload(batch, b"".join(lines[name] for name in batch.uses)))
            for name in batch.uses:
                on_ask(work.index[name])
            if not self.book.ours(batch):
                return batch
            batch = self._create(batch, path)
        except (NoBatches, Refused):  # so nothing was asked
            self.book.end(batch, None)
            raise
        for name in batch.uses:
            del work.waiting[name]
        self.note(f"{batch.id} is under way with {len(batch.uses):,} requests; a stopped build leaves it running")
        return batch

    def _upload(self, batch: Batch, raw: bytes) -> str:
        """Send the file of a batch; return what the server calls it. One that is sent twice costs nothing."""
        parts = {
            "files": {"file": (f"{TAG}-{batch.tag}.jsonl", raw, "application/jsonl")},
            "data": {"purpose": "batch"},
        }
        return self._calls.id_of(self._calls.call("POST", "/files", **parts), "/files")

    def _create(self, batch: Batch, path: str) -> Batch:
        """Create a batch of an uploaded file. Before another try the server's list tells whether the one before did it."""
        body = {
            "input_file_id": batch.file,
            "endpoint": f"/v1{path}",
            "completion_window": self.how.window,
            "metadata": {TAG: batch.tag},
        }

        reply = self._calls.call("POST", "/batches", json=body, again=lambda unclear: self._created(batch, unclear))
        found = reply if isinstance(reply, Batch) else replace(batch, id=self._calls.id_of(reply, "/batches"))
        return self.book.name(batch, file=batch.file, id=found.id)

    def _found(self, batch: Batch, left: set[str]) -> Batch | None:
        """Return a batch that another build began if the server has it, else None: then it has cost nothing. What the server does
        not tell us of another recipe's batch, whose key may be another, says nothing: it is ``left`` to that recipe.
        """
        own = batch.account == self.book.account
        if not batch.id:
            found = self._created(batch, time.time() - batch.heard < RECENT_S) if batch.file else None
            if found is None and batch.file and not own:
                left.add(batch.tag)
                self.book.leave(batch)
                return None
            if found is None:
                self.book.end(batch, None)
                return None
            batch = self.book.name(batch, file=batch.file, id=found.id)
        elif not own:
            try:
                gone = self._told(batch).get("status") == "gone"
            except Refused:  # with our key
                gone = True
            if gone:
                left.add(batch.tag)
                self.book.leave(batch)
                return None
        return batch

    def _created(self, batch: Batch, unclear: bool) -> Batch | None:
        """Look a batch up in the server's list: for some time where the server may still be at its creation, which whoever asked
        for it did not wait for.
        """
        until = time.monotonic() + CREATING_S * unclear
        while (found := self._listed(batch)) is None and time.monotonic() < until:
            time.sleep(min(self.how.poll, OTHERS_S))
        return found

    def _listed(self, batch: Batch) -> Batch | None:
        """Look a batch up in the server's list by our name for it, or by its file."""
        after = ""
        while True:
            try:
                reply = self._calls.call(
                    "GET", "/batches", params={"limit": 100, **({"after": after} if after else {})}
                )
            except NoBatches:  # it shows no list
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
                raise self._calls.other("/batches", error) from None

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, work: _Work, on_count: Count) -> tuple[Batch, dict[str, Any]] | None:
        """Return the first batch that ends, with what the server says of it; None as soon as another build is done with something
        that was waited for.
        """
        look = 0.0
        while True:
            if time.monotonic() >= look:
                for batch in work.open:
                    told = self._told(batch)
                    if told.get("status") in (*ENDED, "gone"):
                        return batch, told
                    work.done[batch.id] = int((told.get("request_counts") or {}).get("completed") or 0)
                look = time.monotonic() + self.how.poll
                under_way = sum(work.done.get(batch.id, 0) for batch in work.open)
                text = f"answers, {len(work.open)} batch{'es' * (len(work.open) > 1)}" if work.open else "answers"
                held = f", {len(work.held):,} asked by another build" if work.held else ""
                on_count(work.arrived + under_way, text + held)
            if work.held and self._freed(work):
                work.full = False
                return None
            wait = max(0.0, look - time.monotonic())
            time.sleep(min(wait, OTHERS_S) if work.held else wait)

    def _told(self, batch: Batch) -> dict[str, Any]:
        """Return what the server says of a batch; "gone" where neither it nor the list of its batches knows that one."""
        try:
            return self._calls.call("GET", f"/batches/{batch.id}")
        except NoBatches:
            if self._listed(batch) is None:
                return {"status": "gone"}
            return {}

    def _end(
        self,
        batch: Batch,
        told: Mapping[str, Any],
        work: _Work,
        on_replies: Replies,
        on_others: Others,
    ) -> None:
        """Take in what a batch brought, and settle what it cost."""
        work.full = False
        status, own = told["status"], {name: work.index[name] for name in batch.uses if name in work.index}
        if status == "gone":  # what it did cost, nobody knows
            self.book.end(batch, batch.most)
            self.note(f"{batch.id}: {self.server.url} has no such batch any more; its requests are put again")
            work.waiting.update(dict.fromkeys(own))
            return
        if status == "failed":
            self.book.end(batch, NOTHING)
            errors = (told.get("errors") or {}).get("data") or [{}]
            if errors[0].get("code") == FULL and (work.open or work.held):
                work.waiting.update(dict.fromkeys(own))
                work.full = True
                return
            said = self.server.hide(str(errors[0].get("message") or "it does not say why"))
            raise StepFailed(
                f"{self.server.url}: {batch.id} failed: {said}",
                "fewer requests in a batch: teacher.batch.requests"
                if errors[0].get("code") == FULL
                else "mend [teacher]",
            )
        costs, chunk, nothing = dict[str, Use](), list[tuple[int, dict[str, Any]]](), True
        others, names, before = list[tuple[str, dict[str, Any]]](), list(work.index), len(work.singly)

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
            elif reply is not None and name not in work.index:
                others.append((name, reply))
            if len(chunk) + len(others) == STORED_AT_ONCE:
                store()
        store()
        # of what no line tells, nobody knows what it cost
        cost = total(costs.get(name, use) for name, use in batch.uses.items())
        self.book.end(batch, cost, [names[at] for at in work.singly[before:]])
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
        work.waiting.update(dict.fromkeys(own))

    def _lines(self, told: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, bool]]:
        """Yield of each line of a batch's files: the name of the request, the answer or None, and whether it was tried at all."""
        for key in ("output_file_id", "error_file_id"):
            if not told.get(key):
                continue
            with tempfile.TemporaryFile() as file:
                try:
                    self._calls.call("GET", f"/files/{told[key]}/content", into=file)
                except NoBatches:
                    self.note(f"{self.server.url} has the file {told[key]} no more: what stood in it is lost")
                    continue
                file.seek(0)
                for raw in file:
                    try:
                        line: dict[str, Any] = json.loads(raw)
                        name, reply = str(line["custom_id"]), line.get("response") or {}
                        body: Any = reply.get("body")
                        good = reply.get("status_code") == 200 and isinstance(body, dict) and error_in(body) is None
                        untried = (line.get("error") or {}).get("code") in UNTRIED
                    except (ValueError, KeyError, TypeError, AttributeError):
                        continue  # it tells of no request
                    yield name, body if good else None, not untried
