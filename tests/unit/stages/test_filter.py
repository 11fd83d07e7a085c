"""What the student is taught of an answer that thinks first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.corrections import WRONG
from edgedistill.data.pairs import preference_pairs
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_thinking import ThinkingFilter

CALL = '{"name":"set_alarm"}'
WHY = "They want to be woken, so this is an alarm."


def make(style: str = "think") -> ThinkingFilter:
    return ThinkingFilter(answers=Key("a" * 64), rows_digest="", filters=(), rows=(), style=style)


def line(text: str, reference: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": "wake me"}]
    return {"id": "r", "messages": messages, "text": text, "reference": reference, "source": "teacher", "row": "k"}


def test_an_answer_is_judged_without_its_block() -> None:
    spec = {"kind": "reference", "metric": "json-exact"}
    assert make().passes(spec, join("think", WHY, CALL), join("think", "Other words.", CALL))
    assert not make().passes(spec, join("think", WHY, "{}"), CALL)
    assert not make().passes(spec, f"<think>{CALL}", CALL)  # the block never ends: there is no answer


def test_a_block_has_to_be_long_enough_and_within_the_budget() -> None:
    text = join("think", WHY, CALL)  # ten words
    assert make().passes({"kind": "thinking"}, text, "")
    assert make().passes({"kind": "thinking", "min_words": 10, "max_words": 10}, text, "")
    assert not make().passes({"kind": "thinking", "min_words": 11}, text, "")
    assert not make().passes({"kind": "thinking", "max_words": 9}, text, "")
    assert not make().passes({"kind": "thinking"}, CALL, "")


def test_thinking_is_learnt_whole() -> None:
    whole = line(join("think", WHY, CALL), join("think", "Gold words here.", CALL))
    assert make("think").lessons(whole) == [whole]


def test_a_rationale_is_a_task_of_its_own() -> None:
    answer, why = make("rationale").lessons(
        line(join("rationale", WHY, CALL), join("rationale", "Gold words here.", CALL))
    )
    assert (answer["id"], answer["text"], answer["reference"]) == ("r", CALL, CALL)
    assert (why["id"], why["text"], why["reference"], why["task"]) == ("r+why", WHY, "Gold words here.", "rationale")
    assert why["messages"][-1]["content"].startswith("wake me\n\n")
    assert answer["messages"][-1]["content"] == "wake me"
    (only,) = make("rationale").lessons(line(CALL, CALL))  # a reference without a rationale
    assert (only["text"], only["reference"]) == (CALL, CALL)
    assert make("rationale").lessons(line(join("think", WHY, CALL), CALL))[1]["reference"] is None


def test_a_teacher_that_does_not_think_is_told_of_before_anything_is_trained() -> None:
    good, empty = join("think", WHY, CALL), join("think", "", CALL)
    assert make().watch([good, good, empty]) == {
        "thinking": {"n": 3, "empty": pytest.approx(1 / 3), "median_words": 10}
    }
    with pytest.raises(StepFailed, match=r"thinking has collapsed: 67 % of the teacher's 3 answers|67%") as error:
        make().watch([good, empty, CALL])
    assert "rationale" in (error.value.hint or "")


def run(
    tmp_path: Path, stage: Filter, answers: list[tuple[str, str, str]], *, logprobs: list[float] | None = None
) -> tuple[dict[str, Any], Any]:
    """Run the stage over (row id, text, finish); return its facts and a reader of its files."""
    (tmp_path / "out").mkdir()
    lines = [
        {"id": row, "row": f"{row}-{at}", "sample": at, "text": text, "finish": finish, "logprob": logprob}
        for at, ((row, text, finish), logprob) in enumerate(
            zip(answers, logprobs or [-1.0] * len(answers), strict=True)
        )
    ]
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "rows.jsonl").write_text(written, encoding="utf-8")
    ctx: Any = SimpleNamespace(progress=lambda *_: None, out=tmp_path / "out", path=lambda _key, name: tmp_path / name)
    facts = dict(stage.run(ctx))
    return facts, lambda name: [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]


def rows(*ids: str) -> tuple[Row, ...]:
    return tuple(
        Row(id=name, messages=({"role": "user", "content": f"wake me, {name}"},), reference=CALL) for name in ids
    )


def test_kept_rejected_and_pairs(tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "gold"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("a", "b", "c"))
    answers = [("a", CALL, "stop"), ("a", "{}", "stop"), ("a", "{", "length"), ("b", "no", "stop"), ("c", CALL, "stop")]
    facts, read = run(tmp_path, stage, answers)
    assert (facts["kept"], facts["teacher"], facts["gold"]) == (3, 2, 1)
    assert [(one["id"], one["source"]) for one in read("kept.jsonl")] == [
        ("a", "teacher"),
        ("b", "gold"),
        ("c", "teacher"),
    ]
    assert sorted(one["why"] for one in read("rejected.jsonl")) == [
        "did not end", "reference (json-exact)", "reference (json-exact)",
    ]  # fmt: skip
    pairs = preference_pairs(tmp_path / "out")
    assert [(one["id"], one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in pairs] == [
        ("a", CALL, "{}"),
        ("b", CALL, "no"),
    ]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "wake me, a"}]


def test_pairs_of_a_row_whose_id_holds_the_sign_of_a_second_text_are_its_own(tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "drop"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("c", "c#7", "d"))
    answers = [("c", "no", "stop"), ("c#7", CALL, "stop"), ("c#7", "{}", "stop")]
    answers += [("d", CALL, "stop"), ("d", f" {CALL}", "stop"), ("d", "[]", "stop")]
    _, read = run(tmp_path, stage, answers)
    assert [one["id"] for one in read("kept.jsonl")] == ["c#7", "d", "d#1"]
    pairs = [
        (one["id"], one["prompt"][0]["content"], one["rejected"][0]["content"])
        for one in preference_pairs(tmp_path / "out")
    ]
    assert pairs == [("c#7", "wake me, c#7", "{}"), ("d", "wake me, d", "[]")]


def test_turns_of_a_trace_keep_its_name_and_their_tools(tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "tool-calls", "otherwise": "gold"}
    tools = ({"type": "function", "function": {"name": "set_alarm"}},)
    turns = tuple(dataclasses.replace(row, trace="t", tools=tools) for row in rows("t/1", "t/2"))
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=turns)
    _, read = run(tmp_path, stage, [("t/1", CALL, "stop"), ("t/1", "no", "stop"), ("t/2", "no", "stop")])
    assert [(one["id"], one["trace"], one["tools"], one["source"]) for one in read("kept.jsonl")] == [
        ("t/1", "t", list(tools), "teacher"),
        ("t/2", "t", list(tools), "gold"),
    ]
    assert [one["tools"] for one in preference_pairs(tmp_path / "out")] == [list(tools)] * 2


def test_a_rationale_doubles_what_is_learnt_of_a_row(tmp_path: Path) -> None:
    specs = (
        {"kind": "reference", "metric": "json-exact", "otherwise": "drop"},
        {"kind": "thinking", "otherwise": "drop"},
    )
    stage = ThinkingFilter(answers=Key("a" * 64), rows_digest="", filters=specs, rows=rows("a", "b"), style="rationale")
    answers = [
        ("a", join("think", WHY, CALL), "stop"),
        ("a", "<think>" + WHY, "stop"),
        ("b", join("think", "Well.", CALL), "stop"),
    ]
    facts, read = run(tmp_path, stage, answers)
    assert facts["kept"] == 1
    assert [one["id"] for one in read("kept.jsonl")] == ["a", "a+why"]
    assert [one["why"] for one in read("rejected.jsonl")] == ["no answer after the block", "thinking"]
    assert [one["chosen"][0]["content"] for one in preference_pairs(tmp_path / "out")] == [CALL]


def test_an_answer_before_its_block_is_judged_and_learnt_whole(tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "gold"}
    stage = ThinkingFilter(
        answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("a", "b"), style="explanation"
    )
    good = join("explanation", WHY, CALL)
    answers = [("a", good, "stop"), ("a", join("explanation", WHY, "{}"), "stop"), ("b", f"<why>{WHY}</why>", "stop")]
    facts, read = run(tmp_path, stage, answers)
    assert [(one["id"], one["text"]) for one in read("kept.jsonl")] == [("a", good), ("b", CALL)]
    assert [one["why"] for one in read("rejected.jsonl")] == ["no answer before the block", "reference (json-exact)"]
    assert facts["thinking"]["n"] == 3


def test_the_best_answers_that_differ_stay_and_the_others_are_no_mistakes(tmp_path: Path) -> None:
    reference = {"kind": "reference", "metric": "contains", "otherwise": "drop"}
    texts = ["woken at seven", "at seven", "at seven", "it is at seven", "at eight"]
    row = Row(id="a", messages=({"role": "user", "content": "when?"},), reference="at seven")
    kept = {}
    for by, keep in (("drawn", 1), ("shortest", 2), ("likelihood", 2)):
        spec = {"kind": "best", "otherwise": "drop", "keep": keep, "by": by}
        stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(reference, spec), rows=(row,))
        folder = tmp_path / by
        folder.mkdir()
        facts, read = run(
            folder, stage, [("a", text, "stop") for text in texts], logprobs=[-5.0, -3.0, -3.0, -1.0, -0.5]
        )
        kept[by] = [one["text"] for one in read("kept.jsonl")]
        assert facts["yields"][-1] == {"filter": "best", "in": 4, "out": keep}
        assert {one["rejected"][0]["content"] for one in preference_pairs(folder / "out")} == {"at eight"}
    assert kept == {
        "drawn": ["woken at seven"],
        "shortest": ["at seven", "woken at seven"],
        "likelihood": ["it is at seven", "at seven"],
    }


@pytest.mark.parametrize("style", ["answer", "think", "rationale"])
def test_a_wrong_answer_is_shown_and_the_right_one_learnt(style: str, tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "gold", "corrections": 1}
    fields: dict[str, Any] = {"answers": Key("a" * 64), "rows_digest": "", "filters": (spec,)}
    own = rows("a", "b", "c", "d")

    def text(answer: str) -> str:
        return answer if style == "answer" else join("think", WHY, answer)

    answers = [
        *(("a", text(answer), "stop") for answer in ("{}", "{}", "[]", CALL)),
        ("b", text("[1]"), "stop"),
        ("c", text(CALL), "stop"),
        ("d", "{", "length"),  # not wrong: it did not end
    ]
    stage = Filter(**fields, rows=own) if style == "answer" else ThinkingFilter(**fields, rows=own, style=style)
    facts, read = run(tmp_path, stage, answers)
    lessons = [one for one in read("kept.jsonl") if one.get("task") == "correction"]
    assert facts["corrections"] == 2 and facts["kept"] == 4
    assert [(one["id"], [m["content"] for m in one["messages"]]) for one in lessons] == [
        ("a+fix1", ["wake me, a", "{}", WRONG]),
        ("b+fix1", ["wake me, b", "[1]", WRONG]),
    ]
    taught = text(CALL) if style == "think" else CALL
    assert [(one["text"], one["source"]) for one in lessons] == [(taught, "teacher"), (CALL, "gold")]
    assert {one["id"] for one in preference_pairs(tmp_path / "out")} == {"a", "b"}


def test_what_is_kept_does_not_depend_on_keys_at_their_default(tmp_path: Path) -> None:
    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "gold"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("a"))
    facts, read = run(tmp_path, stage, [("a", "{}", "stop")])
    assert "corrections" not in facts and [one["id"] for one in read("kept.jsonl")] == ["a"]


@pytest.mark.slow
def test_pairs_train_under_trl(tmp_path: Path, smollm2: Path) -> None:
    """The file as it is, through TRL's own preference trainer, for one step."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    spec = {"kind": "reference", "metric": "json-exact", "otherwise": "gold"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("a", "b"))
    run(tmp_path, stage, [("a", CALL, "stop"), ("a", "{}", "stop"), ("b", "no", "stop")])
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in preference_pairs(tmp_path / "out")))
    data: Any = load_dataset("json", data_files=str(file), split="train")
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    trainer = DPOTrainer(
        model=LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, **options),
        train_dataset=data,
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 1


