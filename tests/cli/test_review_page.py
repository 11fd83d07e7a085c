"""`edgedistill review` as a process: its page's requests, who is turned away, and a browser that clicks and types."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edgedistill.data.verdicts import read_verdicts
from edgedistill.review import MOST
from tests.unit.reviewed import HOSTILE, ROWS, answer, make_answered


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("review")
    return make_answered(folder, folder / "store")


@pytest.fixture
def recipe(made: Path) -> Path:
    (made.parent / "tiny.review.jsonl").unlink(missing_ok=True)
    return made


class Running:
    """A running review: its address, and requests to it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.port, self.token = urlsplit(url).port or 0, urlsplit(url).path.strip("/")

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        found = connection.getresponse()
        text = found.read().decode()
        connection.close()
        return found.status, found.headers, text

    def judge(self, body: Any) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.ask("POST", f"/{self.token}/verdict", raw, Content_Type="application/json")
        return status, json.loads(text) if status == 200 else text

    def items(self) -> list[dict[str, Any]]:
        status, _, text = self.ask("GET", f"/{self.token}/")
        assert status == 200
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert found
        return json.loads(found[1])["items"]

    def end(self, how: int | None = signal.SIGINT) -> dict[str, Any]:
        if how is not None:
            self.process.send_signal(how)
        out, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err
        return json.loads(out)


@contextmanager
def review(recipe: Path, *arguments: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgedistill", "review", str(recipe), "--no-open", "--json", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "EDGEDISTILL_STORE": str(recipe.parent / "store"),
        },
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("review: http://127.0.0.1:"), first + process.stderr.read()
        yield Running(process, first.removeprefix("review: ").strip())
    finally:
        process.kill()
        process.communicate()


def test_accept_reject_edit_and_the_summary(recipe: Path) -> None:
    with review(recipe, "--sample", "5", "--by", "mia") as running:
        items = running.items()
        assert len(items) == 5 and all(item["verdict"] is None for item in items)
        assert items[0]["messages"][1]["content"].startswith("wake me at") and items[0]["tags"][1] == HOSTILE
        keys = [item["key"] for item in items]
        status, found = running.judge({"key": keys[0], "verdict": "accept"})
        assert (status, found["saved"], found["done"]) == (200, True, 1)
        assert running.judge({"key": keys[1], "verdict": "reject", "reason": "too early"})[1]["done"] == 2
        assert running.judge({"key": keys[2], "verdict": "edit", "text": "no json"})[1]["warning"]
        assert running.judge({"key": keys[2], "verdict": "edit", "text": answer(88)})[1]["told"].startswith(
            "2 wrong of 3"
        )
        # On the disk before the answer: the page is told nothing that a cut of the power would undo.
        lines = [json.loads(line) for line in (recipe.parent / "tiny.review.jsonl").read_text().splitlines()]
        assert [one["verdict"] for one in lines] == ["accept", "reject", "edit"]
        assert [one["by"] for one in lines] == ["mia"] * 3 and lines[1]["reason"] == "too early"
        assert running.items()[1]["verdict"]["reason"] == "too early"
        summary = running.end()
    assert (summary["shown"], summary["done"]) == (5, 3)
    assert (summary["accepted"], summary["rejected"], summary["edited"]) == (1, 1, 1)
    assert summary["rest"] == ROWS - 1 - 3 and summary["wrong"]["value"] == pytest.approx(2 / 3)
    # It goes on where it ended, and the page itself can end it.
    with review(recipe, "--sample", "6") as running:
        assert [item["key"] for item in running.items()][:5] == keys
        assert running.ask("POST", f"/{running.token}/end", b"{}", Content_Type="application/json")[0] == 200
        assert running.end(None)["done"] == 3


