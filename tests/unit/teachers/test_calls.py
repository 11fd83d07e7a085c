"""Calls of a served teacher's: sent and stored as OpenAI's API has them, learnt as the student's template writes them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edgedistill.chat import Chat
from edgedistill.data.prompts import parse_row
from edgedistill.data.traces import turns
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals.suites import WHOLE_TRACES
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from edgedistill.teachers.calls import as_sent, check_rows, tools_sent, write_calls
from tests.calling_server import CallingServer, call, flaw
from tests.unit.formats.gguf.conftest import TEMPLATE as PLAIN
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.tool_template import CALL, TEMPLATE, TOOL, trace

RENDER = Chat(source="x", template=TEMPLATE, for_tools=TEMPLATE, bos="", eos="").render
ASKED = [{"role": "user", "content": "Will it rain in Oslo?"}]
OSLO = {"name": "weather", "arguments": '{"city": "Oslo"}'}
RECIPE = """
schema  = 1
name    = "calls"
targets = ["laptop-x86"]
[teacher]
model     = "openai:m"
backend   = "openai"
server    = "URL"
retries   = 0
min_score = { calls = 0.1 }
[student]
model = "path:model"
[prompts]
files = ["rows.jsonl"]
[score]
kind = "none"
[distill]
loss = { kd = 0.0, ce = 1.0 }
[generate]
style          = "tool-trace"
max_new_tokens = 20
[[filter]]
kind   = "reference"
metric = "tool-calls"
[suites.calls]
files  = ["suite.jsonl"]
metric = "tool-calls"
"""


def test_calls_become_the_text_of_the_students_template() -> None:
    assert write_calls(ASKED, [TOOL], "", [OSLO], RENDER) == (CALL, True)
    # parallel ones, and what is said before them
    assert write_calls(ASKED, [TOOL], "Let me look.", [OSLO, OSLO], RENDER) == (f"Let me look.\n{CALL}\n{CALL}", True)
    # the same text as of a call in a gold row
    first, *_ = turns([parse_row(trace(), "x:1", traces=True)], lambda: RENDER)
    assert first.reference == CALL


@pytest.mark.parametrize("arguments", ['{"city": "Os', '["Oslo"]', "Oslo", "null"])
def test_arguments_that_are_no_object_are_no_call(arguments: str) -> None:
    text, good = write_calls(ASKED, [TOOL], "", [{"name": "weather", "arguments": arguments}], RENDER)
    assert not good and arguments in text


def test_a_conversation_is_sent_as_the_server_wants_it() -> None:
    _, second = turns([parse_row(trace(), "x:1", traces=True)], lambda: RENDER)
    sent = as_sent(second.messages)
    assert not flaw({"messages": sent, "tools": tools_sent(second.tools)})
    assert sent[1] == {"role": "assistant", "content": None, "tool_calls": [{**sent[1]["tool_calls"][0]}]}
    assert sent[1]["tool_calls"][0]["function"] == OSLO and sent[2]["tool_call_id"] == "c1"
    assert as_sent(ASKED) == ASKED and tools_sent([TOOL["function"]]) == [TOOL]
    # two calls with words before them, results without ids; a call as plain JSON
    two = [*ASKED, {"role": "assistant", "content": f"Let me look.\n{CALL}\n{CALL}"}]
    two += [{"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}]
    two += [{"role": "assistant", "content": '{"name": "now", "arguments": {}}'}, {"role": "tool", "content": "8:00"}]
    sent = as_sent(two)
    assert not flaw({"messages": sent})
    assert sent[1]["content"] == "Let me look." and [one["function"] for one in sent[1]["tool_calls"]] == [OSLO, OSLO]
    assert sent[4]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"} and sent[4]["content"] is None


def test_what_cannot_be_sent_or_written_is_refused_by_row() -> None:
    def row(*messages: dict[str, Any], **more: Any) -> Any:
        return parse_row({"id": "r", "messages": [*ASKED, *messages], **more}, "x:1")

    result = {"role": "tool", "content": "rain"}
    for messages, told in (
        ([{"role": "assistant", "content": "I call weather."}, result], r"row 'r': .* makes 0 calls .* 1 results"),
        ([{"role": "assistant", "content": f"{CALL}\n{CALL}"}, result], r"makes 2 calls"),
        ([result], "follows no call"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": "weather"}]}, result],
            "row 'r': .* has no name",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}, result],
            "row 'r': .* has no name",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            check_rows([row(*messages)], RENDER)
    for tools in ([{"function": "weather"}], [{"function": {}}], [{"type": "function"}]):
        with pytest.raises(UsageError, match="row 'r': a tool, or a call, has no name"):
            check_rows([row(tools=tools)], RENDER)
    check_rows([row({"role": "assistant", "content": CALL}, result, tools=[TOOL])], RENDER)
    plain = Chat(source="x", template=PLAIN, for_tools=PLAIN, bos="", eos="").render
    with pytest.raises(UsageError, match="does not write tool_calls"):
        check_rows([row(tools=[TOOL])], plain)


def say(body: dict[str, Any]) -> dict[str, Any]:
    """Call the weather, and tell it once it is known; trace t1 is answered with a call that is broken off, t2 twice."""
    assert not [message for message in body["messages"] if message["role"] == "user"][1:]
    if body["messages"][-1]["role"] == "tool":
        return {"content": "Yes, it will."}
    name = body["messages"][0]["content"].rpartition(", ")[2]
    if name == "t1?":
        return {"tool_calls": [call("weather", '{"city": "Os')]}
    return {"tool_calls": [call("weather", '{"city":"Oslo"}')] * (2 if name == "t2?" else 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    make_model(folder / "model", max_position_embeddings=1024)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name, rows in (("rows", [trace(f"t{n}") for n in range(6)]), ("suite", [trace(f"s{n}") for n in range(3)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(folder: Path, url: str, store: Path, **overrides: Any) -> Session:
    (folder / "recipe.toml").write_text(RECIPE.replace("URL", url))
    return prepare(folder, store=Store(store), overrides=overrides)


def test_traces_of_a_served_teacher(folder: Path, tmp_path: Path) -> None:
    with CallingServer(say) as server:
        session = prepared(folder, server.url, tmp_path / "store")
        outcome = Runner(session.plan.only(session.plan.match("filter")), session.store).build()
        assert not outcome.failed, outcome.failed
        bodies = server.bodies[1:]  # the first is the plan's
    assert len(bodies) == 2 * 6 + 2 * 3 and all(body["tools"] == [TOOL] for body in bodies)

    def entry(step: str) -> Any:
        return session.store.load(session.plan.match(step)[0].key)

    def read(step: str, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (entry(step).path / name).read_text().splitlines()]

    kept = read("filter", "kept.jsonl")
    assert [line["id"] for line in kept] == [
        f"t{n}/{turn}" for n in range(6) for turn in (1, 2) if turn == 2 or n not in (1, 2)
    ]
    assert {line["text"] for line in kept} == {CALL, "Yes, it will."}
    rejected = {line["id"]: (line["why"], line["text"]) for line in read("filter", "rejected.jsonl")}
    assert rejected["t1/1"][0] == "no call" and '{"city": "Os' in rejected["t1/1"][1]
    assert rejected["t2/1"] == ("reference (tool-calls)", f"{CALL}\n{CALL}")
    suite = entry("evaluate/teacher").facts["suites"]["calls"]
    assert suite["score"]["value"] == 1.0 and suite["by_tag"][WHOLE_TRACES]["value"] == 1.0
    # The row store holds what the server wrote: for a student with another template no call is asked for again, and it learns its
    # own form. (The turns after it are other conversations: the call in them is other text.)
    with sqlite3.connect(RowStore(session.store.root).path) as db:
        answers = [json.loads(answer) for (answer,) in db.execute("SELECT answer FROM rows")]
    assert {json.dumps(one["calls"]) for one in answers if "calls" in one} >= {
        json.dumps([{"name": "weather", "arguments": '{"city":"Oslo"}'}])
    }
    other = TEMPLATE.replace("<tool_call>\n", "<tool_call>").replace("\n</tool_call>", "</tool_call>")
    (folder / "model" / "chat_template.jinja").write_text(other)
    try:
        with CallingServer(say) as server:
            again = prepared(folder, server.url, tmp_path / "store", **{"teacher.min_score": {}})
            assert again.plan.match("generate")[0].key != session.plan.match("generate")[0].key
            outcome = Runner(again.plan.only(again.plan.match("generate")), again.store).build()
            assert not outcome.failed, outcome.failed
            put = [body["messages"][-1]["role"] for body in server.bodies if body["max_tokens"] == 20]
            assert put == ["tool"] * 6
    finally:
        (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    found = again.store.load(again.plan.match("generate")[0].key)
    assert found is not None and found.facts["from_store"] == 6
    lines = [json.loads(line) for line in (found.path / "rows.jsonl").read_text().splitlines()]
    assert lines[0]["text"] == '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def test_rows_that_a_server_cannot_be_sent_are_refused_by_key(folder: Path, tmp_path: Path) -> None:
    record = trace("t0")
    record["messages"][1] = {"role": "assistant", "content": "[weather Oslo]"}
    (folder / "odd.jsonl").write_text(json.dumps(record) + "\n")
    with CallingServer(say) as server, pytest.raises(RecipeError, match="makes 0 calls that can be read") as error:
        prepared(folder, server.url, tmp_path / "store", **{"prompts.files": ["odd.jsonl"]})
    assert error.value.key == "prompts.files"
