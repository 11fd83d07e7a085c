"""Files of rows of a hub's data sets: fetched by the hub's own client from a server on this machine, and pinned."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.lock import read_lock, write_lock
from edgedistill.models import fetch_rows
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.session import recipe_files

FIRST, SECOND = "a" * 40, "b" * 40
FETCH = """
import sys, json
from pathlib import Path
from edgedistill.errors import RecipeError
from edgedistill.recipe import load_recipe
from edgedistill.session import _hub_files
from edgedistill.store import Store
path = Path(sys.argv[1])
recipe = load_recipe(path, json.loads(sys.argv[2]))
try:
    found = _hub_files(recipe, path, Store(path.parent / "store"), lambda text: print(text, file=sys.stderr))
    print(json.dumps({one.source: one.path.read_text() for one in found}))
except RecipeError as error:
    print(json.dumps({"error": error.message, "key": error.key, "hint": error.hint}))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the hub's API as its client needs for one file of a data set; ``latest`` is the revision of main."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.latest, self.asked = FIRST, list[str]()
        self.texts = {FIRST: b'{"prompt": "one"}\n', SECOND: b'{"prompt": "two"}\n'}


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "datasets", "own", "set"]:
            self._send(json.dumps({"id": "own/set", "sha": self.server.latest, "siblings": []}).encode())
        elif parts[:4] == ["datasets", "own", "set", "resolve"] and parts[5:] == ["data", "rows.jsonl"]:
            text = self.server.texts[parts[4]]
            named = {"ETag": f'"{hashlib.sha256(text).hexdigest()}"', "X-Repo-Commit": parts[4]}
            self._send(text, named)
        else:
            self._send(b"{}", {"X-Error-Code": "EntryNotFound"}, 404)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetched(hub: Hub, recipe: Path, *files: str, **settings: str) -> dict[str, str]:
    """Fetch a recipe's files in a process of its own: the hub's client reads its settings once."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(recipe.parent / "home"),
        **settings,
    }
    command = [sys.executable, "-c", FETCH, str(recipe), json.dumps({"prompts.files": files, "prompts.rows": None})]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_file_of_the_hub_is_pinned_and_stays_what_it_was(hub: Hub, tmp_path: Path) -> None:
    recipe = copy_recipe("answer", tmp_path / "r") / "recipe.toml"
    lock = recipe.with_name(f"{load_recipe(recipe).name}.lock")
    lock.write_text('[models."pypi:one"]\nrevision = "1"\ndigest = "d"\n')
    source = "hf:own/set/data/rows.jsonl"
    assert fetched(hub, recipe, source) == {source: '{"prompt": "one"}\n'}
    digest = hashlib.sha256(hub.texts[FIRST]).hexdigest()
    assert read_lock(lock, "data") == {source: {"revision": FIRST, "digest": digest}}
    assert read_lock(lock) == {"pypi:one": {"revision": "1", "digest": "d"}}
    assert all("rows.jsonl" in one or "/api/" in one for one in hub.asked)  # that one file, and no other

    hub.latest, before = SECOND, len(hub.asked)
    assert fetched(hub, recipe, source, HF_HUB_OFFLINE="1") == {source: '{"prompt": "one"}\n'}
    assert len(hub.asked) == before  # it is here
    asked_for = f"hf:own/set@{SECOND}/data/rows.jsonl"
    assert fetched(hub, recipe, asked_for) == {asked_for: '{"prompt": "two"}\n'}
    assert set(read_lock(lock, "data")) == {source, asked_for}

    write_lock(lock, [])
    lock.write_text(lock.read_text().replace(digest, "0" * 64))
    told = fetched(hub, recipe, source)
    assert "not those that the lock pins" in told["error"] and told["key"] == "prompts.files"
    told = fetched(hub, recipe, "hf:own/set/data/other.jsonl")  # is not there
    assert told["key"] == "prompts.files" and "other.jsonl" in told["error"] and "HF_TOKEN" in told["hint"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf:own/set", "names no file"),
        ("hf:own/set/", "names no file"),
        ("hf:own/set/../../x.jsonl", "names no file"),
        ("hf:own/set/set.py", "files of data"),
        ("hf:own/set/weights.bin", "files of data"),
    ],
)
def test_only_files_of_data_are_fetched(source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        fetch_rows(source, tmp_path)
    assert caught.value.hint and not list(tmp_path.iterdir())


def test_files_are_found_in_every_table(tmp_path: Path) -> None:
    recipe = copy_recipe("quickstart", tmp_path / "r") / "recipe.toml"
    more = {
        "suites.other": {"files": ["hf:own/set/a.jsonl"], "metric": "exact"},
        "distill.keep": {"files": ["hf:own/set/b.jsonl"]},
    }
    found = list(recipe_files(load_recipe(recipe, more)))
    assert ("suites.other.files", "hf:own/set/a.jsonl") in found and (
        "distill.keep.files",
        "hf:own/set/b.jsonl",
    ) in found
    assert {key for key, _ in found} >= {"prompts.files", "adapt.files", "heal.files", "suites.holdout.files"}
