"""The turns of a trace in one sequence: the same losses as each turn alone, and nothing learnt of a tool's result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import parse_row
from edgedistill.data.traces import turns
from edgedistill.training.data import Example, counter_rng
from edgedistill.training.losses import LossTerms, batch_targets, completion_loss
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.recipe import encode_rows, load_kept
from edgedistill.training.traces import join_turns
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.tool_template import TEMPLATE, trace
from tests.unit.training.tiny import VOCAB, make_llama, score

Turn = tuple[list[int], list[int]]  # what stands before a completion since the last one, and the completion


def example(turns: list[Turn], at: int, name: str = "t") -> Example:
    prompt: list[int] = []
    for before, completion in turns[:at]:
        prompt += before + completion
    return Example(f"{name}/{at + 1}", (*prompt, *turns[at][0]), tuple(turns[at][1]))


def made(name: str, count: int, seed: int) -> list[Example]:
    rng = counter_rng("traces", seed)
    sizes = rng.integers(2, 7, (count, 2))
    found = [tuple(rng.integers(0, VOCAB, size).tolist() for size in pair) for pair in sizes]
    return [example(found, at, name) for at in range(count)]  # pyright: ignore[reportArgumentType]


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5))
def test_a_recorded_trace_is_one_sequence_whose_turns_alone_weigh(found: list[Turn]) -> None:
    (whole,) = join_turns([example(found, at) for at in range(len(found))])
    every = [token for before, completion in found for token in (*before, *completion)]
    assert [*whole.prompt_ids, *whole.completion_ids] == every
    weights = [weight for before, completion in found for weight in (*[0.0] * len(before), *[1.0] * len(completion))]
    assert [*[0.0] * len(whole.prompt_ids), *whole.token_weights] == weights
    assert whole.id == "t/1"


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), st.data())
def test_no_weight_is_lost_or_doubled_whatever_the_teacher_wrote(found: list[Turn], data: Any) -> None:
    """A turn in other words than the record ends its sequence; every turn is still learnt once, after its own prompt."""
    rows = [example(found, at) for at in range(len(found))]
    said = [Example(row.id, row.prompt_ids, tuple(data.draw(tokens))) for row in rows]
    # Token by token: where a reply happens to be the next prompt's beginning, whole, two turns learn side by side.
    expected = sorted(
        ((*row.prompt_ids, *row.completion_ids[:at]), token)
        for row in said
        for at, token in enumerate(row.completion_ids)
    )
    learnt = []
    for one in join_turns(said):
        ids, weights = (*one.prompt_ids, *one.completion_ids), (*(0.0 for _ in one.prompt_ids), *one.token_weights)
        learnt += [(ids[:at], token) for at, token in enumerate(ids) if weights[at]]
    assert sorted(learnt) == expected


def loss(model: Any, examples: list[Example], *, packed: bool, soft: Any = None) -> torch.Tensor:
    batch_soft = batch_targets(soft, 1.0) if soft else None

    def run() -> torch.Tensor:
        batch = make_batch(examples, packed=packed)
        terms = LossTerms(kd=0.7, ce=0.3) if soft else LossTerms(ce=1.0)
        states = completion_states(model, batch)
        kd, ce = completion_loss(model, states, batch.targets, batch.weights, batch_soft, terms, vocab_size=VOCAB)
        return kd + ce

    if not packed:
        return run()
    with packed_mode(model) as on:
        assert on
        return run()


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_that_of_each_turn_alone_through_the_models_own_forward(packed: bool) -> None:
    model = make_llama()
    rows = [made(f"t{n}", count, n) for n, count in enumerate((3, 1, 4))]
    plain = 0.0
    for row in (one for group in rows for one in group):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        plain += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion_ids), reduction="sum"))
    joined = [one for group in rows for one in join_turns(group)]
    assert len(joined) == 3
    assert loss(model, joined, packed=packed).item() == pytest.approx(plain, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss(model, joined, packed=packed), model.model.layers[0].mlp.up_proj.weight)
    apart = [one for group in rows for one in group]
    (alone,) = torch.autograd.grad(loss(model, apart, packed=False), model.model.layers[0].mlp.up_proj.weight)
    assert float((gradient - alone).norm() / alone.norm()) < 1e-4


@pytest.mark.parametrize("packed", [True, False])
def test_soft_targets_between_two_turns_teach_nothing(packed: bool) -> None:
    model, teacher = make_llama(), make_llama(seed=1)
    turns = made("t", 3, 5)
    joined = join_turns(turns)
    (soft,) = score(teacher, joined, kind="top-k", n=8)
    apart = score(teacher, turns, kind="top-k", n=8)
    told = loss(model, joined, packed=packed, soft=[soft]).item()
    assert told == pytest.approx(loss(model, turns, packed=packed, soft=apart).item(), rel=1e-4)
    # Other distributions where the results of tools stand change nothing.
    weights = np.asarray(joined[0].token_weights)
    assert (weights == 0).any()
    other = soft.logp.copy()
    other[weights[soft.rows] == 0] -= 3.0
    soft.logp[:] = other
    assert loss(model, joined, packed=packed, soft=[soft]).item() == pytest.approx(told, rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("traces") / "tiny", max_position_embeddings=1024)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


def test_the_sequence_is_the_conversation_as_the_template_writes_it(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from edgedistill.chat import Chat

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = Chat(source="x", template=TEMPLATE, for_tools=TEMPLATE, bos="", eos="")
    rows = turns([parse_row(trace("rain"), "x:1", traces=True)], lambda: chat.render)
    (one,) = encode_rows(rows, folder)
    record = trace("rain")
    record["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    record["messages"][1]["content"] = ""
    text = tokenizer.apply_chat_template(record["messages"], tools=record["tools"], tokenize=False)
    whole = tokenizer.encode(text, add_special_tokens=False)
    ids = [*one.prompt_ids, *one.completion_ids]
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""  # the template's line end after the turn
    learnt = [token for token, weight in zip(one.completion_ids, one.token_weights, strict=True) if weight]
    assert tokenizer.decode(learnt) == f"{rows[0].reference}<|im_end|>Yes, take an umbrella.<|im_end|>"
    # What the filters kept is read in the same way, and lines of no trace as ever.
    kept = [
        {"id": r.id, "messages": list(r.messages), "text": r.reference, "tools": list(r.tools), "trace": r.trace}
        for r in rows
    ]
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert load_kept(path, folder)[0] == [one]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "trace"}) + "\n" for line in kept))
    assert [row.id for row in load_kept(path, folder)[0]] == ["rain/1", "rain/2"]


def test_a_template_that_rewrites_earlier_turns_leaves_each_a_row_of_its_own(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "tokenizer_config.json"
    short = TEMPLATE.replace("{{ m.content or '' }}", "{{ (m.content or '')[:4] }}")
    assert short != TEMPLATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": short}))
    record = trace("rain")
    record["messages"][1] = {"role": "assistant", "content": "I look it up."}
    rows = turns([parse_row(record, "x:1", traces=True)], lambda: pytest.fail("not needed"))
    assert [one.id for one in encode_rows(rows, other)] == ["rain/1", "rain/2"]
    assert [one.id for one in encode_rows(rows, folder)] == ["rain/1"]


def test_the_teacher_is_shown_the_tools(folder: Path) -> None:
    from edgedistill.teachers.transformers import TransformersTeacher

    teacher = TransformersTeacher(folder)
    row = parse_row({"id": "a", "prompt": "Will it rain?", "tools": trace()["tools"]}, "x:1")
    shown, bare = teacher.encode([list(row.messages)] * 2, ["a", "b"], tools=[list(row.tools), []])
    text = teacher.tokenizer.apply_chat_template(
        list(row.messages), tools=list(row.tools), add_generation_prompt=True, tokenize=False
    )
    assert shown == teacher.tokenizer.encode(text, add_special_tokens=False)
    assert bare == teacher.encode([list(row.messages)], ["b"])[0] != shown
