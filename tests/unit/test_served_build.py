"""A teacher behind a real HTTP server: it is proved, asked, scores what is kept and what the student writes, and a file ships."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data_stats import collect_stats, stats_sheets
from edgedistill.devices.protocol import Settings
from edgedistill.errors import EdgeDistillError, RecipeError, StepFailed, UsageError
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.recipe_teacher import every_asked
from edgedistill.report import collect
from edgedistill.report_html import page
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.served import Server, account_of
from edgedistill.session import Session, prepare, rows_of
from edgedistill.store import Store
from edgedistill.tables import plan_json, plan_table
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Sampling, Teacher
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.recipe import load_kept
from edgedistill.training.targets import read_targets
from tests.model_server import ModelServer
from tests.unit.taught import WORDS, make_taught

RECIPE = """
schema  = 1
name    = "served"
targets = ["laptop-x86"]

[teacher]
model       = "openai:teacher"
backend     = "openai"
server      = "URL"
concurrency = 4
retries     = 0
min_score   = { words = 0.9 }

[student]
model = "path:model"

[prompts]
files = ["rows.jsonl"]

[generate]
max_new_tokens = 12

[[filter]]
kind   = "reference"
metric = "exact"

[score]
kind = "top-k"
n    = 20

[distill]
method           = "full"
epochs           = 6
batch_size       = 8
lr               = 2e-3
on_policy        = 0.5
on_policy_tokens = 8
loss             = { kd = 1.0, ce = 0.0, temperature = 1.0 }

[suites.words]
files  = ["asked.jsonl"]
metric = "exact"

[suites.prose]
files  = ["prose.jsonl"]
metric = "perplexity"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_taught(tmp_path_factory.mktemp("served"))


def prepared(folder: Path, url: str, store: Path, **overrides: Any) -> Session:
    (folder / "recipe.toml").write_text(RECIPE.replace("URL", url))
    return prepare(folder, store=Store(store), overrides={"teacher.min_score": {}, **overrides})


def entry(session: Session, step: str) -> Any:
    found = session.store.load(session.plan.match(step)[0].key)
    assert found is not None
    return found


def test_it_is_built_to_the_package_and_built_again_without_the_server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.devices.local.Settings", partial(Settings, pp=64, tg=16, ttft_prompts=2, reps=2))
    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "store")
        names = {name for step in session.plan.steps for name in step.ids}
        assert not names & {"convert/teacher", "measure/teacher", "adapt"}
        outcome = Runner(session.plan, session.store).build()
        assert not outcome.failed, outcome.failed
        asked = dict(server.requests)
    local = TransformersTeacher(folder / "teacher", "float32")

    # What it says is what the model says here, and every question was put once.
    (stored,) = [entry(session, "generate")]
    lines = [json.loads(line) for line in (stored.path / "rows.jsonl").read_text().splitlines()]
    alone = local.generate(
        [[{"role": "user", "content": f"Say {word}."}] for word in WORDS], sampling=Sampling(max_new_tokens=12)
    )
    assert {one["id"]: one["text"] for one in lines} == {WORDS[one.index]: one.text for one in alone}
    assert RowStore(session.store.root).asked_again() == []
    assert stored.facts["tokens"] > len(WORDS) and all(one["logprob"] < 0 for one in lines)
    assert asked["/v1/chat/completions"] == 1 + 2 * len(WORDS)  # the probe, the suite, the prompts

    # Its targets are the model's best tokens.
    kept = entry(session, "filter")
    examples, _ = load_kept(kept.path / "kept.jsonl", folder / "teacher")
    read = read_targets(sorted((entry(session, "score").path / "targets").glob("*.parquet")), examples)
    here = dict(local.score(examples, kind="top-k", n=20))
    for at, soft in enumerate(read):
        assert np.array_equal(soft.ids, here[at].ids)
        assert np.allclose(soft.logp, here[at].logp, atol=5e-3)

    # The student wrote, the server scored it, and it learnt.
    log = [
        json.loads(line) for line in (entry(session, "distill/1").path / "log" / "train.jsonl").read_text().splitlines()
    ]
    written = sum(line["written_rows"] for line in log)
    assert 0 < written < sum(8 if step % 2 == 0 else 4 for step in range(len(log)))
    assert asked["/v1/completions"] <= 1 + len(examples) + written
    assert log[-1]["kd"] < 0.5 * log[0]["kd"]

    # It is kept without the server: nothing runs, the report and the manifest name who taught.
    again = prepared(folder, server.url, tmp_path / "store")
    assert Runner(again.plan, again.store).build().ran == []
    manifest = json.loads((entry(session, "package/laptop-x86").path / "manifest.json").read_text())
    assert "openai:teacher" in {source["source"] for source in manifest["sources"]}
    assert "teacher, served" in page(collect(again))

    # Another address of the same model changes nothing; another model or another thing asked along does.
    with ModelServer(folder / "teacher", dtype="float32") as server:
        moved = prepared(folder, server.url, tmp_path / "store")
        assert Runner(moved.plan, moved.store).build().ran == []
        other = prepared(folder, server.url, tmp_path / "store", **{"teacher.body": {"priority": 1}})
        assert other.plan.match("generate")[0].key != moved.plan.match("generate")[0].key


