"""Run one GGUF with a draft model beside it for timing: speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), greedy.

As llama-server does it with ``--spec-type draft-simple`` (common/speculative.cpp): the draft writes up to ``tokens`` tokens, as
long as it gives each at least ``min_probability``; the model reads them in one batch, and keeps those that it would have written
itself and one of its own. Greedy answers are therefore the model's, whatever the draft is worth. One pool of threads serves
both: of two, the idle one would spin on the cores of the other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.devices.engine_gguf import GgufEngine
from edgedistill.devices.protocol import Messages
from edgedistill.errors import StepFailed, UsageError
from edgedistill.kv_cache import F16, Pair


@dataclass(kw_only=True)
class Spoken:
    """One answer: seconds from the messages to its first and last token, its tokens (with that which ended it), and what was
    drafted for it, kept of that, and checked in how many batches.
    """

    prompt_tokens: int
    first: float = 0.0
    last: float = 0.0
    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    checks: int = 0


class DraftedEngine:
    """A model and its draft, both loaded, in the process that measures them; ``kv`` are the types of the model's KV cache, the
    draft's is in f16. Raises UsageError where their tokens differ.
    """

    def __init__(
        self, path: Path, draft: Path, threads: int, *, tokens: int, min_probability: float, kv: Pair = F16
    ) -> None:
        self.tokens, self.min_probability = tokens, min_probability
        self.model, self.draft = _Reader(path, threads, tokens + 1, kv), _Reader(draft, threads, 1)
        self.draft.pool = self.model.pool
        if self.model.names() != self.draft.names():
            raise UsageError(
                f"{draft}: its tokens are not those of {path}", "cut the draft out of the model that it serves"
            )

    def describe(self) -> dict[str, str]:
        """Name the engine as `GgufEngine` does."""
        return self.model.describe()

    def bytes_per_token(self) -> tuple[int, bool]:
        """Return (weight bytes that a token of the model alone reads, True)."""
        return self.model.bytes_per_token()

    def answer(self, messages: Messages, limit: int, context: int, *, drafted: bool) -> Spoken:
        """Answer greedily in up to ``limit`` tokens; without ``drafted`` the same loop decodes one token after the other."""
        model, draft = self.model, self.draft
        model.open(context)
        if drafted:
            draft.open(context)
        start = time.perf_counter()
        text = model.encode(messages, limit, context)
        spoken = Spoken(prompt_tokens=len(text), tokens=[])
        model.feed(text)
        text.append(model.best(-1)[0])
        spoken.tokens.append(text[-1])
        spoken.first = time.perf_counter() - start
        known = 0  # tokens of the text that the draft has in its cache
        while not model.ends(text[-1]) and len(spoken.tokens) < limit:
            guesses: list[int] = []
            most = min(self.tokens, limit - len(spoken.tokens) - 1)  # one more comes from the check
            if drafted and most:
                guesses = self._guess(text[known:], most)
                known = len(text) + max(0, len(guesses) - 1)  # the last guess is not read by the draft
            best = model.check([text[-1], *guesses], len(text) - 1)
            right = next((at for at, guess in enumerate(guesses) if guess != best[at]), len(guesses))
            model.keep(len(text) + right)
            if known > len(text) + right:
                known = len(text) + right
                draft.keep(known)
            fresh = best[: right + 1]
            end = next((at for at, token in enumerate(fresh) if model.ends(token)), len(fresh) - 1)
            text += fresh[: end + 1]
            spoken.tokens += fresh[: end + 1]
            spoken.checks += 1
            spoken.drafted += len(guesses)
            spoken.accepted += right
        spoken.last = time.perf_counter() - start
        return spoken

    def gap(self, messages: Messages, before: list[int], one: int, other: int, context: int) -> float:
        """Return how much larger the logit of ``one`` is than that of ``other`` after the tokens ``before`` of an answer, decoded
        one by one.
        """
        model = self.model
        model.open(context)
        model.feed(model.encode(messages, len(before) + 1, context))
        for token in before:
            model.feed([token])
        logits = model.logits(-1)
        return float(logits[one] - logits[other])

    def _guess(self, unread: list[int], most: int) -> list[int]:
        """Return what the draft expects after the text, of which it has not read ``unread``."""
        draft, guesses = self.draft, []
        while True:
            draft.feed(unread)
            token, probability = draft.best(-1, probability=self.min_probability > 0)
            if probability < self.min_probability:
                return guesses
            guesses.append(token)
            if len(guesses) == most or draft.ends(token):
                return guesses
            unread = [token]


class _Reader(GgufEngine):
    """A model whose context gives the logits of up to ``outputs`` tokens of a batch."""

    def __init__(self, path: Path, threads: int, outputs: int, kv: Pair = F16) -> None:
        super().__init__(path, threads, kv)
        self.outputs = outputs
        self.batch: Any = self.api.llama_batch_init(outputs, 0, 1)

    def names(self) -> list[bytes]:
        """Return the text of every token."""
        return [self.api.llama_vocab_get_text(self.vocab, token) for token in range(self.n_vocab)]

    def open(self, room: int) -> None:
        """Have an empty context of ``room`` tokens."""
        self._open("draft", room)

    def feed(self, tokens: list[int]) -> None:
        """Read tokens after what is in the cache; the logits of the last can be had."""
        self._feed(tokens)

    def encode(self, messages: Messages, limit: int, context: int) -> list[int]:
        """Return the prompt's tokens. Raises UsageError where they and an answer of ``limit`` do not fit the context."""
        tokens = self._encode(messages)
        if len(tokens) + limit > context:
            raise UsageError(
                f"a prompt of {len(tokens)} tokens and an answer of {limit} do not fit a context of {context}",
                "raise the target's runtime.context or shorten the prompt",
            )
        return tokens

    def logits(self, at: int) -> np.ndarray:
        """View the logits of an output of the last batch, float32 [vocabulary]."""
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, at), shape=(self.n_vocab,))

    def best(self, at: int, *, probability: bool = False) -> tuple[int, float]:
        """Return the most probable token after an output of the last batch, and its probability if asked for (else 1)."""
        logits = self.logits(at)
        token = int(logits.argmax())
        return token, 1.0 / float(np.exp(logits - logits[token]).sum()) if probability else 1.0

    def check(self, tokens: list[int], position: int) -> list[int]:
        """Read tokens from ``position`` on in one batch; return the most probable token after each."""
        batch = self.batch
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position + at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        batch.n_tokens = len(tokens)
        if (code := self.api.llama_decode(self.context, batch)) != 0:
            raise StepFailed(f"llama.cpp could not check a draft of {len(tokens) - 1} tokens (code {code})")
        return [self.best(at)[0] for at in range(len(tokens))]

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` tokens of the cache."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), 0, count, -1)

    def ends(self, token: int) -> bool:
        """Tell whether a token ends the answer."""
        return bool(self.api.llama_vocab_is_eog(self.vocab, token))

    def _params(self, room: int) -> Any:
        params = super()._params(room)
        params.n_outputs_max = params.n_outputs_max_per_seq = self.outputs  # 1 a sequence, its default, forbids a check
        return params
