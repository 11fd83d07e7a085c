"""A teacher behind vLLM itself, its CPU build in an environment of its own: what it writes and scores is what transformers does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgedistill.served import Abilities, Server, probe
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Sampling
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.recipe import load_kept

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
ASKED = ("What is the capital of Norway?", "Name three colours.", "Write one sentence about the sea.", "What is 3 + 4?")


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [os.environ["EDGEDISTILL_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--served-model-name", "smol", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-logprobs", "20", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            url, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"{url}/models", timeout=2).close()
                    break
                except OSError:
                    tail = log.read_text()[-2000:]
                    assert process.poll() is None and time.monotonic() < deadline, tail
                    time.sleep(1)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_what_vllm_writes_and_scores_is_what_transformers_does(served: str, smollm2: Path, tmp_path: Path) -> None:
    server = Server(urls=(served,), model="smol", key_env="X", concurrency=4, timeout=120, retries=1)
    able = probe(server, scored=20)
    assert able == Abilities(context=1024, logprobs=True, scores=20)
    assert probe(server, scored=21).scores == 0  # --max-logprobs
    local = TransformersTeacher(smollm2, "float32")
    server = Server(**{**server.__dict__, "abilities": able})
    with OpenAITeacher(server, rows=None, tokenizer=local.tokenizer) as teacher:
        prompts = [[{"role": "user", "content": text}] for text in ASKED]
        sampling = Sampling(max_new_tokens=24)
        theirs = list(teacher.generate(prompts, sampling=sampling))
        own = {one.index: one for one in local.generate(prompts, sampling=sampling)}
        for one in theirs:
            assert one.text.strip() == own[one.index].text.strip()
            assert one.finish_reason == own[one.index].finish_reason
            assert one.logprob == pytest.approx(own[one.index].logprob, abs=0.02)
        # drawn answers differ by their number, and a second time are the same
        drawn = Sampling(max_new_tokens=24, temperature=1.0, samples=3, seed=5)
        texts = [[one.text for one in teacher.generate(prompts[2:3], sampling=drawn)] for _ in range(2)]
        assert len(set(texts[0])) > 1 and texts[0] == texts[1]

        rows = [{"id": str(at), "messages": prompts[at], "text": own[at].text} for at in range(len(ASKED))]
        (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples, _ = load_kept(tmp_path / "kept.jsonl", smollm2)
        here = dict(local.score(examples, kind="top-k", n=20))
        for at, soft in teacher.score(examples, kind="top-k", n=20):
            assert np.array_equal(soft.offsets, here[at].offsets)
            assert np.mean(soft.ids == here[at].ids) > 0.98  # equal probabilities may change places
            assert np.allclose(soft.logp, here[at].logp, atol=2e-3)
