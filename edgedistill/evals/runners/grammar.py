"""GBNF grammars through llama.cpp's own sampler, for greedy decoding of many sequences."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgedistill.errors import UsageError

FIRST = 64  # candidates tried before the whole vocabulary


class Grammar:
    """Hold the state of one grammar along one answer: ``choose`` a token, then stand after it.

    ``clone`` gives the state to a new answer (a grammar is parsed once). Raises UsageError for text that is not GBNF.
    """

    def __init__(self, vocab: Any, text: str, vocabulary: int, *, _state: Any = None) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._vocab, self._text, self._vocabulary = vocab, text, vocabulary
        self._state = _state
        if self._state is None:
            if not any(line.lstrip().startswith("root") for line in text.splitlines()):
                raise UsageError("the grammar has no rule named root", "Start it with: root ::= ...")
            self._state = llama_cpp.llama_sampler_init_grammar(vocab, text.encode("utf-8"), b"root")
        if not self._state:
            raise UsageError(
                "llama.cpp cannot parse the grammar",
                "Check the GBNF: every rule used must be defined, and none may start with itself.",
            )

    def clone(self) -> Grammar:
        """Return an independent grammar in the same state."""
        return Grammar(self._vocab, self._text, self._vocabulary, _state=self._lib.llama_sampler_clone(self._state))

    def close(self) -> None:
        """Free the state. May be called twice."""
        if self._state:
            self._lib.llama_sampler_free(self._state)
            self._state = None

    def choose(self, best: int, logits: np.ndarray) -> int | None:
        """Return the allowed token with the highest logit and step past it; None if nothing is allowed.

        ``best`` is the argmax of ``logits`` (float32 [vocabulary]): it is nearly always allowed, so it is tried alone
        first, then the best FIRST, then all. The result is the same as filtering the whole vocabulary.
        """
        token = self._first_allowed(np.array([best], dtype=np.int32), logits)
        if token is None:
            head = np.argpartition(-logits, FIRST)[:FIRST] if self._vocabulary > FIRST else np.arange(self._vocabulary)
            token = self._first_allowed(head[np.argsort(-logits[head], kind="stable")].astype(np.int32), logits)
        if token is None:
            token = self._first_allowed(np.argsort(-logits, kind="stable").astype(np.int32), logits)
        if token is None:
            return None
        if not self._lib.llama_vocab_is_eog(self._vocab, token):
            self._lib.llama_sampler_accept(self._state, token)
        return token

    def allows(self, tokens: Sequence[int]) -> bool:
        """Step along ``tokens`` and tell whether every one of them, in its turn, is allowed."""
        level = np.zeros(self._vocabulary, dtype=np.float32)
        for token in tokens:
            if self._first_allowed(np.array([token], dtype=np.int32), level) is None:
                return False
            if not self._lib.llama_vocab_is_eog(self._vocab, token):
                self._lib.llama_sampler_accept(self._state, token)
        return True

    def _first_allowed(self, candidates: np.ndarray, logits: np.ndarray) -> int | None:
        """Return the first of ``candidates`` (falling logits) that the grammar lets stand."""
        table = np.zeros(candidates.size, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        table["id"] = candidates
        table["logit"] = logits[candidates]
        array = self._lib.llama_token_data_array(
            data=table.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data)),
            size=candidates.size,
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._state, ctypes.byref(array))
        allowed = np.flatnonzero(np.isfinite(table["logit"]))
        return int(table["id"][allowed[0]]) if allowed.size else None
