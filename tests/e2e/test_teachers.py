"""Every backend on the same prompts: what a GGUF file in llama.cpp, llama.cpp's own server and vLLM's CPU build write and score is
what transformers does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.filters import schema_validator
from edgedistill.formats.gguf.convert import convert
from edgedistill.served import NAME, Abilities, Launch, Server, probe
from edgedistill.teachers.llama_cpp import LlamaCppTeacher
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Sampling
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.teachers.vllm import Servers
from edgedistill.training.recipe import load_kept
from tests.llama_server import llama_server

ASKED = ("What is the capital of Norway?", "Name three colours.", "Write one sentence about the sea.", "What is 3 + 4?")
PROMPTS = [[{"role": "user", "content": text}] for text in ASKED]


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM, as a build starts it."""
    launch = Launch(
        tensor_parallel=1, servers=1, context=1024, dtype="float32", args=(), start_timeout=300.0, scored=20
    )
    servers = Servers(smollm2, launch, logs=tmp_path_factory.mktemp("vllm"), note=print)
    yield servers.urls[0]
    servers.close()


@pytest.fixture(scope="module")
def local(smollm2: Path) -> TransformersTeacher:
    return TransformersTeacher(smollm2, "float32")


@pytest.fixture(scope="module")
def file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(smollm2, tmp_path_factory.mktemp("teachers") / "smol.gguf", dtype="f16").path


def known(server: Server, **changes: Any) -> Server:
    """Return a server with what it can do."""
    return replace(server, abilities=probe(server, scored=20), **changes)


def check_answers(
    teacher: OpenAITeacher | LlamaCppTeacher, local: TransformersTeacher, *, close: float, ties: int = 0
) -> None:
    """Greedy answers are those of transformers, and as likely; ``ties`` may part late, at two tokens equal to rounding."""
    sampling = Sampling(max_new_tokens=24)
    theirs = list(teacher.generate(PROMPTS, sampling=sampling))
    own = {one.index: one for one in local.generate(PROMPTS, sampling=sampling)}
    assert [one.index for one in theirs] == list(range(len(PROMPTS)))
    parted = [one for one in theirs if one.text.strip() != own[one.index].text.strip()]
    assert len(parted) <= ties
    for one in parted:
        assert one.text.strip()[:40] == own[one.index].text.strip()[:40]
    for one in (one for one in theirs if one not in parted):
        assert one.finish_reason == own[one.index].finish_reason
        if one.logprob:
            assert one.logprob == pytest.approx(own[one.index].logprob, abs=close)


def check_draws(teacher: OpenAITeacher | LlamaCppTeacher) -> None:
    """Drawn answers differ by their number, and a second time are the same."""
    drawn = Sampling(max_new_tokens=24, temperature=1.0, samples=3, seed=5)
    texts = [[one.text for one in teacher.generate(PROMPTS[2:3], sampling=drawn)] for _ in range(2)]
    assert len(set(texts[0])) > 1 and texts[0] == texts[1]


def check_scores(
    teacher: OpenAITeacher | LlamaCppTeacher, local: TransformersTeacher, smollm2: Path, tmp_path: Path, *, close: float
) -> None:
    """The best tokens along given text, and their log-probabilities, are those of transformers."""
    own = {one.index: one for one in local.generate(PROMPTS, sampling=Sampling(max_new_tokens=24))}
    rows = [{"id": str(at), "messages": PROMPTS[at], "text": own[at].text} for at in range(len(ASKED))]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, _ = load_kept(tmp_path / "kept.jsonl", smollm2)
    here = dict(local.score(examples, kind="top-k", n=20))
    for at, soft in teacher.score(examples, kind="top-k", n=20):
        assert np.array_equal(soft.offsets, here[at].offsets)
        assert np.mean(soft.ids == here[at].ids) > 0.98 - 2 * close  # equal probabilities may change places
        assert np.allclose(soft.logp, here[at].logp, atol=close)


def check_guided(server: Server) -> None:
    """Under a JSON Schema nothing else is written, whatever is asked."""
    schema = {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
        "required": ["place", "sure"],
        "additionalProperties": False,
    }
    valid = schema_validator(schema)
    schemas = [json.dumps(schema)] * len(PROMPTS)
    with OpenAITeacher(server, rows=None) as teacher:
        for answer in teacher.generate(PROMPTS, sampling=Sampling(max_new_tokens=64), json_schemas=schemas):
            assert valid(answer.text) == "", answer.text


def test_a_gguf_file(file: Path, local: TransformersTeacher, smollm2: Path, tmp_path: Path) -> None:
    with LlamaCppTeacher(file, tokenizer=local.tokenizer) as teacher:
        check_answers(teacher, local, close=0.1, ties=1)
        check_draws(teacher)
        check_scores(teacher, local, smollm2, tmp_path, close=0.06)


def test_llama_cpps_own_server(file: Path, local: TransformersTeacher) -> None:
    with llama_server(file, alias="smol", places=4) as url:
        server = Server(urls=(url,), model="smol", key_env="X", concurrency=4, timeout=120, retries=1)
        assert probe(server, scored=20) == Abilities(context=512, logprobs=True, scores=0)
        with OpenAITeacher(known(server), rows=None) as teacher:
            check_answers(teacher, local, close=0.1, ties=1)
            check_draws(teacher)
        check_guided(known(server))
        # two servers of one model: each does its share
        with llama_server(file, alias="smol", places=4) as other:
            several = known(replace(server, urls=(url, other)))
            with OpenAITeacher(several, rows=None) as teacher:
                check_answers(teacher, local, close=0.1, ties=1)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm(served: str, local: TransformersTeacher, smollm2: Path, tmp_path: Path) -> None:
    server = Server(urls=(served,), model=NAME, key_env="X", concurrency=4, timeout=120, retries=1)
    assert probe(server, scored=20) == Abilities(context=1024, logprobs=True, scores=20)
    assert probe(server, scored=21).scores == 0  # --max-logprobs
    with OpenAITeacher(known(server), rows=None, tokenizer=local.tokenizer) as teacher:
        check_answers(teacher, local, close=0.02)
        check_draws(teacher)
        check_scores(teacher, local, smollm2, tmp_path, close=2e-3)
    check_guided(known(server))