def test_who_is_turned_away(recipe: Path) -> None:
    with review(recipe, "--sample", "2") as running:
        here, data = f"127.0.0.1:{running.port}", {"Content_Type": "application/json"}
        page, verdict = f"/{running.token}/", f"/{running.token}/verdict"
        body = json.dumps({"key": running.items()[0]["key"], "verdict": "accept"}).encode()
        for path in (
            "/",
            "/x/",
            f"/{running.token[:-1]}/",
            f"/{running.token}x/",
            "//",
            f"/%20{running.token}/",
            "/é/",
        ):
            assert (
                running.ask("GET", path.encode("utf-8").decode("latin-1") if path.isascii() else "/%C3%A9/")[0] == 403
            )
        assert running.ask("POST", "/x/verdict", body, **data)[0] == 403
        # Another name that leads here (DNS rebinding), and pages of other origins.
        for host in ("evil.example", f"evil.example:{running.port}", "127.0.0.1", "127.0.0.1:1", ""):
            assert running.ask("GET", page, Host=host)[0] == 403, host
            assert running.ask("POST", verdict, body, Host=host, **data)[0] == 403
        assert running.ask("POST", verdict, body, Origin="http://evil.example", **data)[0] == 403
        assert running.ask("POST", verdict, body, Origin="null", **data)[0] == 403
        assert running.ask("GET", page, Host=f"localhost:{running.port}")[0] == 200
        # Requests that are none.
        assert running.ask("POST", verdict, body)[0] == 415
        assert running.ask("POST", verdict, body, Content_Type="text/plain")[0] == 415
        for wrong in (b"", b"{", b"\xff", b"[]", b'{"verdict": "accept"}', b"[" * 100_000):
            assert running.judge(wrong)[0] == 400, wrong[:20]
        assert running.ask("POST", verdict, b"x" * (MOST + 1), **data)[0] == 413
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as raw:  # and before it is sent
            head = f"POST {verdict} HTTP/1.1\r\nHost: {here}\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: 99999999999999\r\n\r\n".encode())
            assert b" 413 " in raw.recv(1000)
        assert running.ask("POST", f"/{running.token}/other", b"{}", **data)[0] == 404
        assert running.ask("GET", f"/{running.token}/other")[0] == 404
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as raw:
            raw.sendall(f"POST {verdict} HTTP/1.1\r\nHost: {here}\r\nContent-Type: application/json\r\n\r\n".encode())
            assert b" 411 " in raw.recv(1000)
        for _ in range(5):  # one who leaves in the middle of a sentence
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raw.sendall(f"GET {page} HTTP/1.1\r\nHost: {here}\r\n\r\n".encode() * 20)
        assert not (recipe.parent / "tiny.review.jsonl").exists()
        assert running.judge(body)[0] == 200
        assert running.end()["judged"] == 1


def test_it_listens_on_this_machine_alone_and_its_page_loads_nothing(recipe: Path) -> None:
    with review(recipe, "--sample", "1") as running:
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), running.port, type=socket.SOCK_STREAM):
            if not str(address[0]).startswith("127."):
                with socket.socket(family) as other:
                    other.settimeout(2)
                    assert other.connect_ex(address) != 0
        _, headers, text = running.ask("GET", f"/{running.token}/")
        _, again, _ = running.ask("GET", f"/{running.token}/")
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
        assert policy != again["Content-Security-Policy"]  # a nonce is used once
        assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
        assert not re.search(r"(?:src|href)=\"?(?!data:,)[^\"]*//", text) and " style=" not in text
        assert HOSTILE not in text and "</script><script>document" not in text
        running.end()


def test_a_port_that_is_taken_and_a_recipe_that_is_not_built(recipe: Path, tmp_path: Path) -> None:
    def tell(*arguments: str, store: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "edgedistill", "review", str(recipe), "--no-open", *arguments],
            text=True,
            capture_output=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "EDGEDISTILL_STORE": str(store)},
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = tell("--port", str(taken.getsockname()[1]), store=recipe.parent / "store")
        assert "--port 0" in said and str(taken.getsockname()[1]) in said
    assert "--until filter" in tell(store=tmp_path)


