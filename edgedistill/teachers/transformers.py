"""A teacher in this process: a transformers checkpoint that writes and scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.errors import UsageError
from edgedistill.teachers.protocol import Answer, Messages, Progress, Sampling
from edgedistill.training.data import Example, counter_rng, prompt_tokens, turn_end
from edgedistill.training.draws import join_targets, slice_targets, sparse_from_logits, uniforms
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.precision import pick_device, torch_dtype
from edgedistill.training.quiet import quiet
from edgedistill.training.targets import Kind, SparseTargets, tokenizer_hash

GENERATE_TOKENS = 8192
"""Prompt tokens of a generating batch when no batch size is given."""
SCORE_TOKENS = 2048
"""Tokens of a scoring batch when no batch size is given."""
MAX_ROWS = 96
CACHED_ROWS = 16
"""Rows of logits that are turned into targets at a time: what fits the cache is several times faster on a CPU."""


class TransformersTeacher:
    """Load a causal LM and its tokenizer from a folder; ``dtype`` "auto" is bf16 where that is faster.

    Batches are fixed from the sorted list of rows before anything runs, so a resumed run that asks for the same rows
    gets the same batches. In bf16 another composition of batches may differ in the last bits, and so in a greedy choice
    between two equal tokens; draws do not depend on the batch (counter RNG of seed, row id and sample).
    """

    def __init__(self, model_dir: Path | str, dtype: str = "auto", *, model: Any = None, tokenizer: Any = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model_dir = Path(model_dir)
        device = pick_device()
        self.dtype = torch_dtype(dtype, device)
        try:
            self.tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
            if model is None:
                with quiet():
                    model = AutoModelForCausalLM.from_pretrained(
                        model_dir, dtype=self.dtype, trust_remote_code=False, use_safetensors=True
                    )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"{model_dir}: cannot be loaded as a causal language model: {first}") from error
        self.model: Any = model.eval().requires_grad_(False)
        for parameter in model.parameters():  # not model.to: rotary frequencies are buffers and stay in float32
            parameter.data = parameter.data.to(self.dtype)
        self.model.to(device)
        self.vocab_size = min(len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0])
        self.context = int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, for the header of a file of targets."""
        return tokenizer_hash(self.tokenizer)

    def stop_ids(self) -> list[int]:
        """Return the tokens that end an answer: the template's end of turn and the model's EOS tokens."""
        found = {turn_end(self.tokenizer)}
        eos = self.model.generation_config.eos_token_id
        if eos is not None:
            found |= set(eos if isinstance(eos, list) else [eos])
        return sorted(found)

    def encode(
        self,
        prompts: Sequence[Messages] | Sequence[Sequence[int]],
        row_ids: Sequence[str],
        *,
        tools: Sequence[Sequence[dict[str, Any]]] | None = None,
    ) -> list[list[int]]:
        """Turn messages, with the ``tools`` of each where there are any, into token ids (token ids stay). Raises UsageError
        for an empty prompt.
        """
        encoded = []
        for row_id, prompt, own in zip(row_ids, prompts, tools or [()] * len(prompts), strict=True):
            ids = (
                prompt_tokens(self.tokenizer, prompt, own)  # pyright: ignore[reportArgumentType]
                if len(prompt) and isinstance(prompt[0], dict)
                else [int(one) for one in prompt]  # pyright: ignore[reportArgumentType]
            )
            if not ids:
                raise UsageError(f"row {row_id!r}: the prompt is empty")
            encoded.append(ids)
        return encoded

    def refuse_long(self, encoded: Sequence[Sequence[int]], row_ids: Sequence[str], max_new_tokens: int) -> None:
        """Raise UsageError, naming the row, where a prompt and the answer to it do not fit the model's context."""
        for row_id, ids in zip(row_ids, encoded, strict=True):
            if len(ids) + max_new_tokens > self.context:
                raise UsageError(
                    f"row {row_id!r}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit "
                    f"the teacher's context of {self.context}",
                    hint="shorten the prompt or lower generate.max_new_tokens",
                )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Messages] | Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        row_ids: Sequence[str] | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[list[Answer]], None] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Answer]:
        """Write the answers, in order of prompt length; ``on_batch`` gets each finished batch before it is yielded.

        Raises UsageError, naming the row, when a prompt and ``max_new_tokens`` do not fit the model's context.
        """
        row_ids = list(row_ids) if row_ids is not None else [str(at) for at in range(len(prompts))]
        encoded = self.encode(prompts, row_ids)
        self.refuse_long(encoded, row_ids, sampling.max_new_tokens)
        samples = sampling.samples if sampling.temperature > 0 else 1
        jobs = [(at, sample) for at in range(len(encoded)) for sample in range(samples)]
        jobs.sort(key=lambda job: (len(encoded[job[0]]), job))
        batches = _batches(
            [len(encoded[at]) + sampling.max_new_tokens // 4 for at, _ in jobs], batch_size, GENERATE_TOKENS
        )
        finished, started = 0, time.monotonic()
        for start, end in batches:
            batch = jobs[start:end]
            draws = None
            if sampling.temperature > 0:
                draws = np.stack(
                    [
                        counter_rng("generate", sampling.seed, row_ids[at], sample).random(
                            sampling.max_new_tokens, dtype=np.float32
                        )
                        for at, sample in batch
                    ]
                )
            answers = self._answer(batch, encoded, row_ids, sampling, draws)
            finished += len(answers)
            if on_batch is not None:
                on_batch(answers)
            if progress is not None:
                rate = finished / (time.monotonic() - started)
                progress(finished, len(jobs), f"{rate:.1f} rows/s")
            yield from answers

    def _answer(
        self,
        batch: Sequence[tuple[int, int]],
        encoded: Sequence[Sequence[int]],
        row_ids: Sequence[str],
        sampling: Sampling,
        draws: np.ndarray | None,
    ) -> list[Answer]:
        from edgedistill.teachers.decode import decode
        from edgedistill.teachers.plain_decode import plain_decode

        with packed_mode(self.model) as packed:
            decoded = (decode if packed else plain_decode)(
                self.model,
                [encoded[at] for at, _ in batch],
                stop_ids=self.stop_ids(),
                max_new_tokens=sampling.max_new_tokens,
                vocab_size=self.vocab_size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                uniforms=draws,
            )
        return [
            Answer(
                index=at,
                row_id=row_ids[at],
                sample=sample,
                text=self.tokenizer.decode(one.tokens, skip_special_tokens=True),
                token_ids=tuple(one.tokens),
                finish_reason="stop" if one.stopped else "length",
                logprob=one.logprob,
            )
            for (at, sample), one in zip(batch, decoded, strict=True)
        ]

    @torch.inference_mode()
    def score(
        self,
        examples: Sequence[Example],
        *,
        kind: Kind = "sampled",
        n: int = 12,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        chunk: int = 128,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, SparseTargets]]:
        """Yield (index, targets) in order of length: one forward over each example, the head on its completion only.

        ``chunk`` positions at a time pass through the head, so memory does not grow with the vocabulary times the
        batch.
        """
        for example in examples:
            if example.length > self.context:
                raise UsageError(
                    f"row {example.id!r}: {example.length} tokens do not fit the teacher's context of {self.context}"
                )
        if not 1 <= n <= 255:
            raise UsageError(f"score.n = {n}: between 1 and 255")
        order = sorted(range(len(examples)), key=lambda at: (examples[at].length, at))
        finished, started = 0, time.monotonic()
        for start, end in _batches([examples[at].length for at in order], batch_size, SCORE_TOKENS):
            rows = order[start:end]
            part = [examples[at] for at in rows]
            positions, logits_of = self.completion_logits(part)
            uniform = None
            if kind != "top-k":
                uniform = torch.from_numpy(
                    np.concatenate([uniforms(seed, one.id, len(one.completion_ids), n) for one in part])
                )
            pieces = []
            for low in range(0, positions, chunk):
                high = min(low + chunk, positions)
                logits = logits_of(low, high)
                for first in range(low, high, CACHED_ROWS):
                    last = min(first + CACHED_ROWS, high)
                    pieces.append(
                        sparse_from_logits(
                            logits[first - low : last - low],
                            kind=kind,
                            n=n,
                            temperature=temperature,
                            uniform=None if uniform is None else uniform[first:last],
                        )
                    )
            whole = join_targets(pieces)
            at = 0
            for row in rows:
                count = len(examples[row].completion_ids)
                yield row, slice_targets(whole, at, at + count)
                at += count
            finished += len(rows)
            if progress is not None:
                progress(finished, len(examples), f"{finished / (time.monotonic() - started):.1f} rows/s")

    def completion_logits(self, part: Sequence[Example]) -> tuple[int, Callable[[int, int], torch.Tensor]]:
        """Run forward over the examples of a batch; return the number of their completions' positions, and what gives the logits
        [positions, vocabulary] of those from one place to another.
        """
        head = self.model.get_output_embeddings()
        weight = head.weight[: self.vocab_size]
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        with packed_mode(self.model) as packed:
            states = completion_states(self.model, make_batch(part, packed=packed))
        return len(states), lambda low, high: torch.nn.functional.linear(states[low:high], weight, bias)


def _batches(lengths: Sequence[int], batch_size: int | None, budget: int) -> list[tuple[int, int]]:
    """Cut a sorted list into batches of ``batch_size`` rows, or of about ``budget`` tokens: [(start, end)]."""
    if batch_size is not None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
        return [
            (at, min(at + batch_size, len(lengths)))
            for at in (one * batch_size for one in range(math.ceil(len(lengths) / batch_size)))
        ]
    cuts, start = [], 0
    for at in range(len(lengths)):
        rows = at - start + 1
        if rows > 1 and (rows * lengths[at] > budget or rows > MAX_ROWS):
            cuts.append((start, at))
            start = at
    if lengths:
        cuts.append((start, len(lengths)))
    return cuts