def test_filters_apply_in_their_order_and_each_says_why(tmp_path: Path) -> None:
    def row(name: str, prompt: str, reference: str | None = None) -> Row:
        return Row(id=name, messages=({"role": "user", "content": prompt},), reference=reference)

    rows = tuple(
        row(f"r{n}", prompt) for n, prompt in enumerate(("one", "two", "three", "four", "five", "six", "seven"))
    )
    call = '{"name":"add_to_list","arguments":{"item":"%s"}}'
    answers = [
        ("r0", call % "ripe green apples from the north market", "stop"),
        ("r0", call % "ripe green apples from the north market", "stop"),  # the same once more
        ("r1", "I'm sorry, but I can't help with that.", "stop"),
        ("r2", call % "mail for jane@acme-corp.com", "stop"),
        ("r3", '{"name":"dance"}', "stop"),
        ("r4", call % "the old mill by the river where the frogs sing at night", "stop"),
        ("r5", call % "endless", "length"),
        ("r6", call % "salt", "stop"),
    ]
    schema = {"type": "object", "required": ["name", "arguments"]}
    common = {"metric": "json-exact", "otherwise": "drop"}
    suite = (row("s0", "write: the old mill by the river where the frogs sing"),)
    stage = Filter(
        answers=Key("a" * 64),
        rows_digest="",
        filters=(
            {"kind": "refusals", **common},
            {"kind": "pii", **common},
            {"kind": "format", "json_schema": json.dumps(schema), "max_chars": 200, **common},
            {"kind": "duplicates", "similarity": 0.9, **common},
            {"kind": "decontaminate", "words": 8, "suites": {"holdout": "digest"}, **common},
        ),
        rows=rows,
        suites={"holdout": suite},
    )
    facts, read = run(tmp_path, stage, answers)
    assert [line["id"] for line in read("kept.jsonl")] == ["r0", "r6"]
    assert {line["id"]: line["why"] for line in read("rejected.jsonl")} == {
        "r0": "duplicates",
        "r1": "refusals",
        "r2": "pii: e-mail address",
        "r3": "format: not by the schema: required",
        "r4": "decontaminate: as in holdout s0",
        "r5": "did not end",
    }
    assert [(one["filter"], one["in"], one["out"]) for one in facts["yields"]] == [
        ("ended", 8, 7),
        ("refusals", 7, 6),
        ("pii", 6, 5),
        ("format", 5, 4),
        ("duplicates", 4, 3),
        ("decontaminate", 3, 2),
    ]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("decontaminate", "fine"), ("duplicates", "fine"), ("pii", "mail jane@acme-corp.com")],
)
def test_a_row_that_must_not_be_taught_is_taught_by_no_other_text(tmp_path: Path, kind: str, text: str) -> None:
    messages = ({"role": "user", "content": "Wake me at seven, please"},)
    rows = tuple(Row(id=name, messages=messages, reference="fine") for name in ("a", "b"))
    suite = (Row(id="s", messages=({"role": "user", "content": "wake me at seven please"},), reference="x"),)
    common = {"metric": "contains"}
    for otherwise in ({"otherwise": "gold"}, {"otherwise": "hedge", "hedge": "I do not know."}):
        filters = ({"kind": kind, "otherwise": "drop", **common}, {"kind": "refusals", **common, **otherwise})
        stage = Filter(answers=Key("a" * 64), rows_digest="", filters=filters, rows=rows, suites={"suite": suite})
        folder = tmp_path / otherwise["otherwise"]
        folder.mkdir()
        answers = [("a", "no" if kind == "pii" else text, "stop"), ("b", text, "stop")]
        try:
            _, read = run(folder, stage, answers)
        except StepFailed:
            assert kind == "decontaminate"  # of both rows
            continue
        assert [line["id"] for line in read("kept.jsonl")] == ["a"]