# ── a browser ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Browser:
    """Drive a headless Chromium through pipes (the DevTools protocol's, on file descriptors 3 and 4)."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        spare = [os.dup(to_read), os.dup(to_write)]  # of numbers above 4

        def descriptors() -> None:
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self._process = subprocess.Popen(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                *(f"--user-data-dir={profile}", "--remote-debugging-pipe", "--window-size=1100,800", "about:blank"),
            ],
            preexec_fn=descriptors,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in (to_read, to_write, *spare):
            os.close(one)
        self._number, self._rest, self._session = 0, b"", ""
        page = next(one for one in self.tell("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.tell("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._read, 1 << 16)
                assert part, "the browser has ended"
                self._rest += part
            raw, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(raw)
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def value(self, expression: str) -> Any:
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        ends = time.monotonic() + 20
        while not self.value(expression):
            assert time.monotonic() < ends, expression
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        x, y = self.value(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str, **more: Any) -> None:
        code = {"Enter": 13, "Escape": 27}.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text, **more)
        self.tell("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code, **more)

    def type(self, text: str) -> None:
        self.tell("Input.insertText", text=text)

    def close(self) -> None:
        os.close(self._write)
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    try:
        yield found
    finally:
        found.close()


@pytest.mark.browser
def test_a_person_clicks_and_types(recipe: Path, browser: Browser, tmp_path: Path) -> None:
    file = recipe.parent / "tiny.review.jsonl"
    with review(recipe, "--sample", "6", "--by", "mia") as running:
        browser.tell("Page.enable")
        browser.tell("Page.navigate", url=running.url)
        browser.wait("document.readyState === 'complete' && document.querySelectorAll('#map button').length === 6")
        count, text = "document.getElementById('count').textContent", "document.body.innerText"
        assert browser.value(count) == "answer 1; 0 of 6 judged"
        # What a row says is text: its script did not run, and all of it is to be read.
        assert browser.value("document.title") == "0 of 6: review" and browser.value("document.images.length") == 0
        assert HOSTILE in browser.value(text) and "reference (the same)" in browser.value(text)
        styled = "getComputedStyle(document.querySelector('footer')).position"
        assert browser.value(styled) == "fixed"  # the policy lets its own style in

        browser.click("#accept")
        browser.wait(f"{count} === 'answer 2; 1 of 6 judged'")
        browser.key("a")
        browser.wait(f"{count} === 'answer 3; 2 of 6 judged'")
        browser.key("r")
        browser.type("a reject, just so")  # letters in a field are no verdicts
        browser.key("Enter")
        browser.wait(f"{count} === 'answer 4; 3 of 6 judged'")
        browser.key("e")
        assert browser.value("document.activeElement.id") == "text"
        browser.value("document.getElementById('text').select()")
        browser.type("no json")
        browser.click("#save")
        browser.wait("document.getElementById('message').textContent === 'This is not JSON.'")
        assert browser.value("document.getElementById('save').innerText").startswith("Save anyway")
        browser.value("document.getElementById('text').select()")
        browser.type(answer(99))
        browser.key("Enter", modifiers=2)  # with Ctrl
        browser.wait(f"{count} === 'answer 5; 4 of 6 judged'")
        browser.key("k")
        browser.wait(f"{count} === 'answer 4; 4 of 6 judged'")
        assert "as edited" in browser.value(text) and "by mia" in browser.value(text)
        browser.key("r")
        browser.key("Escape")
        browser.key("j")
        browser.wait(f"{count} === 'answer 5; 4 of 6 judged'")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        (tmp_path / "page.png").write_bytes(base64.b64decode(browser.tell("Page.captureScreenshot")["data"]))
        assert [one.verdict for one in read_verdicts(file).values()] == ["accept", "accept", "reject", "edit"]
        found = list(read_verdicts(file).values())
        assert found[2].reason == "a reject, just so" and found[3].text == answer(99)

        browser.tell("Page.reload")
        browser.wait(f"document.readyState === 'complete' && {count} === 'answer 5; 4 of 6 judged'")
        browser.click("#end")
        browser.wait("document.getElementById('message').textContent.startsWith('Ended')")
        assert running.end(None)["judged"] == 4