def test_a_trimmed_student_is_scored_in_its_own_tokens(folder: Path, tmp_path: Path) -> None:
    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "store", **{"student.vocabulary": 380})
        plan = session.plan.only(session.plan.match("distill/1"))
        outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    log = [
        json.loads(line) for line in (entry(session, "distill/1").path / "log" / "train.jsonl").read_text().splitlines()
    ]
    assert log[-1]["kd"] < 0.5 * log[0]["kd"]


def test_an_online_round_asks_the_server_what_the_student_fails(folder: Path, tmp_path: Path) -> None:
    changes = {"round": [{"kind": "online", "samples": 1}], "distill.epochs": 1, "distill.on_policy": 0.0}
    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "store", **changes)
        plan = session.plan.only(session.plan.match("distill/2"))
        outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    asked = entry(session, "generate/round-1").facts
    assert 0 < asked["asked"] == asked["rows"] <= len(WORDS)


def test_a_teacher_that_is_not_good_enough_is_asked_nothing(folder: Path, tmp_path: Path) -> None:
    with ModelServer(folder / "model", dtype="float32") as server:  # untaught
        session = prepared(folder, server.url, tmp_path / "store", **{"teacher.min_score": {"words": 0.9}})
        plan = session.plan.only(session.plan.match("generate"))
        outcome = Runner(plan, session.store).build()
        assert server.requests["/v1/chat/completions"] == 1 + len(WORDS)
    assert "min_score" in str(outcome.failed["generate"])


@pytest.mark.parametrize("step", ["evaluate/teacher", "generate"])
def test_a_build_that_is_broken_off_asks_again_only_what_was_in_flight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    add, left = RowStore.add, [4]

    def add_and_break(self: RowStore, answers: Any) -> None:
        if left[0]:  # answers that were in flight may come in after the break: they are lost with it
            add(self, answers)
            left[0] -= 1
        if left[0] == 0:
            raise UsageError("broken off", "go on")

    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "store")
        proof, plan = (session.plan.only(session.plan.match(one)) for one in ("evaluate/teacher", step))
        if step == "generate":
            assert not Runner(proof, session.store).build().failed
        before, probe = server.requests["/v1/chat/completions"], int(step == "evaluate/teacher")
        with monkeypatch.context() as patch:
            patch.setattr(RowStore, "add", add_and_break)
            assert list(Runner(plan, session.store).build().failed) == [step]
        assert not Runner(plan, session.store).build().failed
        asked = server.requests["/v1/chat/completions"] - before - probe
    assert len(WORDS) <= asked <= len(WORDS) + 4  # teacher.concurrency
    assert len(RowStore(session.store.root).asked_again()) <= 4
    if step == "generate":
        facts = entry(session, "generate").facts
        assert (facts["asked"], facts["from_store"]) == (len(WORDS) - 4, 4)


