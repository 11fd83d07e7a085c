"""A teacher in a GGUF file, as its weights are: llama.cpp writes, and gives the whole distribution along any text.

So a large teacher can teach from its quantized file where its full precision fits no memory, and one of any architecture that
llama.cpp runs. What it teaches are the distributions of the quantized model (``plan`` says so).
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Finish
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.runners.grammar import Grammar
from edgedistill.sequences import Aside, Made
from edgedistill.teachers.decode import draw
from edgedistill.teachers.protocol import Answer, Messages, Progress, Sampling
from edgedistill.training.data import Example, counter_rng
from edgedistill.training.draws import sparse_from_logits, uniforms
from edgedistill.training.targets import Kind, SparseTargets, tokenizer_hash


class LlamaCppTeacher:
    """Load a GGUF file. ``tokenizer`` is the student's, for scoring: its tokens have to be the file's, number by number.

    Draws do not depend on what is answered beside them (counter RNG of seed, row id and sample); two tokens that are equal to
    rounding may.
    """

    def __init__(self, path: Path, *, threads: int | None = None, tokenizer: Any = None) -> None:
        self.runner, self.tokenizer = GgufRunner(path, threads=threads), tokenizer
        self.context = self.runner.context_limit
        self.vocab_size = self.runner.vocabulary
        if tokenizer is not None:
            self._same_tokens()
            self.vocab_size = min(len(tokenizer), self.runner.vocabulary)

    def close(self) -> None:
        """Free the model. May be called twice."""
        self.runner.close()

    def __enter__(self) -> LlamaCppTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, for the header of a file of targets."""
        return tokenizer_hash(self.tokenizer)

    def _same_tokens(self) -> None:
        pieces = self.runner.pieces()
        for number, token in enumerate(
            self.tokenizer.convert_ids_to_tokens(range(min(len(pieces), len(self.tokenizer))))
        ):
            if token is not None and token != pieces[number]:
                raise UsageError(
                    f"{self.runner.path}: token {number} is {pieces[number]!r}, and {token!r} in the student's tokenizer",
                    'distil on the teacher\'s text: score.kind = "none", distill.loss = { kd = 0.0, ce = 1.0 }',
                )

    def generate(
        self,
        prompts: Sequence[Messages] | Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        row_ids: Sequence[str] | None = None,
        tools: Sequence[Sequence[dict[str, Any]]] | None = None,
        json_schemas: Sequence[str] | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[list[Answer]], None] | None = None,
        on_ask: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Answer]:
        """Yield the answers once all are there, in the order of ``prompts`` (messages, or token ids); ``on_ask`` gets the index of
        a prompt when it is put. With ``on_batch``, which gets each answer as it ends, none is kept, and none yielded.

        With ``json_schemas``, one for each prompt, nothing else can be written. ``batch_size`` says nothing here: as many are
        written at a time as llama.cpp does best. Raises UsageError, naming the row, when a prompt and ``max_new_tokens`` do not fit
        the model's context.
        """
        names = row_ids if row_ids is not None else Made(range(len(prompts)), str)
        given = Aside()  # the token ids of each prompt
        for at, name in enumerate(names):
            ids = self._encode(prompts[at], tools[at] if tools else ())
            given.add(array("i", ids).tobytes())
            if not ids:
                raise UsageError(f"row {name!r}: the prompt is empty")
            if len(ids) + sampling.max_new_tokens > self.context:
                raise UsageError(
                    f"row {name!r}: a prompt of {len(ids)} tokens and {sampling.max_new_tokens} new ones do not fit "
                    f"the teacher's context of {self.context}",
                    hint="shorten the prompt or lower generate.max_new_tokens",
                )
        samples = sampling.samples if sampling.temperature > 0 else 1
        jobs = range(len(prompts) * samples)
        likely = np.zeros(len(jobs))
        drawn: dict[int, np.ndarray] = {}
        found: dict[int, Answer] = {}
        started, ended = time.monotonic(), 0

        def start(job: int) -> None:
            at, sample = divmod(job, samples)
            if sampling.temperature > 0:
                rng = counter_rng("generate", sampling.seed, names[at], sample)
                drawn[job] = rng.random(sampling.max_new_tokens, dtype=np.float32)
            if on_ask is not None:
                on_ask(at)

        seen: dict[str, Any] = {}  # of the step at hand: the jobs, and the log-probabilities of all tokens

        def pick(places: Sequence[tuple[int, int]], logits: np.ndarray) -> np.ndarray:
            logp = torch.log_softmax(torch.from_numpy(logits), -1)
            seen.update(jobs=[job for job, _ in places], logp=logp)
            if sampling.temperature > 0:
                uniform = torch.tensor([drawn[job][written] for job, written in places])
                return draw(logp, sampling.temperature, sampling.top_p, uniform).numpy()
            return logp.argmax(-1).numpy()

        def add(rows: Sequence[int], tokens: Sequence[int]) -> None:
            for row, token in zip(rows, tokens, strict=True):
                likely[seen["jobs"][row]] += float(seen["logp"][row, token])

        def end(job: int, tokens: Sequence[int], finish: Finish) -> None:
            nonlocal ended
            at, sample = divmod(job, samples)
            answer = Answer(
                index=at,
                row_id=names[at],
                sample=sample,
                text=self.runner.text(tokens),
                token_ids=tuple(tokens),
                finish_reason="stop" if finish == "stop" else "length",
                logprob=float(likely[job]),
            )
            ended += 1
            drawn.pop(job, None)
            if on_batch is None:
                found[job] = answer
            else:
                on_batch([answer])
            if progress is not None:
                progress(ended, len(jobs), f"{ended / (time.monotonic() - started):.1f} rows/s")

        schemas = json_schemas if json_schemas is not None else Made(range(len(prompts)), lambda at: "")
        roots: dict[str, Grammar] = {}
        try:
            for schema in dict.fromkeys(filter(None, schemas)):
                roots[schema] = self.runner.grammar(gbnf(schema))
            self.runner.write(
                Made(jobs, lambda job: array("i", given[job // samples]).tolist()),
                max_new_tokens=sampling.max_new_tokens,
                on_start=start,
                on_end=end,
                pick=pick,
                on_tokens=add,
                root=lambda job: roots.get(schemas[job // samples]),
            )
        finally:
            for root in roots.values():
                root.close()
        yield from (found[job] for job in jobs if job in found)

    def _encode(self, prompt: Messages | Sequence[int], tools: Sequence[dict[str, Any]]) -> list[int]:
        if len(prompt) and isinstance(prompt[0], dict):
            return self.runner.encode(Row(id="", messages=tuple(prompt), tools=tuple(tools)))  # pyright: ignore[reportArgumentType]
        return [int(one) for one in prompt]  # pyright: ignore[reportArgumentType]

    def score(
        self,
        examples: Sequence[Example],
        *,
        kind: Kind,
        n: int,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, SparseTargets]]:
        """Yield (index, targets) in order of length, as the transformers teacher does. Raises UsageError for an example that does
        not fit the context.
        """
        for example in examples:
            if example.length > self.context:
                raise UsageError(
                    f"row {example.id!r}: {example.length} tokens do not fit the teacher's context of {self.context}"
                )
        order = sorted(range(len(examples)), key=lambda at: (examples[at].length, at))
        rows = [[*examples[at].prompt_ids, *examples[at].completion_ids] for at in order]
        places = [
            range(len(examples[at].prompt_ids) - 1, examples[at].length - 1) for at in order
        ]  # each token of the completion is what comes after the place before it
        started = time.monotonic()
        for done, (at, logp) in enumerate(zip(order, self.runner.logprobs(rows, places), strict=True), 1):
            example = examples[at]
            uniform = None
            if kind != "top-k":
                uniform = torch.from_numpy(uniforms(seed, example.id, len(example.completion_ids), n))
            yield (
                at,
                sparse_from_logits(
                    torch.from_numpy(logp[:, : self.vocab_size]),
                    kind=kind,
                    n=n,
                    temperature=temperature,
                    uniform=uniform,
                ),
            )
            if progress is not None:
                progress(done, len(examples), f"{done / (time.monotonic() - started):.1f} rows/s")


def gbnf(schema: str) -> str:
    """Return the grammar of the JSON that a schema allows, properties in the order in which it names them. Raises UsageError."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    order: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for name, one in value.items():
                if name == "properties" and isinstance(one, dict):
                    order.update(dict.fromkeys(one))
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(json.loads(schema))
    try:
        return json_schema_to_gbnf(schema, list(order))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"llama.cpp makes no grammar of this JSON Schema: {error}",
            "simplify it: no remote $ref, no pattern with lookahead",
        ) from None
