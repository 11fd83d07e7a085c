"""The same model in llama.cpp and in transformers: the same answers, the same draws, the same distributions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from edgedistill.data.filters import schema_validator
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.convert import convert
from edgedistill.teachers.llama_cpp import LlamaCppTeacher, gbnf
from edgedistill.teachers.protocol import Answer, Sampling, Teacher
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.data import Example
from edgedistill.training.targets import SparseTargets
from tests.unit.formats.gguf.conftest import TEXT, make_model

PROMPTS = [[{"role": "user", "content": " ".join(TEXT[-1].split()[: 1 + n % 9]) + f" {n}"}] for n in range(12)]
NAMES = [f"r{n}" for n in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return convert(folder, folder.parent / "tiny.gguf", dtype="f32").path


@pytest.fixture(scope="module")
def reference(folder: Path) -> TransformersTeacher:
    return TransformersTeacher(folder, "float32")


@pytest.fixture(scope="module")
def teacher(file: Path, reference: TransformersTeacher) -> LlamaCppTeacher:
    return LlamaCppTeacher(file, tokenizer=reference.tokenizer)


def answers(one: Any, sampling: Sampling) -> dict[tuple[int, int], Answer]:
    return {(answer.index, answer.sample): answer for answer in one.generate(PROMPTS, sampling=sampling, row_ids=NAMES)}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, samples=3, seed=4),
        Sampling(max_new_tokens=5, temperature=1.5, samples=2),
    ],
)
def test_it_writes_what_transformers_writes(
    teacher: LlamaCppTeacher, reference: TransformersTeacher, sampling: Sampling
) -> None:
    ours, theirs = answers(teacher, sampling), answers(reference, sampling)
    assert list(ours) == sorted(theirs)
    # The cache in f16 moves logits by a hundredth, and this model is near to knowing nothing: a draw at the edge of a token may
    # fall beside it, and from there on the answers differ.
    agree = [alike(ours[key].token_ids, theirs[key].token_ids) for key in ours]
    assert sum(agree) >= 0.8 * sum(len(answer.token_ids) for answer in theirs.values())
    same = [key for key in ours if ours[key].token_ids == theirs[key].token_ids]
    assert len(same) >= 0.7 * len(ours)
    for key in same:
        assert ours[key].text == theirs[key].text
        assert ours[key].finish_reason == theirs[key].finish_reason
        assert ours[key].logprob == pytest.approx(theirs[key].logprob, abs=0.1)


def alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))


def test_answers_are_stored_as_they_end_and_asked_as_they_are_put(teacher: LlamaCppTeacher) -> None:
    events: list[tuple[str, int]] = []
    left = list(
        teacher.generate(
            PROMPTS,
            sampling=Sampling(max_new_tokens=4),
            on_ask=lambda at: events.append(("ask", at)),
            on_batch=lambda batch: events.extend(("end", answer.index) for answer in batch),
        )
    )
    assert not left  # they were handed over
    for at in range(len(PROMPTS)):
        assert events.index(("ask", at)) < events.index(("end", at))
    assert len(events) == 2 * len(PROMPTS)


def examples(reference: TransformersTeacher) -> list[Example]:
    encode = reference.tokenizer.encode
    return [
        Example(
            f"e{n}", tuple(encode(" ".join(TEXT[n % len(TEXT)].split()[:6]))), tuple(encode(f" the answer {n * 37}."))
        )
        for n in range(9)
    ]


@pytest.mark.parametrize("kind", ["top-k", "sampled", "top-sampled"])
def test_it_scores_as_transformers_does(
    teacher: LlamaCppTeacher, reference: TransformersTeacher, kind: Literal["top-k", "sampled", "top-sampled"]
) -> None:
    given = examples(reference)
    ours = dict(teacher.score(given, kind=kind, n=12, temperature=1.5, seed=3))
    theirs = dict(reference.score(given, kind=kind, n=12, temperature=1.5, seed=3))
    assert ours.keys() == theirs.keys() == set(range(len(given)))
    assert teacher.tokenizer_hash == reference.tokenizer_hash
    shared = total = 0
    for at, one in ours.items():
        other = theirs[at]
        np.testing.assert_allclose(one.normalisers, other.normalisers, atol=0.02)
        for place in range(len(given[at].completion_ids)):
            mine, yours = kept(one, place), kept(other, place)
            shared, total = shared + len(mine.keys() & yours.keys()), total + len(yours)
            assert all(mine[token] == pytest.approx(yours[token], abs=0.03) for token in mine.keys() & yours.keys())
    assert shared >= 0.95 * total


def kept(targets: SparseTargets, place: int) -> dict[int, float]:
    span = slice(targets.offsets[place], targets.offsets[place + 1])
    return dict(zip(targets.ids[span].tolist(), targets.logp[span].tolist(), strict=True))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["set_alarm", "call"]}, "at": {"enum": [1, 22, 333]}, "again": {"type": "boolean"}},
    "required": ["name", "at", "again"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_under_a_schema_it_writes_nothing_else(file: Path, folder: Path, temperature: float) -> None:
    valid = schema_validator(SCHEMA)
    with LlamaCppTeacher(file) as guided:
        sampling = Sampling(max_new_tokens=80, temperature=temperature, samples=2, seed=1)
        schemas = [json.dumps(SCHEMA)] * len(PROMPTS)
        found = list(guided.generate(PROMPTS, sampling=sampling, row_ids=NAMES, json_schemas=schemas))
    ended = [answer for answer in found if answer.finish_reason == "stop"]
    assert len(ended) >= 0.9 * len(found)  # a model that knows nothing may write spaces for ever
    assert [valid(answer.text) for answer in ended] == [""] * len(ended)
    assert all(list(json.loads(answer.text)) == ["name", "at", "again"] for answer in ended)
    # what was written is what its likelihood is of, and not what was picked before the grammar
    model = TransformersTeacher(folder, "float32")
    prompts = model.encode(PROMPTS, NAMES)
    for answer in ended[:4]:
        whole = [*prompts[answer.index], *answer.token_ids]
        with torch.no_grad():
            logp = torch.log_softmax(model.model(input_ids=torch.tensor([whole])).logits[0], -1)
        places = range(len(prompts[answer.index]) - 1, len(whole) - 1)
        total = sum(float(logp[place, whole[place + 1]]) for place in places)
        ends = max(float(logp[-1, token]) for token in model.stop_ids())
        assert answer.logprob == pytest.approx(total + ends, abs=0.3)


def test_each_prompt_may_have_a_schema_of_its_own(file: Path) -> None:
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    schemas = [json.dumps(turned if at % 2 else SCHEMA) for at in range(len(PROMPTS))]
    with LlamaCppTeacher(file) as teacher:
        sampling = Sampling(max_new_tokens=80)
        found = list(teacher.generate(PROMPTS, sampling=sampling, row_ids=NAMES, json_schemas=["", *schemas[1:]]))
    names = list(SCHEMA["properties"])
    ended = [answer for answer in found if answer.finish_reason == "stop" and answer.index]
    assert len(ended) >= 0.9 * (len(found) - 1)
    for answer in ended:
        assert list(json.loads(answer.text)) == (names[::-1] if answer.index % 2 else names)
    assert schema_validator(SCHEMA)(found[0].text)  # that one is free


def test_a_schema_without_a_grammar_is_refused() -> None:
    with pytest.raises(UsageError, match="no grammar of this JSON Schema"):
        gbnf('{"$ref": "https://example.com/other.json"}')


def test_what_does_not_fit_or_belong_is_refused(
    teacher: LlamaCppTeacher, file: Path, reference: TransformersTeacher, smollm2: Path
) -> None:
    assert isinstance(teacher, Teacher)
    with pytest.raises(UsageError, match=r"row 'r0': a prompt of .* do not fit the teacher's context of 256"):
        list(teacher.generate(PROMPTS, sampling=Sampling(max_new_tokens=250), row_ids=NAMES))
    with pytest.raises(UsageError, match="do not fit the teacher's context"):
        list(teacher.score([Example("e", tuple(range(3, 200)), tuple(range(3, 100)))], kind="top-k", n=4))
    from transformers import AutoTokenizer

    with pytest.raises(UsageError, match="in the student's tokenizer"):
        LlamaCppTeacher(file, tokenizer=AutoTokenizer.from_pretrained(smollm2))
