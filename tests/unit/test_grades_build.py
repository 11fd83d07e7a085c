"""Filters by a model, through the real stages: grades are made once, checked against a plain forward, and read by any threshold."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.errors import EdgeDistillError, RecipeError
from edgedistill.report import collect
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.stages.generate import Judge
from edgedistill.store import Store
from tests.judge_server import JudgeServer
from tests.unit.evals.test_embedding import make_encoder, plain_vectors
from tests.unit.taught import WORDS, make_taught

RECIPE = """
schema  = 1
name    = "graded"
targets = ["laptop-x86"]
[teacher]
model = "path:teacher"
[student]
model = "path:model"
[prompts]
files = ["rows.jsonl"]
[generate]
samples        = 3
temperature    = 1.2
max_new_tokens = 12
[distill]
method = "full"
epochs = 1
"""
JUDGE = {"model": "openai:judge", "backend": "openai", "retries": 0, "concurrency": 4}


def make_classifier(folder: Path, source: Path, *, labels: int = 1, **config: Any) -> Path:
    """Write a random sequence classifier with the tokenizer of another tiny model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    torch.manual_seed(3)
    settings = AutoConfig.from_pretrained(source)
    for name, value in {"num_labels": labels, **config}.items():
        setattr(settings, name, value)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_taught(tmp_path_factory.mktemp("graded"))
    (folder / "recipe.toml").write_text(RECIPE)
    make_classifier(folder / "reward", folder / "model", pad_token_id=0)
    make_classifier(folder / "unpadded", folder / "model", pad_token_id=None)
    make_classifier(folder / "labels", folder / "model", labels=3)
    make_encoder(folder / "encoder", folder / "model")
    return folder


def prepared(folder: Path, store: Path, *filters: dict[str, Any], **overrides: Any) -> Session:
    return prepare(folder, store=Store(store), overrides={"filter": list(filters), **overrides})


def build(session: Session, until: str = "filter") -> list[str]:
    """Build up to a step; return the steps that ran."""
    outcome = Runner(session.plan.only(session.plan.match(until)), session.store).build()
    assert not outcome.failed, outcome.failed
    return list(outcome.ran)


def entry(session: Session, step: str) -> Any:
    found = session.store.load(session.plan.match(step)[0].key)
    assert found is not None
    return found


def lines(session: Session, step: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (entry(session, step).path / name).read_text().splitlines()]


def grades(session: Session, step: str) -> dict[str, float]:
    return {one["row"]: one["grade"] for one in lines(session, step, "grades.jsonl")}


def conversation(answer: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {answer['id']}."}, {"role": "assistant", "content": answer["text"]}]


def test_perplexity_is_that_of_a_plain_forward_and_a_threshold_grades_nothing_anew(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = {"kind": "perplexity", "model": "teacher", "max": 3.0}
    session = prepared(folder, tmp_path, spec)
    assert {"generate", "grade/perplexity", "filter"} <= set(build(session))
    answers = [one for one in lines(session, "generate", "rows.jsonl") if one["finish"] == "stop"]
    found = grades(session, "grade/perplexity")
    assert {one["row"] for one in answers} == set(found) and len({one["text"] for one in answers}) > len(WORDS) // 2
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "teacher")
    for one in answers[:12]:
        asked, said = conversation(one)
        prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(
            prompt + said["content"] + "<|im_end|>", add_special_tokens=False, return_tensors="pt"
        ).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:])
        # In bf16 where that is fast: what a token's log-probability is off by grows with it.
        assert math.log(found[one["row"]]) == pytest.approx(loss.item(), rel=0.02, abs=0.03)
    told = entry(session, "grade/perplexity").facts["grades"]
    assert told["n"] == len(found) and told["min"] <= told["quantiles"]["0.5"] <= told["max"]

    why = {one["row"]: one["why"] for one in lines(session, "filter", "rejected.jsonl") if one["finish"] == "stop"}
    assert {key for key, value in found.items() if value > 3} == set(why) != set(found)
    assert all(re.fullmatch(r"perplexity: [\d.e+]+ over 3", one) for one in why.values())
    middle = told["quantiles"]["0.5"]
    again = prepared(folder, tmp_path, {**spec, "max": middle, "min": 1.0})
    assert build(again) == ["filter"]
    assert entry(again, "filter").facts["yields"][-1]["out"] == sum(value <= middle for value in found.values())
    student = prepared(folder, tmp_path, {**spec, "model": "student", "max": 1e9})
    assert "grade/perplexity" in build(student) and grades(student, "grade/perplexity") != found
    collect(again)


