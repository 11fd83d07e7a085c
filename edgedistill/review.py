"""Show people answers that the filters kept, one by one, and write down what they say of them.

The answers are those that pass every filter but the people's own, drawn at random. The page (review_page.py) is served to this
machine alone: on 127.0.0.1, under a random token, to requests that name this host (a page elsewhere could otherwise have its own
name lead here), as one document that may load nothing. Verdicts go to the file beside the recipe as they are given.
"""

from __future__ import annotations

import getpass
import json
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import load_rows
from edgedistill.data.thinking import BLOCKS, split
from edgedistill.data.verdicts import (
    VERDICTS,
    Verdict,
    add_verdict,
    read_verdicts,
    remaining,
    sample,
    shown_key,
    told,
)
from edgedistill.errors import UsageError
from edgedistill.evals.metrics import parse_json
from edgedistill.fingerprint import Key
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.review_page import page
from edgedistill.session import prepare, recipe_path
from edgedistill.stages.filter import Filter

MOST = 1 << 20
"""Bytes of a request's body; an edited answer is far under it."""
AS_JSON = ("json-exact", "tool-calls")
"""Metrics of references that are JSON."""


@dataclass(kw_only=True)
class Review:
    """Answers to be judged, and the file of verdicts. ``items`` is what is shown of each (`_item`), ``every`` the keys of all that
    could have been, with their tags.
    """

    name: str
    file: Path
    items: list[dict[str, Any]]
    every: dict[str, str]
    by: str = ""
    drawn: str = "random"
    style: str = "answer"
    as_json: bool = False
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, body: Any) -> dict[str, Any]:
        """Write down one verdict, {"key", "verdict", "text"?, "reason"?, "sure"?}; return what the page shows after it.

        An edit that is no JSON where references are is first warned of, and written down when the page is ``sure``. Raises
        ValueError with what is wrong with the request.
        """
        item = self._asked(body)
        row_id, _, shown = item["key"].rpartition(" ")
        verdict, text, reason = body["verdict"], body.get("text", ""), body.get("reason", "").strip()
        if verdict == "edit" and (warning := self._problem(item, text)) and not body.get("sure"):
            return {"saved": False, "warning": warning}
        one = Verdict(
            id=row_id,
            shown=shown,
            verdict=verdict,
            text=text if verdict == "edit" else "",
            reason="" if verdict == "accept" else reason,
            by=self.by,
            when=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            sample=self.drawn,
        )
        with self._lock:
            add_verdict(self.file, one)
            self.verdicts[one.key] = one
        return {"saved": True, "verdict": one.to_json(), **self.state()}

    def _asked(self, body: Any) -> dict[str, Any]:
        """Return the item that a request is on; raises ValueError where the request is no verdict."""
        if not isinstance(body, dict) or body.get("verdict") not in VERDICTS:
            raise ValueError(f"a verdict is one of {', '.join(VERDICTS)}")
        for name in ("text", "reason"):
            if not isinstance(body.get(name, ""), str):
                raise ValueError(f"{name} is no text")
            body.get(name, "").encode("utf-8")  # half of a surrogate pair is a ValueError, too
        item = next((item for item in self.items if item["key"] == body.get("key")), None)
        if item is None:
            raise ValueError("that answer is not in this sample")
        if body["verdict"] == "edit" and not body.get("text", "").strip():
            raise ValueError("an edited answer needs a text")
        if body["verdict"] == "edit" and body["text"] == item["text"]:
            raise ValueError("the text is as it was: accept it instead")
        return item

    def _problem(self, item: dict[str, Any], text: str) -> str:
        """Say what may be wrong with an edited answer; "" where nothing is."""
        answer = split(text).answer if self.style in BLOCKS else text
        if not answer.strip():
            return "Nothing but the block is left of the answer."
        if self.style in BLOCKS and split(item["text"]).thinking is not None and split(text).thinking is None:
            return f"The block {' … '.join(BLOCKS[self.style])} is gone."
        if self.as_json and not parse_json(answer)[0]:
            return "This is not JSON."
        return ""

    def state(self) -> dict[str, Any]:
        """Return how far the sample is judged, and what that says of the others."""
        return {"done": self.done, "told": told(self.found())}

    @property
    def done(self) -> int:
        """Return how many of the sample are judged."""
        return sum(item["key"] in self.verdicts for item in self.items)

    def found(self) -> dict[str, Any]:
        """Return what the verdicts say (`remaining`) of all answers that could have been shown."""
        return remaining([(key, tag, True) for key, tag in self.every.items()], self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return the summary of a session."""
        stale = len(self.verdicts.keys() - self.every.keys())
        return {"file": str(self.file), "shown": len(self.items), "done": self.done, "stale": stale, **self.found()}

    def document(self, base: str, nonce: str) -> str:
        """Return the page; ``base`` is the path that its requests begin with."""
        verdicts = [self.verdicts.get(item["key"]) for item in self.items]
        items = [{**item, "verdict": one and one.to_json()} for item, one in zip(self.items, verdicts, strict=True)]
        data = {"base": base, "by": self.by, "file": self.file.name, "items": items, **self.state()}
        return page(self.name, data, nonce)


def open_review(
    given: Path,
    *,
    count: int = 50,
    by: str | None = None,
    by_tag: bool = False,
    overrides: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Review:
    """Draw the sample of a recipe whose teacher has answered. Raises UsageError where it has not."""
    path = recipe_path(given)
    recipe = load_recipe(path, overrides)
    others = [one.model_dump(mode="json", exclude_unset=True) for one in recipe.filter if one.kind != "review"]
    session = prepare(path, overrides={**(overrides or {}), "filter": others}, note=note)
    (step,) = session.plan.match("filter")[:1]
    stage, file = step.stage, review_file(recipe, path)
    assert isinstance(stage, Filter)
    entries = {key: session.store.load(key) for key in stage.inputs()}
    if None in entries.values():
        first = f"touch {file} && " if len(others) < len(recipe.filter) and not file.is_file() else ""
        raise UsageError("nothing is filtered yet", f"{first}edgedistill build {given} --until filter")

    def place(key: Key, name: str) -> Path:
        entry = entries[key]
        assert entry is not None
        return entry.path / name

    if stage.prompts is not None:
        stage = replace(stage, prompts=None, rows=tuple(load_rows(place(stage.prompts, "prompts.jsonl"))))
    answers, failed = stage.read(place)
    with answers, failed:
        alive = [(one.row, one.alive) for one in stage.sift(answers, place)[1]]
    every = {key: tag for row, found in alive for key, tag in stage.reviewable(row, found).items()}
    drawn = set(order := sample(every, count, recipe.seed, by_tag=by_tag))
    items = {}
    for row, found in alive:
        for answer in found:
            if (key := shown_key(row.id, row.messages, row.tools, answer["text"])) in drawn:
                items[key] = _item(key, row, answer["text"])
    if not items:
        raise UsageError("no answer passed the filters", f"edgedistill data show {given} --rejected")
    return Review(
        name=recipe.name,
        file=file,
        items=[items[key] for key in order],
        every=every,
        by=user() if by is None else by,
        drawn="by-tag" if by_tag else "random",
        style=recipe.generate.style,
        as_json=any(one.kind == "reference" and one.metric in AS_JSON for one in recipe.filter),
        verdicts=read_verdicts(file) if file.is_file() else {},
    )


def review_file(recipe: Recipe, path: Path) -> Path:
    """Return where verdicts go: the file that a filter of the recipe names, else NAME.review.jsonl beside it."""
    named = next((one.file for one in recipe.filter if one.file is not None), None)
    return path.parent / (named or f"{recipe.name}.review.jsonl")


def user() -> str:
    """Return the login name; "" where the machine knows none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _item(key: str, row: Any, text: str) -> dict[str, Any]:
    """Return what is shown of one answer, as plain JSON values."""
    own = split(text)
    return {
        "key": key,
        "id": row.id,
        "tags": list(row.tags),
        "messages": list(row.messages),
        "tools": list(row.tools),
        "reference": row.reference,
        "text": text,
        "answer": own.answer,
        "thinking": own.thinking,
    }


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Server(ThreadingHTTPServer):
    """Serve one review to this machine. ``url`` has the token: who knows it may judge."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, review: Review, port: int = 0) -> None:
        self.review, self.token = review, secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port}: {error}", "edgedistill review RECIPE --port 0 takes a free one") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        """Return the page's address."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that was closed while it was answered."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    server_version, sys_version = "edgedistill", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the token stands in every path."""

    def do_GET(self) -> None:
        """Serve the page."""
        if (name := self._asked()) is None:
            return
        if name:
            self._answer(404, "no such page")
            return
        nonce = secrets.token_urlsafe(18)
        self._answer(200, self.server.review.document(f"/{self.server.token}", nonce), nonce=nonce)

    def do_POST(self) -> None:
        """Take a verdict, or the end of the session."""
        if (name := self._asked()) is None or (body := self._body()) is None:
            return
        if name == "end":
            self._answer(200, "{}", kind="application/json")
            threading.Thread(target=self.server.shutdown, daemon=True).start()  # it waits for this request
        elif name == "verdict":
            try:
                found = self.server.review.judge(json.loads(body))
            except (ValueError, RecursionError) as error:
                self._answer(400, str(error) or "no JSON")
            except OSError as error:
                self._answer(500, f"{self.server.review.file}: {error.strerror}")
            else:
                self._answer(200, json.dumps(found), kind="application/json")
        else:
            self._answer(404, "no such page")

    def _asked(self) -> str | None:
        """Return what is asked for under the token; None where the request was turned away: of another host, or without it."""
        _, token, *rest = [*self.path.partition("?")[0].split("/", 2), ""]
        known = secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        origin = self.headers.get("Origin")
        if (
            self.headers.get("Host") in self.server.hosts
            and known
            and (origin is None or origin.removeprefix("http://") in self.server.hosts)
        ):
            return rest[0]
        self._answer(403, "take the address that edgedistill review printed")
        return None

    def _body(self) -> bytes | None:
        if self.headers.get_content_type() != "application/json":
            return self._answer(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._answer(411, "send Content-Length")
        if len(length) > 12 or int(length) > MOST:
            self._answer(413, f"a verdict has at most {MOST:,} bytes")
            left = min(int(length[:12]), 16 * MOST)  # who still sends would not read the answer
            while left > 0 and (part := self.rfile.read1(min(left, 1 << 16))):
                left -= len(part)
            return None
        return self.rfile.read(int(length))

    def _answer(self, status: int, text: str, *, kind: str = "", nonce: str = "") -> None:
        """Send an answer that nobody keeps, frames or takes for something else; the page's own script and style have its nonce."""
        data = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind or f"text/{'html' if nonce else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        own = f"; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'" if nonce else ""
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'{own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        for name, value in (
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True
