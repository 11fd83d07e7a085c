"""Answer prompts with transformers, from a folder in Hugging Face's layout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Answer, Progress


class TransformersRunner:
    """Run a folder greedily in this process, as the teacher of the same name writes its answers.

    ``dtype`` "auto" is bf16 where that is faster. Raises UsageError for a folder that is no causal language
    model.
    """

    def __init__(self, path: Path, *, dtype: str = "auto", threads: int | None = None) -> None:
        import torch

        from edgedistill.teachers.transformers import TransformersTeacher

        self.path = Path(path)
        if threads:
            torch.set_num_threads(threads)
        self._teacher: Any = TransformersTeacher(self.path, dtype)

    def __enter__(self) -> TransformersRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the model. May be called twice."""
        self._teacher = None

    def describe(self) -> dict[str, Any]:
        """Name the engine, its versions and the dtype."""
        import torch
        import transformers

        build = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {"engine": "transformers", "build": build, "dtype": str(self._teacher.dtype).removeprefix("torch.")}

    def encode(self, row: Row) -> list[int]:
        """Return the prompt's token ids, chat template applied. Raises UsageError where the folder has none."""
        tokenizer = self._teacher.tokenizer
        if not tokenizer.chat_template:
            raise UsageError(
                f"{self.path}: its tokenizer has no chat template", "Add chat_template.jinja to the folder."
            )
        text = tokenizer.apply_chat_template(
            list(row.messages), tools=list(row.tools) or None, add_generation_prompt=True, tokenize=False
        )
        return self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text: special tokens parsed, none added."""
        return list(self._teacher.tokenizer.encode(text, add_special_tokens=False))

    def end_token(self) -> int:
        """Return the id that ends an answer."""
        from edgedistill.training.data import turn_end

        return turn_end(self._teacher.tokenizer)

    def pieces(self) -> list[str]:
        """Return the text of every token as the tokenizer writes it."""
        return list(self._teacher.tokenizer.convert_ids_to_tokens(range(self._teacher.vocab_size)))

    def answer(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        grammar: str | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer every row greedily, in the order of ``rows``; rows of similar length share a batch.

        Raises UsageError for a prompt that leaves no room for ``max_new_tokens``, and for a grammar: there is none
        here.
        """
        from edgedistill.teachers.protocol import Sampling

        if grammar is not None:
            raise UsageError("transformers decodes no GBNF grammar", "Evaluate the GGUF under the grammar.")
        if not rows:
            return []
        started = time.perf_counter()
        found = list(
            self._teacher.generate(
                [self.encode(row) for row in rows],
                sampling=Sampling(max_new_tokens=max_new_tokens, temperature=0.0),
                row_ids=[row.id for row in rows],
                progress=progress,
            )
        )
        each = (time.perf_counter() - started) / sum(len(one.token_ids) + 1 for one in found)
        return [
            Answer(
                id=one.row_id,
                text=one.text,
                token_ids=one.token_ids,
                seconds=each * (len(one.token_ids) + 1),
                finish=one.finish_reason,
            )
            for one in sorted(found, key=lambda one: one.index)
        ]

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        """Do nothing: no answer depends on those before it."""

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per row float32 [len(positions[i]), vocabulary]: the distribution of the token after each position."""
        import torch

        model = self._teacher.model
        for tokens, wanted in zip(token_rows, positions, strict=True):
            if len(tokens) > self._teacher.context:
                raise UsageError(
                    f"a row has {len(tokens)} tokens, the model's context {self._teacher.context}",
                    "Shorten it, or leave it out.",
                )
            ids, kept = (torch.tensor(one, device=model.device) for one in ([list(tokens)], list(wanted)))
            with torch.inference_mode():
                found = model(input_ids=ids, logits_to_keep=kept)
                # Rows of padding after the tokenizer's own ids are no tokens.
                logits = found.logits[0, :, : self._teacher.vocab_size].float()
                row = torch.log_softmax(logits, dim=-1).cpu().numpy()
            yield row  # outside: what the reader does between two rows must not run in inference mode

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per prompt the log-probability of each of the ``tails`` as what follows it: float64 [tails].

        A prompt is read once, and its keys and values are copied for every tail.
        """
        import torch

        model, size = self._teacher.model, self._teacher.vocab_size
        longest = max(len(tail) for tail in tails)
        known = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=model.device)
        inside = torch.tensor([[at < len(tail) for at in range(longest)] for tail in tails], device=model.device)
        for prompt in prompts:
            if len(prompt) + longest > self._teacher.context:
                raise UsageError(
                    f"a row has {len(prompt) + longest} tokens, the model's context {self._teacher.context}",
                    "Shorten it, or leave it out.",
                )
            with torch.inference_mode():
                read = model(
                    input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=True, logits_to_keep=1
                )
                logits = read.logits[:, :, :size].expand(len(tails), 1, size)
                if longest > 1:
                    cache = read.past_key_values
                    cache.batch_repeat_interleave(len(tails))
                    more = model(input_ids=known[:, :-1], past_key_values=cache, use_cache=True).logits[..., :size]
                    logits = torch.cat([logits, more], dim=1)
                each = torch.log_softmax(logits.float(), -1).gather(-1, known[..., None])[..., 0].double()
                sums = torch.where(inside, each, 0.0).sum(-1).cpu().numpy()
            yield sums