def test_a_reward_model_scores_as_a_plain_forward_does_and_keeps_the_best(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    session = prepared(
        folder,
        tmp_path,
        {"kind": "reward", "model": "path:reward", "keep": 1},
        {"kind": "reward", "model": "path:unpadded", "min": -1e9},
        {"kind": "reward", "model": "path:labels", "label": "LABEL_2", "min": 0.0},
    )
    build(session)
    answers = [one for one in lines(session, "generate", "rows.jsonl") if one["finish"] == "stop"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    for step, name in (("grade/reward", "reward"), ("grade/reward-2", "unpadded"), ("grade/reward-3", "labels")):
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder / name, dtype=torch.float32).eval()
        found = grades(session, step)
        assert len(found) == len(answers)
        for one in answers[:12]:
            text = tokenizer.apply_chat_template(conversation(one), tokenize=False)
            with torch.no_grad():
                logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0]
            wanted = logits[0] if name != "labels" else logits.softmax(-1)[2]
            assert found[one["row"]] == pytest.approx(wanted.item(), abs=0.03)
    found, kept = grades(session, "grade/reward"), lines(session, "filter", "kept.jsonl")
    assert len({one["id"] for one in kept}) == len(kept)  # one of each prompt
    for one in kept:
        assert found[one["row"]] == max(found[a["row"]] for a in answers if a["id"] == one["id"])
    assert "reward: not among the best 1" in {one["why"] for one in lines(session, "filter", "rejected.jsonl")}
    least = sorted(found.values())[len(found) // 2]
    other = {"kind": "reward", "model": "path:reward", "min": least}
    again = prepared(folder, tmp_path, other)
    assert build(again) == ["filter"]
    assert entry(again, "filter").facts["yields"][-1]["out"] == sum(one >= least for one in found.values())


def answer_in(text: str) -> list[str]:
    return re.findall(r"<answer>\n(.*?)\n</answer>", text, re.DOTALL)


def test_a_judge_is_asked_once_and_its_scores_are_read_by_any_threshold(folder: Path, tmp_path: Path) -> None:
    def says(text: str) -> str:
        (answer,) = answer_in(text)
        wanted = re.search(r"\[user\]\nSay (\w+)\.", text)
        assert wanted is not None and "Is the word said" in text
        if answer != wanted[1]:
            return "Another word.\nScore: 2" if len(answer) % 2 else "I would rather not say."
        return "It is.\n**Score: 5**"

    spec = {"kind": "judge", "rubric": "Is the word said, and nothing more?"}
    with JudgeServer(says) as server:
        judge = {"judge": {**JUDGE, "server": server.url}}
        session = prepared(folder, tmp_path, spec, **judge)
        assert "grade/judge" in build(session)
        asked = len(server.asked)
        answers = [one for one in lines(session, "generate", "rows.jsonl") if one["finish"] == "stop"]
        assert asked == len({(one["id"], one["text"]) for one in answers}) == len(set(server.asked))
        right = {one["row"] for one in answers if one["text"].strip() == one["id"]}
        found = grades(session, "grade/judge")
        assert {key for key, value in found.items() if value == 5} == right and right
        facts = entry(session, "grade/judge").facts
        assert facts["grades"]["histogram"]["5"] == len(right) and sum(facts["grades"]["histogram"].values()) == len(
            found
        )
        why = [one["why"] for one in lines(session, "filter", "rejected.jsonl") if one["finish"] == "stop"]
        assert set(why) <= {"judge: 2 under 4", "judge: no verdict"} and len(why) == len(found) - len(right)
        assert build(prepared(folder, tmp_path, {**spec, "min": 2}, **judge)) == ["filter"]
        # a rubric of its own is another question, and the old verdicts stay
        build(prepared(folder, tmp_path, {**spec, "rubric": "Is the word said?"}, **judge))
        assert len(server.asked) == 2 * asked
        shutil.rmtree(entry(session, "grade/judge").path)
        assert "grade/judge" in build(prepared(folder, tmp_path, spec, **judge)) and len(server.asked) == 2 * asked
    assert RowStore(tmp_path).asked_again() == []
    assert collect(session).yields["yields"][-1]["filter"] == "judge"


@pytest.mark.parametrize("bias", ["", "1", "tie"])
def test_compared_with_the_reference_its_place_wins_nothing(folder: Path, tmp_path: Path, bias: str) -> None:
    def says(text: str) -> str:
        first, second = answer_in(text)
        wanted = re.search(r"\[user\]\nSay (\w+)\.", text)
        assert wanted is not None and wanted[1] in (first, second)  # the reference is one of them
        better = "tie" if first == second else "1" if first == wanted[1] else "2"
        return f"Well.\nWinner: {bias or better}"

    with JudgeServer(says) as server:
        spec = {"kind": "judge", "rubric": "Is the word said?", "against": "reference"}
        judge = {"judge": {**JUDGE, "server": server.url}}
        session = prepared(folder, tmp_path, spec, {"kind": "pii", "otherwise": "gold"}, **judge)
        build(session)
        answers = [one for one in lines(session, "generate", "rows.jsonl") if one["finish"] == "stop"]
        # texts that are the reference are asked about once: both orders are the same question
        pairs = {(one["id"], one["text"].strip()) for one in answers}
        assert len(server.asked) == sum(1 if row == text else 2 for row, text in pairs)
    right = {one["row"] for one in answers if one["text"].strip() == one["id"]}
    good = {key for key, value in grades(session, "grade/judge").items() if value}
    assert good == {"": right, "1": set(), "tie": {one["row"] for one in answers}}[bias]


def test_prompts_that_are_the_same_with_several_references_are_judged_anew(folder: Path, tmp_path: Path) -> None:
    """The step's key was once the same whether they were told apart or not."""
    twice = [{"id": f"{word}{at}", "prompt": "Say a word.", "reference": word} for at, word in enumerate(WORDS[:2] * 2)]
    with JudgeServer(lambda text: "Winner: tie") as server:
        for name, rows, told in (("twice", twice, True), ("once", twice[::2], False)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            spec = {"kind": "judge", "rubric": "Is the word said?", "against": "reference"}
            more = {"judge": {**JUDGE, "server": server.url}, "prompts": {"files": [f"{name}.jsonl"]}}
            (step,) = prepared(folder, tmp_path, spec, {"kind": "pii"}, **more).plan.match("grade/judge")
            assert isinstance(step.stage, Judge) and step.stage.apart == told


def test_a_judge_by_the_teachers_own_weights(folder: Path, tmp_path: Path) -> None:
    spec = {"kind": "judge", "rubric": "Is the word said?", "max_new_tokens": 8, "otherwise": "gold"}
    session = prepared(folder, tmp_path, spec)
    build(session)
    assert set(grades(session, "grade/judge").values()) == {None}  # it was taught other things
    facts = entry(session, "grade/judge").facts
    assert facts["grades"]["histogram"] == {"none": facts["grades"]["n"]} and facts["asked"] > 0
    assert entry(session, "filter").facts["gold"] == len(WORDS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "reward", "model": "path:model", "min": 0}, r"filter\.0\.model: .*LlamaForCausalLM is no sequence classifier"),
        ({"kind": "reward", "model": "path:labels", "min": 0}, "several labels: LABEL_0, LABEL_1, LABEL_2"),
        ({"kind": "reward", "model": "path:reward", "label": "good", "min": 0}, "gives one score and has no labels"),
        ({"kind": "reward", "model": "path:reward"}, "set min, or keep"),
        ({"kind": "reward", "min": 1}, "which classifier"),
        ({"kind": "perplexity", "model": "path:reward", "max": 9}, "does not generate text"),
        ({"kind": "perplexity"}, "of which perplexity"),
        ({"kind": "perplexity", "min": 3, "max": 2}, "nothing would pass"),
        ({"kind": "judge"}, "by what is it judged"),
        ({"kind": "judge", "rubric": "Good?", "min": 7}, "from 1 to 5"),
        ({"kind": "judge", "rubric": "Good?", "min": 3, "against": "reference"}, "has no score"),
        ({"kind": "reference", "max": 2}, 'this is for kind = "perplexity"'),
        ({"kind": "reference", "keep": 2}, 'this is for kind = "best" or "reward"'),
    ],
)  # fmt: skip
def test_plan_refuses_what_cannot_grade(folder: Path, tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared(folder, tmp_path, spec)


def test_a_judge_needs_something_to_judge(folder: Path, tmp_path: Path) -> None:
    table = {**JUDGE, "server": "http://127.0.0.1:9/v1"}
    with pytest.raises(RecipeError, match="there is nothing to judge"):
        prepared(folder, tmp_path, judge=table)
    with pytest.raises(EdgeDistillError, match="does not answer") as error:
        prepared(folder, tmp_path, {"kind": "judge", "rubric": "Good?"}, judge=table)
    assert "judge.server" in error.value.hint


def test_rows_of_one_meaning_go_and_another_threshold_embeds_nothing_anew(folder: Path, tmp_path: Path) -> None:
    spec = {"kind": "duplicates", "model": "path:encoder", "similarity": 0.999}
    session = prepared(folder, tmp_path, spec)
    assert {"base/encoder", "embed/duplicates", "filter"} <= set(build(session))
    answers = [one for one in lines(session, "generate", "rows.jsonl") if one["finish"] == "stop"]
    made = entry(session, "embed/duplicates")
    assert made.facts == {"embedded": len(answers), "size": 32, "pooling": "mean"}
    assert (made.path / "keys.txt").read_text().split() == [one["row"] for one in answers]
    vectors = np.fromfile(made.path / "vectors.f32", dtype=np.float32).reshape(-1, 32)
    texts = [f"Say {one['id']}.\n{one['text']}" for one in answers]
    assert np.allclose(vectors, plain_vectors(folder / "encoder", texts, "mean"), atol=2e-5)

    def expected(similarity: float) -> set[str]:
        kept: list[np.ndarray] = []
        gone = set()
        for one, vector in zip(answers, vectors.astype(np.float64), strict=True):
            if any(vector @ other >= similarity for other in kept):
                gone.add(one["row"])
            else:
                kept.append(vector)
        return gone

    whys = {one["row"]: one["why"] for one in lines(session, "filter", "rejected.jsonl") if one["finish"] == "stop"}
    assert set(whys) == expected(0.999) and set(whys.values()) == {"duplicates"}
    again = prepared(folder, tmp_path, {**spec, "similarity": 0.95})
    assert build(again) == ["filter"]
    whys = {one["row"] for one in lines(again, "filter", "rejected.jsonl") if one["finish"] == "stop"}
    assert whys == expected(0.95) > expected(0.999)
    default = prepared(folder, tmp_path, {"kind": "duplicates", "model": "path:encoder"})
    (step,) = default.plan.match("filter")
    assert step.stage.fields()["filters"][0]["similarity"] == 0.9
    other = prepared(folder, tmp_path, {**spec, "pooling": "cls"})
    assert {"embed/duplicates", "filter"} == set(build(other))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "duplicates", "pooling": "mean"}, "of which encoder"),
        ({"kind": "pii", "pooling": "mean"}, 'pooling: this is for kind = "duplicates"'),
        ({"kind": "duplicates", "model": "path:teacher"}, "a decoder, and nothing says how"),
        ({"kind": "duplicates", "model": "path:nowhere"}, r"filter\.0\.model: .*nowhere.*no such file or folder"),
        ({"kind": "duplicates", "model": "student"}, "unknown kind of source"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_plan(
    folder: Path, tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        prepared(folder, tmp_path, spec)
    assert prepared(folder, tmp_path, {"kind": "duplicates", "model": "path:teacher", "pooling": "last"}).plan


def test_duplicates_by_words_have_the_key_that_they_had(folder: Path, tmp_path: Path) -> None:
    (step,) = prepared(folder, tmp_path, {"kind": "duplicates"}).plan.match("filter")
    assert step.stage.fields()["filters"] == ({"kind": "duplicates", "metric": "json-exact", "otherwise": "drop"},)
