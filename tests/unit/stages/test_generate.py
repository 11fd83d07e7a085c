"""The step that asks, by itself: a served teacher, a row store, and the view that it writes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from edgedistill.chat import Chat
from edgedistill.data.label_answers import ask_scores, rotated, scores_schema
from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import Key
from edgedistill.rows import Answered, Question, RowStore
from edgedistill.served import Batching, Server
from edgedistill.spending import Budget, Use
from edgedistill.stages.generate import Generate
from edgedistill.step import Context
from edgedistill.teachers import claims
from edgedistill.teachers.batch_book import Book
from tests.batch_server import BatchServer
from tests.calling_server import CallingServer, call
from tests.http_server import JsonServer
from tests.planned_server import Planned
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.tool_template import TEMPLATE, TOOL

TEACHER = Key("a" * 64)


def rows(*prompts: str, **more: Any) -> tuple[Row, ...]:
    return tuple(Row(id=text, messages=({"role": "user", "content": text},), **more) for text in prompts)


def made(there: JsonServer, prompts: tuple[Row, ...], **fields: Any) -> Generate:
    """Return the step that asks a server these prompts."""
    how: dict[str, Any] = {"style": "answer", "samples": 1, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 10}
    asked = {"seed": 0, "batch_size": 16, "scores": None, "min_score": {}, "rows": prompts, "rows_digest": ""}
    server = Server(urls=(there.url,), model="m", key_env="NO_SUCH_KEY", concurrency=1, timeout=10, retries=0)
    return Generate(teacher=TEACHER, server=server, **{**how, **asked, **fields})


def parsed(file: IO[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file]


def run(folder: Path, stage: Generate, read: Callable[[IO[str]], Any] = parsed) -> tuple[dict[str, Any], Any]:
    """Run the step on the row store of a folder; return its facts and the lines of its view."""
    out = folder / f"out-{len(list(folder.iterdir()))}"
    out.mkdir()
    entries: Any = {TEACHER: SimpleNamespace(digest="teacher", path=folder / "teacher")}
    ctx = Context(
        out=out,
        work=folder,
        entries=entries,
        rows=RowStore(folder),
        threads=1,
        progress=lambda done, total, what: None,
        note=lambda text: None,
    )
    facts = dict(stage.run(ctx))
    with (out / "rows.jsonl").open(encoding="utf-8", newline="\n") as file:
        return facts, read(file)


def test_half_a_surrogate_pair_in_an_answer_or_a_call_loses_that_character_and_not_the_build(tmp_path: Path) -> None:
    """JSON may hold one, and no file in UTF-8 can: an answer that was paid for and stored would end every build after it."""

    def say(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("tools"):
            return {"tool_calls": [call("weather", json.dumps({"city": "Oslo \ud83d"}))]}
        return {"content": "Fine \ud83d!"}

    chat = Chat(source="x", template=TEMPLATE, for_tools=TEMPLATE, bos="", eos="")
    with CallingServer(say) as there:
        prompts = rows("hello") + rows("rain?", tools=(TOOL,))
        facts, lines = run(tmp_path, made(there, prompts, chat=chat))
        assert lines[0]["text"] == "Fine \ufffd!"
        assert '"Oslo \ufffd"' in lines[1]["text"] and lines[1]["finish"] == "stop"
        assert (facts["asked"], len(there.bodies)) == (2, 2)
        assert run(tmp_path, made(there, prompts, chat=chat)) == ({**facts, "asked": 0, "from_store": 2}, lines)


def test_a_prompt_that_does_not_fit_is_named_before_any_is_answered(tmp_path: Path) -> None:
    """Prompts are put by length, so that the last one, after hours, would be it."""
    make_model(tmp_path / "teacher" / "model", max_position_embeddings=64)
    prompts = rows("short") + rows(" ".join(["alarm"] * 60))
    with CallingServer(lambda body: {}) as there:
        stage = replace(made(there, (prompts[0], replace(prompts[1], id="long"))), server=None, batch_size=1)
    with pytest.raises(UsageError, match=r"row 'long': a prompt of .* do not fit the teacher's context of 64"):
        run(tmp_path, stage)
    assert RowStore(tmp_path).counts() == {"rows": 0, "asks": 0}


def test_a_prompt_that_a_server_refuses_is_named_by_its_row(tmp_path: Path) -> None:
    prompts = tuple(replace(row, id=f"r-{at}") for at, row in enumerate(rows("Question 0", "Question 1", "Question 2")))
    told = {
        "400": r"^row 'r-1': http://.*: the server refuses \(400\)",
        "401": r"^http://.*refuses \(401\)",
    }  # not its fault
    for status, why in told.items():
        plan = dict.fromkeys(range(3), "ok") | {1: status}
        with Planned(lambda row, before, plan=plan: plan[row]) as there, pytest.raises(StepFailed, match=why):
            run(tmp_path, made(there, prompts))


def test_two_builds_at_once_ask_what_both_want_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "OTHERS_S", 0.02)
    prompts = rows(*(f"Question {at}" for at in range(12)))
    with Planned(lambda row, before: "slow 0.1") as there, ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path, made(there, prompts[:8]))
        while not there.asked:
            assert not first.done()
        second = pool.submit(run, tmp_path, made(there, prompts[4:]))
        (one, lines), (two, others) = first.result(60), second.result(60)
        assert dict(there.asked) == dict.fromkeys(range(12), 1)
    assert (one["asked"], two["asked"], two["from_store"]) == (8, 4, 4)
    assert [line["text"] for line in lines[4:]] == [line["text"] for line in others[:4]]


def test_what_a_batch_brings_beside_what_is_asked_now_is_kept(tmp_path: Path) -> None:
    """A build put six prompts in a batch and was stopped; the next one asks two of them, and the one after it all."""
    prompts = rows(*(f"Question {at}" for at in range(6)))
    how = (("max_new_tokens", 10), ("style", "answer"), ("temperature", 0.0), ("top_p", 1.0))
    keys = [Question(teacher="teacher", messages=(("user", row.id),), sampling=how, seed=0).key for row in prompts]
    with BatchServer() as there:
        body = {"model": "m", "max_tokens": 10, "temperature": 0.0}
        lines = [
            {
                "custom_id": key,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**body, "messages": list(row.messages)},
            }
            for key, row in zip(keys, prompts, strict=True)
        ]
        file = there.upload_lines([json.dumps(line).encode() + b"\n" for line in lines])
        batch = there.create({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"})
        book = Book(tmp_path / "rows.sqlite", "", Budget())
        sent = book.open(there.url, dict.fromkeys(keys, Use(100, 10)))
        assert sent is not None
        book.name(sent, file=file, id=batch["id"])
        book.close()
        batching = Batching(requests=100, window="24h", poll=0.01, share=0.5)
        stage = made(there, prompts[:2])
        assert stage.server is not None
        stage = replace(stage, server=replace(stage.server, batch=batching))
        facts, _ = run(tmp_path, stage)
        assert facts["asked"] == 2
        facts, lines = run(tmp_path, replace(stage, rows=prompts))
        assert (facts["asked"], facts["from_store"]) == (0, 6)
        assert [line["text"] for line in lines] == [f"answer {at}" for at in range(6)]
        assert set(there.batched.values()) == {1} and not there.single and len(there.batches) == 1


def test_what_is_stored_is_not_in_memory_all_at_once(tmp_path: Path) -> None:
    """The tokens of an answer take 36 bytes each while they are a tuple."""
    prompts, tokens = rows(*(f"p{at}" for at in range(2400))), 300
    with CallingServer(lambda body: {}) as there:
        stage, store = made(there, prompts), RowStore(tmp_path)
    how = (("max_new_tokens", 10), ("style", "answer"), ("temperature", 0.0), ("top_p", 1.0))
    asked = [Question(teacher="teacher", messages=(("user", row.id),), sampling=how, seed=0) for row in prompts]
    ids = tuple(range(1000, 1000 + tokens))
    store.add((one, Answered(key=one.key, text="yes", token_ids=ids, finish="stop", logprob=-1.0)) for one in asked)
    tracemalloc.start()
    try:
        facts, lines = run(tmp_path, stage)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (facts["asked"], facts["tokens"], len(lines)) == (0, len(prompts) * tokens, len(prompts))
    assert peak < 0.6 * 36 * tokens * len(prompts)


def test_while_a_server_is_asked_no_more_is_in_memory_than_what_is_under_way(tmp_path: Path) -> None:
    prompts, said = rows(*(f"p{at}" for at in range(400))), "A long answer. " * 700
    with CallingServer(lambda body: {"content": said}) as there:
        run(tmp_path, made(there, rows("what is loaded at the first one")))
        tracemalloc.start()
        try:
            facts, lines = run(tmp_path, made(there, prompts), read=lambda file: sum(1 for _ in file))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (facts["asked"], lines) == (len(prompts), len(prompts))
    most = 0.5 * len(prompts) * len(said)
    assert peak < most


NAMES = ("play", "call", "alarm")


def test_labels_are_put_in_another_place_in_each_sample_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    def asking(samples: int) -> dict[str, Any]:
        said = [
            (ask_scores(names), json.dumps(scores_schema(names))) for names in (rotated(NAMES, at) for at in range(3))
        ]
        (ask, schema), *turned = said[:samples]
        how = {"samples": samples, "temperature": 1.0}
        return {"ask": ask, "json_schema": schema, "turned": tuple(turned), **how}

    def shown(body: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        prompt, _, ask = body["messages"][-1]["content"].partition("\n\n")
        form = json.loads(ask[ask.index("{") :].replace(": N", ": 0"))
        guide = body["response_format"]["json_schema"]["schema"]
        return prompt, tuple(form), tuple(guide["properties"])

    with CallingServer(lambda body: {"content": json.dumps(dict.fromkeys(shown(body)[1], 5))}) as there:
        first, only = run(tmp_path, made(there, rows("hello", "bye"), **asking(1)))
        assert first["asked"] == 2 and [shown(body) for body in there.bodies] == [
            (prompt, NAMES, NAMES) for prompt in ("hello", "bye")
        ]
        # a single sample is asked as it always was, so that its answers are found again
        old = Question(
            teacher="teacher",
            messages=(("user", f"hello\n\n{ask_scores(NAMES)}"),),
            sampling=(
                *(("max_new_tokens", 10), ("style", "answer"), ("temperature", 1.0), ("top_p", 1.0)),
                ("json_schema", json.dumps(scores_schema(NAMES))),
            ),
            seed=0,
        )
        assert only[0]["row"] == old.key
        there.bodies.clear()
        more, lines = run(tmp_path, made(there, rows("hello", "bye"), **asking(4)))
        assert (more["asked"], more["from_store"]) == (6, 2)  # sample 0 is the one of before
        turned = {(prompt, rotated(NAMES, at), rotated(NAMES, at)) for prompt in ("hello", "bye") for at in range(3)}
        assert {shown(body) for body in there.bodies} == turned  # the fourth is put as the first, and drawn anew
        assert [(line["id"], line["sample"]) for line in lines] == [
            (one, at) for one in ("hello", "bye") for at in range(4)
        ]
        assert len({line["row"] for line in lines}) == 8 and [lines[0], lines[4]] == only
        assert [tuple(json.loads(line["text"])) for line in lines[:4]] == [rotated(NAMES, at) for at in range(4)]
        assert run(tmp_path, made(there, rows("hello", "bye"), **asking(4)))[0] == {**more, "asked": 0, "from_store": 8}
        assert RowStore(tmp_path).asked_again() == []
