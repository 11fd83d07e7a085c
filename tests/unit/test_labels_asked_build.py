"""A teacher that says more than a label is asked for it, and a student is built that never saw that question."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data_stats import collect_stats, stats_sheets
from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.convert import convert
from edgedistill.report import collect
from edgedistill.report_sheets import labels_sheet
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.http_server import JsonHandler, JsonServer
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "asked-labels"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[student]
model = "path:model"
[prompts]
files = ["asked.jsonl"]
[generate]
max_new_tokens = 48
[labels]
names = ["play", "call", "alarm"]
[score]
kind = "none"
[distill]
method     = "full"
loss       = { kd = 0.0, ce = 1.0 }
epochs     = 20
batch_size = 6
lr         = 3e-3
[suites.holdout]
files          = ["holdout.jsonl"]
metric         = "label"
max_new_tokens = 6
"""
LABELS = ("play", "call", "alarm")
SCORES = {"music": (9, 1, 1), "nine": (1, 8, 6)}
"""What the served teacher thinks of a prompt with such a word."""


class Teacher(JsonServer):
    """Answer as a chat model that does as it is asked: scores, an order, or a label. Every third draw talks instead."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": "teacher", "max_model_len": 512}]})

            def do_POST(self) -> None:
                body = JsonHandler.asked(self)
                outer.asked.append(body)
                message = {"role": "assistant", "content": outer.answer(body)}
                self.send({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {}})

        super().__init__(Handler, under="/v1")

    def answer(self, body: dict[str, Any]) -> str:
        text, seed = body["messages"][-1]["content"], body.get("seed", 0)
        scores = dict(zip(LABELS, SCORES["music" if "music" in text else "nine"], strict=True))
        best = sorted(LABELS, key=lambda name: -scores[name])
        if "Do not answer with a label" not in text:
            return best[0]
        if seed % 3 == 2:
            return "That depends on what is meant."
        if "a score" in text:
            return json.dumps({**scores, "alarm": scores["alarm"] + seed % 3})  # one point more in every second one
        return " > ".join(best)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("asked") / "model", max_position_embeddings=512)


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    (tmp_path / "model").symlink_to(made)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for name, words in (("asked", ("turn", "volume", "next")), ("holdout", ("song", "queue"))):
        prompts = [(f"{word} music", "play") for word in words] + [(f"{word} nine", "call") for word in words]
        lines = [{"id": f"{name}-{at}", "prompt": text, "reference": label} for at, (text, label) in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def prepared(folder: Path, **overrides: Any) -> Session:
    return prepare(
        folder, store=Store(folder / "store"), overrides={key.replace("__", "."): one for key, one in overrides.items()}
    )


def build(session: Session, *steps: str) -> list[str]:
    """Build some steps; return which ran."""
    plan = session.plan.only([step for step in session.plan.steps if {*steps} & {*step.ids}])
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    return outcome.ran


def read(session: Session, step: str, name: str) -> list[dict[str, Any]]:
    entry = session.store.load(session.plan.match(step)[0].key)
    assert entry is not None
    return [json.loads(line) for line in (entry.path / name).read_text().splitlines()]


def taught(session: Session, step: str = "filter") -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for one in read(session, step, "kept.jsonl"):
        found[one["messages"][-1]["content"]][one["text"]] = one["weight"]
    return found


def test_scores_and_an_order_of_a_served_teacher_become_a_student(folder: Path) -> None:
    with Teacher() as server:
        served = {
            "teacher": {"model": "openai:teacher", "backend": "openai", "server": server.url, "retries": 0},
            "generate__samples": 4,
            "generate__temperature": 1.0,
            "labels__by": "scores",
            "compare": {"order": {"labels.by": "ranking"}},
        }
        session = prepared(folder, **served, labels__guided=True)
        steps = ("evaluate/student", "evaluate/student@order")
        assert {"generate", "generate@order", "filter", "distill/1"} <= set(build(session, *steps))
        assert build(session, *steps) == []
    questions = [one for one in server.asked if "Do not answer" in one["messages"][-1]["content"]]
    assert len(questions) == 2 * 6 * 4
    assert all(one["response_format"]["type"] == "json_schema" for one in questions)
    # what is rejected says why, and the question is no part of what is learnt
    for name, why in (
        ("filter", "no JSON object of scores"),
        ("filter@order", "no label: That depends on what is meant."),
    ):
        answers = [one["text"] for one in read(session, name.replace("filter", "generate"), "rows.jsonl")]
        rejected = read(session, name, "rejected.jsonl")
        assert 0 < len(rejected) < len(answers)
        assert {one["why"] for one in rejected} == {why}
        assert sum("depends" in text for text in answers) == len(rejected)
        assert not any("Do not answer" in json.dumps(one["messages"]) for one in read(session, name, "kept.jsonl"))
    said: dict[str, list[dict[str, float]]] = defaultdict(list)
    prompts = {one["id"]: one["prompt"] for one in map(json.loads, (folder / "asked.jsonl").read_text().splitlines())}
    for one in read(session, "generate", "rows.jsonl"):
        if "depends" not in one["text"]:
            said[prompts[one["id"]]].append(json.loads(one["text"]))
    for prompt, shares in taught(session).items():
        weights = {name: math.exp(sum(one[name] for one in said[prompt]) / len(said[prompt]) / 2) for name in LABELS}
        kept = {name: weight for name, weight in weights.items() if weight >= 0.01 * max(weights.values())}
        assert shares == pytest.approx({name: weight / sum(kept.values()) for name, weight in kept.items()})
    assert taught(session, "filter@order")["turn nine"] == pytest.approx({"call": 4 / 7, "alarm": 2 / 7, "play": 1 / 7})
    # the student has learnt it, and the figures say how soft it was
    answers = read(session, "evaluate/student", "answers/holdout.jsonl")
    assert {one["text"].strip() for one in answers} <= {*LABELS} and len({one["text"] for one in answers}) == 2
    stats = collect_stats(session)
    assert stats["labels"]["by"] == "scores" and 0 < stats["labels"]["entropy"] < math.log(3)
    notes = " ".join(note for sheet in stats_sheets(stats) for note in sheet.notes)
    assert "the teacher's scores of all labels, of 6 prompts" in notes
    assert "the teacher's scores of all labels" in " ".join(labels_sheet(collect(session)).notes)


def test_samples_at_temperature_0_differ_by_the_places_of_the_labels(folder: Path) -> None:
    with Teacher() as server:
        told = {"model": "openai:teacher", "backend": "openai", "server": server.url, "retries": 0}
        session = prepared(folder, teacher=told, generate__samples=3, generate__temperature=0.0, labels__by="ranking")
        build(session, "filter")
    texts = [
        one["messages"][-1]["content"] for one in server.asked if "Do not answer" in one["messages"][-1]["content"]
    ]
    assert len(texts) == len(set(texts)) == 6 * 3
    assert len(read(session, "generate", "rows.jsonl")) == 18
    assert taught(session)["turn nine"] == pytest.approx({"call": 4 / 7, "alarm": 2 / 7, "play": 1 / 7})


@pytest.mark.slow
def test_a_teacher_in_a_gguf_file_can_write_nothing_else(folder: Path) -> None:
    convert(folder / "model", folder / "teacher.gguf", dtype="f16")
    file = {"teacher": {"model": "gguf:teacher.gguf", "backend": "llama_cpp"}}
    session = prepared(folder, **file, labels__by="scores")
    build(session, "filter")
    assert read(session, "filter", "rejected.jsonl") == []
    assert set(taught(session)) == {one["messages"][-1]["content"] for one in read(session, "filter", "kept.jsonl")}
    assert all(sum(shares.values()) == pytest.approx(1) for shares in taught(session).values())
    free = prepared(folder, **file, labels__by="scores", labels__guided=False)
    plan = free.plan.only(free.plan.match("filter"))
    failed = Runner(plan, free.store).build().failed["filter"]  # untaught, it writes anything
    assert isinstance(failed, StepFailed)


@pytest.mark.slow
@pytest.mark.parametrize("gguf", [False, True])
def test_probabilities_of_a_teacher_that_is_here_are_the_targets(folder: Path, gguf: bool) -> None:
    """By plain PyTorch in float32, label by label; the teacher may compute in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = {}
    if gguf:
        convert(folder / "model", folder / "teacher.gguf", dtype="f32")
        teacher = {"teacher": {"model": "gguf:teacher.gguf", "backend": "llama_cpp"}}
    session = prepared(folder, **teacher, labels__by="logits", labels__least=0.0)
    assert "generate" in build(session, "distill/1")
    assert build(session, "distill/1") == []
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    found = taught(session)
    assert len(found) == 6
    for prompt, shares in found.items():
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        likely = []
        for name in LABELS:
            tail = [*tokenizer(name, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *tail]])).logits[0, len(ids) - 1 : -1].double()
            likely.append(torch.log_softmax(logits, -1)[torch.arange(len(tail)), torch.tensor(tail)].sum())
        wanted = torch.softmax(torch.stack(likely), 0).tolist()
        assert [shares.get(name, 0.0) for name in LABELS] == pytest.approx(wanted, rel=0.2, abs=1e-5)