def test_answers_that_are_no_json_agree_or_not_without_a_crash(tmp_path: Path) -> None:
    spec = {"kind": "agreement", "metric": "json-exact", "otherwise": "drop", "share": 0.5, "samples": 3}
    rows = (Row(id="a", messages=({"role": "user", "content": "a"},)),)
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows)
    facts, _ = run(tmp_path, stage, [("a", text, "stop") for text in ("Sure! {}", "{}", "{ }")])
    assert facts["kept"] == 2


def test_the_only_answer_that_ended_does_not_agree_with_itself(tmp_path: Path) -> None:
    spec = {"kind": "agreement", "metric": "exact", "otherwise": "drop", "samples": 3}
    rows = tuple(Row(id=name, messages=({"role": "user", "content": name},)) for name in ("a", "b"))
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows)
    answers = [("a", "Oslo", "stop"), ("a", "Oslo", "length"), ("a", "Bergen", "length")]
    answers += [("b", "Oslo", "stop"), ("b", "Oslo", "stop"), ("b", "Oslo, I", "length")]
    facts, read = run(tmp_path, stage, answers)
    assert [line["id"] for line in read("kept.jsonl")] == ["b", "b#1"] and facts["kept"] == 2
    assert [(line["id"], line["why"]) for line in read("rejected.jsonl") if line["finish"] == "stop"] == [
        ("a", "agreement")
    ]