def test_another_tokenizer_is_found_out(folder: Path, tmp_path: Path, smollm2: Path) -> None:
    with ModelServer(smollm2) as server:
        teacher = OpenAITeacher(
            Server(urls=(server.url,), model="teacher", key_env="X", concurrency=2, timeout=60, retries=0),
            rows=None,
            tokenizer=TransformersTeacher(folder / "teacher").tokenizer,
        )
        assert isinstance(teacher, Teacher)
        (tmp_path / "kept.jsonl").write_text(
            json.dumps({"id": "a", "messages": [{"role": "user", "content": "Say alarm."}], "text": "alarm"}) + "\n"
        )
        examples, _ = load_kept(tmp_path / "kept.jsonl", folder / "teacher")
        with teacher, pytest.raises(StepFailed, match="another tokenizer"):
            list(teacher.score(examples, kind="top-k", n=5))


def test_what_is_thought_becomes_a_block_where_the_style_has_one(folder: Path) -> None:
    with ModelServer(folder / "teacher", dtype="float32") as server:
        server.thinks = "First I think."
        known = Server(urls=(server.url,), model="teacher", key_env="X", concurrency=2, timeout=60, retries=0)
        prompts = [[{"role": "user", "content": "Say alarm."}]]
        for style, start in (("answer", "alarm"), ("think", "<think>\nFirst I think.\n</think>\nalarm")):
            with OpenAITeacher(known, rows=None, style=style) as teacher:
                (answer,) = teacher.generate(prompts, sampling=Sampling(max_new_tokens=12))
            assert answer.text.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"score.kind": "sampled"}, "score.kind"),
        ({"adapt": {"files": ["rows.jsonl"]}}, "adapt"),
        ({"student.model": "teacher"}, "student.model"),
        ({"distill.loss.temperature": 2.0}, "distill.loss.temperature"),
        ({"heal": {"hidden": 1.0}}, "heal.hidden"),
        ({"distill.features": {"weight": 1.0}}, "distill.features"),
        ({"baselines.quantized_teacher": "Q4_0"}, "baselines.quantized_teacher"),
        ({"gates.min_speedup": 3.0}, "gates.min_speedup"),
        ({"gates.min_shrink": 3.0}, "gates.min_shrink"),
        ({"teacher.server": "127.0.0.1:8000"}, "teacher.server"),
        ({"teacher.server": "http://127.0.0.1:eighty/v1"}, "teacher.server"),
        ({"teacher.server": "http://me:sk-1@127.0.0.1/v1"}, "teacher.server"),
        ({"teacher.server": []}, "teacher.server"),
        ({"teacher.server": ["http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1"]}, "teacher.server"),
        ({"teacher.server": ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"], "teacher.batch": {}}, "teacher.batch"),
        ({"teacher.batch": {"requests": 50_001}}, "teacher.batch.requests"),
        ({"teacher.budget": {"money": 5.0}}, "teacher.budget.money"),
        ({"teacher.budget": {"tokens": 0}}, "teacher.budget.tokens"),
        ({"teacher.rate": {"requests": 0}}, "teacher.rate.requests"),
        ({"teacher.model": "path:model"}, "teacher.model"),
        ({"teacher.body": {"temperature": 1.0}}, "teacher.body"),
        ({"teacher.backend": "transformers"}, "teacher.model"),
        ({"teacher.backend": "transformers", "teacher.model": "path:model"}, "teacher.server"),
    ],
)
def test_what_a_served_teacher_cannot_do_is_refused_before_it_is_asked(
    folder: Path, tmp_path: Path, overrides: dict[str, Any], key: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(folder, "http://127.0.0.1:9/v1", tmp_path / "store", **overrides)
    assert f" {key}: " in str(caught.value)


def test_what_the_server_cannot_do_is_refused_in_the_plan(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UsageError, match="does not answer") as caught:
        prepared(folder, "http://127.0.0.1:9/v1", tmp_path / "store")
    assert "teacher.server" in caught.value.hint
    with ModelServer(folder / "teacher", key="sk-right") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(UsageError, match=r"401.*not Bearer …") as caught:
            prepared(folder, server.url, tmp_path / "store")
        assert "OPENAI_API_KEY" in caught.value.hint
        monkeypatch.setenv("OPENAI_API_KEY", "sk-ri\nght")
        with pytest.raises(UsageError, match="no key can") as caught:
            prepared(folder, server.url, tmp_path / "store")
        assert "sk-" not in str(caught.value) + caught.value.hint
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right\n")  # as it comes out of a file
        with pytest.raises(RecipeError, match="fewer than 30") as refused:
            prepared(folder, server.url, tmp_path / "store", **{"score.n": 30})
        assert "score.kind" in str(refused.value)
        with pytest.raises(UsageError, match="serves no 'someone'") as caught:
            prepared(folder, server.url, tmp_path / "store", **{"teacher.model": "openai:someone"})
        assert "teacher" in caught.value.hint
        prepared(folder, server.url, tmp_path / "store")
    everything = "".join(p.read_text() for p in (tmp_path / "store" / "models" / "served").iterdir())
    assert "sk-" not in everything


def test_the_plan_says_what_will_be_asked_what_it_costs_and_what_is_spent(folder: Path, tmp_path: Path) -> None:
    changes = {
        "teacher.price": {"input": 1.0, "output": 3.0},
        "teacher.budget": {"tokens": 100_000, "money": 0.5},
        "teacher.rate": {"requests": 6000},
    }
    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "store", **changes)
        before = plan_json(session, rows_of(session))["teacher"]
        assert before["tokens"] > 12 * 12 and before["money"] == pytest.approx(1.5e-6 * before["tokens"], rel=0.5)
        probed = before["spent"]  # what `plan` asks by itself
        assert probed["requests"] == server.requests.total() == 2
        assert 2 < probed["tokens"] < 200 and 1e-6 * probed["tokens"] < probed["money"] < 3e-6 * probed["tokens"]
        notes = plan_table(session, rows_of(session)).notes
        assert any(f"{probed['tokens']} of 100,000 tokens and " in note for note in notes)
        again = prepared(folder, server.url, tmp_path / "store", **changes)
        assert plan_json(again, rows_of(again))["teacher"]["spent"] == probed  # it is known
        with pytest.raises(UsageError, match="0 of 3 tokens are spent, a request may take") as refused:
            prepared(folder, server.url, tmp_path / "third", **{"teacher.budget": {"tokens": 3}})
        assert "raise teacher.budget" in refused.value.hint
        plan = session.plan.only(session.plan.match("score"))
        assert not Runner(plan, session.store).build().failed
        after = plan_json(session, rows_of(session))["teacher"]
        assert after["tokens"] < before["tokens"]
        assert after["spent"]["requests"] == server.requests.total()
        assert probed["tokens"] < after["spent"]["tokens"] < 100_000
    stats = collect_stats(session)
    (account,) = stats["spent"]["accounts"].values()
    assert account == after["spent"] and stats["spent"]["money"] == account["money"]
    kept = stats["kept"]
    assert stats["yields"][-1]["money_a_row"] == pytest.approx(account["money"] / stats["yields"][-1]["out"], abs=1e-8)
    assert stats["spent"]["a_kept_row"]["tokens_a_row"] == pytest.approx(account["tokens"] / kept, abs=0.06)
    entropy = stats["entropy"]  # by the best tokens
    assert 0 <= entropy["nats_per_token"] <= entropy["at_most"] and entropy["estimate"]["n"] == len(WORDS)
    sheets = {sheet.title: sheet for sheet in stats_sheets(stats)}
    assert sheets["filters"].columns[-1] == "money a row left"
    assert any(note.startswith("by the best tokens alone") for note in sheets["the teacher's entropy"].notes)
    assert collect(session).data["spent"] == stats["spent"]
    with ModelServer(folder / "teacher", dtype="float32") as server:
        session = prepared(folder, server.url, tmp_path / "other", **{"teacher.budget": {"tokens": 600}})
        outcome = Runner(session.plan.only(session.plan.match("generate")), session.store).build()
        (error,) = outcome.failed.values()
        assert "of 600 tokens are spent" in str(error) and "teacher.budget" in error.hint


