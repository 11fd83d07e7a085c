"""A real HTTP server over a real model in this process: the part of OpenAI's protocol, and vLLM's prompt_logprobs, that a teacher
behind a server is asked for. What vLLM itself answers is tested where it is installed (tests/e2e/test_teachers.py).
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from edgedistill.teachers.protocol import Sampling
from edgedistill.teachers.transformers import TransformersTeacher
from tests.http_server import JsonHandler, JsonServer

MOST = 20  # best tokens, as vLLM has it unless it is told otherwise


class ModelServer(JsonServer):
    """Serve one checkpoint as ``name`` while the ``with`` block runs; ``requests`` counts what was asked, by path."""

    def __init__(
        self, folder: Path, name: str = "teacher", *, dtype: str = "auto", key: str = "", port: int = 0
    ) -> None:
        self.teacher, self.name, self.key = TransformersTeacher(folder, dtype), name, key
        self.lock, self.requests, self.formats = threading.Lock(), Counter[str](), list[Any]()
        self.thinks = ""  # put into reasoning_content
        self.most = MOST
        outer = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": outer.name, "max_model_len": outer.teacher.context}]})

            def do_POST(self) -> None:
                body = self.asked()
                if outer.key and self.headers["Authorization"] != f"Bearer {outer.key}":
                    self.send({"error": {"message": f"not {self.headers['Authorization']}"}}, 401)
                    return
                with outer.lock:
                    outer.requests[self.path] += 1
                    answer = {"/v1/chat/completions": outer.chat, "/v1/completions": outer.complete}[self.path]
                    try:
                        self.send(answer(body))
                    except ValueError as error:
                        self.send({"error": {"message": str(error)}}, 400)

        super().__init__(Handler, under="/v1", port=port)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.formats.append(body.get("response_format"))
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=body.get("temperature", 0.0),
            top_p=body.get("top_p", 1.0),
            seed=body.get("seed", 0),
        )
        (answer,) = self.teacher.generate([body["messages"]], sampling=sampling)
        message = {"role": "assistant", "content": answer.text, "reasoning_content": self.thinks or None}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "", "logprob": answer.logprob}]}
        asked = len(self.teacher.encode([body["messages"]], ["it"])[0])
        usage = {"prompt_tokens": asked, "completion_tokens": len(answer.token_ids) + 1}
        return {"choices": [choice], "usage": usage}

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        most = body["prompt_logprobs"]
        if most > self.most:
            raise ValueError(f"Requested prompt logprobs of {most}, which is greater than max allowed: {self.most}")
        tokenizer, ids = self.teacher.tokenizer, body["prompt"]
        if isinstance(ids, str):
            ids = tokenizer(ids).input_ids
        logits = self.teacher.model(input_ids=torch.tensor([ids])).logits[0, :, : self.teacher.vocab_size]
        logp = torch.log_softmax(logits.float(), -1)
        places: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            best = logp[at].topk(most).indices.tolist()
            places.append(
                {
                    str(one): {"logprob": float(logp[at, one]), "rank": 0, "decoded_token": tokenizer.decode([one])}
                    for one in [*best, *([] if token in best else [token])]
                }
            )
        return {"choices": [{"index": 0, "text": "", "prompt_logprobs": places}]}