def test_answers_are_believed_that_most_samples_give(tmp_path: Path) -> None:
    rows = tuple(Row(id=name, messages=({"role": "user", "content": name},)) for name in ("a", "b"))
    spec = {"kind": "agreement", "metric": "json-exact", "otherwise": "drop", "share": 0.5, "samples": 3}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows)
    answers = [("a", '{"x": 1, "y": 2}', "stop"), ("a", '{"y":2,"x":1}', "stop"), ("a", '{"x": 2}', "stop")]
    answers += [("b", "1", "stop"), ("b", "2", "stop"), ("b", "3", "stop")]
    facts, read = run(tmp_path, stage, answers)
    assert [(line["id"], json.loads(line["text"])) for line in read("kept.jsonl")] == [
        ("a", {"x": 1, "y": 2}),
        ("a#1", {"x": 1, "y": 2}),
    ]
    assert {line["why"] for line in read("rejected.jsonl")} == {"agreement"}
    # of answers that think first, what stands after the block is compared
    think = dataclasses.replace(make(), filters=(spec,), rows=rows[:1])
    folder = tmp_path / "think"
    folder.mkdir()
    thoughts = [
        ("a", join("think", why, answer), "stop")
        for why, answer in ((WHY, "1"), ("Other words here.", "1"), (WHY, "2"))
    ]
    facts, read = run(folder, think, thoughts)
    assert facts["kept"] == 2


def test_thinking_that_comes_to_something_else_is_dropped_where_that_is_asked(tmp_path: Path) -> None:
    answers = [
        ("a", join("think", "Two and two make 5.", "4"), "stop"),
        ("b", join("think", "They make 4.", "4"), "stop"),
    ]
    for name, more, whys in (("off", {}, []), ("on", {"supports": True}, ["thinking: does not come to the answer"])):
        spec = {"kind": "thinking", "otherwise": "drop", **more}
        stage = ThinkingFilter(
            answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=rows("a", "b"), style="think"
        )
        (tmp_path / name).mkdir()
        _, read = run(tmp_path / name, stage, answers)
        assert [one["why"] for one in read("rejected.jsonl")] == whys


def test_an_answer_may_hold_a_separator_of_lines(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    rows = (Row(id="r", messages=({"role": "user", "content": "q"},)),)
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(), rows=rows)
    run(tmp_path, stage, [("r", text, "stop")])
    kept = (tmp_path / "out" / "kept.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(one)["text"] for one in kept if one] == [text]