def test_the_plan_counts_what_goes_in_batches_at_their_price(folder: Path, tmp_path: Path) -> None:
    """Prompts wait for a batch; the suite that proves the teacher, and its distributions, do not."""
    price = {"input": 1.0, "output": 1.0, "batch": 0.25}

    def planned(**more: Any) -> dict[str, Any]:
        session = prepared(folder, server.url, tmp_path / "store", **{"teacher.price": price, **more})
        works = {step.id: step.work.amount for step in session.plan.steps}
        return plan_json(session, rows_of(session))["teacher"] | {"waits": works["generate"]}

    with ModelServer(folder / "teacher", dtype="float32") as server:
        at_once, batched = planned(), planned(**{"teacher.batch": {}})
    assert at_once["money"] == pytest.approx(at_once["tokens"] / 1e6, rel=0.01)
    assert at_once["money"] - batched["money"] == pytest.approx(0.75 * batched["waits"] / 1e6, rel=0.05)
    assert batched["waits"] < 0.9 * batched["tokens"]
    assert "(in batches)" in batched["note"] and "(in batches)" not in at_once["note"]


def test_models_of_one_name_on_two_servers_have_accounts_of_their_own(folder: Path) -> None:
    def read(second: str, judge: str = "") -> Recipe:
        one = RECIPE.replace("URL", "http://127.0.0.1:1/v1")
        other = '[[teachers]]\nname = "second"\nrole = "recovery"\nbackend = "openai"\nmodel = "openai:teacher"\n'
        judge = (
            judge
            and f'[judge]\nbackend = "openai"\nmodel = "openai:teacher"\n{judge}[[filter]]\nkind = "judge"\nrubric = "?"\n'
        )
        (folder / "accounts.toml").write_text(one + other + second + judge)
        return load_recipe(folder / "accounts.toml")

    def accounts(recipe: Recipe) -> list[str]:
        return [account_of(recipe, one) for one in every_asked(recipe)]

    same, another = (f'server = "http://127.0.0.1:{port}/v1"\n' for port in (1, 2))
    priced = "price = { input = 1.0, output = 2.0 }\n"
    first = f"{read(same).name}: openai:teacher"
    assert accounts(read(same)) == [first] * 2  # as before
    assert accounts(read(another + priced)) == [first, f"{first} at http://127.0.0.1:2/v1"]
    assert accounts(read(another, another)) == [first, *[f"{first} at http://127.0.0.1:2/v1"] * 2]
    for second, judge, key in (
        (same + priced, "", "teachers[0].price"),
        (same + "budget = { tokens = 5 }\n", "", "teachers[0].budget"),
        (another + priced, another, "judge.price"),
        (another, same + "budget = { tokens = 5 }\n", "judge.budget"),
    ):
        with pytest.raises(RecipeError, match="one account") as caught:
            read(second, judge)
        assert caught.value.key == key


def test_a_server_that_is_none_of_openais_kind(folder: Path, tmp_path: Path) -> None:
    import http.server
    import threading

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        with pytest.raises(EdgeDistillError) as caught:
            prepared(folder, f"http://127.0.0.1:{files.server_port}/v1", tmp_path / "store")
        files.shutdown()
    assert "refuses (501)" in str(caught.value)
