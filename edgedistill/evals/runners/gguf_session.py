"""One llama.cpp context for many sequences: what the runner of GGUF files decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.errors import StepFailed
from edgedistill.evals.runners.grammar import Grammar
from edgedistill.kv_cache import F16, Pair, ggml_number, needs_flash_attention, told

if TYPE_CHECKING:
    from edgedistill.evals.runners.gguf import GgufRunner

BATCH = 512


@dataclass
class Slot:
    """One running answer: its sequence in the KV cache, its row, and where it stands."""

    sequence: int
    index: int
    position: int
    budget: int
    grammar: Grammar | None
    tokens: list[int] = field(default_factory=list)


class Session:
    """One llama.cpp context with a batch: sequences of up to ``depth`` tokens each, every one with a cache of its own.

    Caches of their own (kv_unified off) keep attention from reading the masked cells of the other sequences: at 64
    sequences the unified cache decodes half as fast.
    """

    def __init__(
        self,
        runner: GgufRunner,
        *,
        sequences: int,
        depth: int,
        batch: int = BATCH,
        kv: Pair | None = None,
        flash: bool = True,
    ) -> None:
        self._lib, self._path, self._vocabulary = runner._lib, runner.path, runner.vocabulary
        self.batch_size = batch
        params = self._lib.llama_context_default_params()
        params.n_ctx = sequences * padded(depth)
        params.n_batch = params.n_ubatch = batch
        params.n_seq_max = sequences
        params.n_outputs_max_per_seq = 0  # its default of 1 forbids asking for several logits of one sequence
        params.kv_unified = False
        _set_cache(params, kv or runner.kv, flash)
        params.n_threads = params.n_threads_batch = runner.threads
        self._context: Any = self._lib.llama_init_from_model(runner._model, params)
        if not self._context:
            types = kv or runner.kv
            raise StepFailed(
                f"{self._path}: llama.cpp cannot make a context of {sequences} x {depth} tokens"
                + ("" if types == F16 else f" with a KV cache in {told(types)}"),
                "Free memory, or lower max_new_tokens." if types == F16 else 'Set runtime.kv_cache = "f16".',
            )
        self._memory: Any = self._lib.llama_get_memory(self._context)
        self._batch: Any = self._lib.llama_batch_init(batch, 0, 1)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close_gaps(self, slots: list[Slot]) -> list[Slot]:
        """Move the last sequences into the gaps, so that the slots have the sequences 1, 2, ...; return them in order.

        llama.cpp decodes sequences together only if their numbers follow each other; a gap cuts the batch in two.
        """
        slots = sorted(slots, key=lambda slot: slot.sequence)
        for number in range(1, len(slots) + 1):
            if slots[number - 1].sequence != number:
                moved = slots.pop()
                self.copy(moved.sequence, number)
                self.forget(moved.sequence)
                moved.sequence = number
                slots.insert(number - 1, moved)
        return slots

    def copy(self, source: int, target: int) -> None:
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def decode(self, items: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Decode (sequence, token, position, wanted) items; view the wanted logits, float32 [wanted, vocabulary]."""
        batch = self._batch
        wanted = 0
        for i, (sequence, token, position, want) in enumerate(items):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = want
            wanted += want
        batch.n_tokens = len(items)
        if (code := self._lib.llama_decode(self._context, batch)) != 0:
            raise StepFailed(
                f"{self._path}: llama_decode returned {code} on a batch of {len(items)} tokens",
                f"Check the file: edgedistill verify {self._path}",
            )
        if not wanted:
            return np.empty((0, self._vocabulary), dtype=np.float32)
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(wanted * self._vocabulary,)).reshape(wanted, self._vocabulary)

    def step(self, items: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Decode one (sequence, token, position) each; view the logits [items, vocabulary]."""
        return self.decode([(*item, True) for item in items])

    def prefill(self, parts: Sequence[tuple[int, Sequence[int], int]]) -> np.ndarray:
        """Decode (sequence, tokens, first position) parts; return the logits after each, [parts, vocabulary].

        A part without tokens (no shared prompt) gives no row.
        """
        out: list[np.ndarray] = []
        items: list[tuple[int, int, int, bool]] = []
        for sequence, tokens, first in parts:
            if items and len(items) + len(tokens) > self.batch_size:
                out.append(self.decode(items).copy())
                items = []
            for offset, token in enumerate(tokens):
                if len(items) == self.batch_size:
                    out.append(self.decode(items).copy())
                    items = []
                items.append((sequence, token, first + offset, offset == len(tokens) - 1))
        if items:
            out.append(self.decode(items).copy())
        return np.concatenate(out) if out else np.empty((0, self._vocabulary), dtype=np.float32)


def _set_cache(params: Any, kv: Pair, flash: bool) -> None:
    """Ask for a KV cache of these types. Flash attention is llama.cpp's choice where the types leave it one."""
    params.type_k, params.type_v = map(ggml_number, kv)
    if not flash or needs_flash_attention(kv):
        params.flash_attn_type = int(flash)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, ENABLED


def padded(depth: int) -> int:
    """Return the cells that llama.cpp gives to a sequence of that many tokens: the next multiple of 256."""
    return -(-(depth + 1) // 256) * 256


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float32 [rows, vocabulary]; the normaliser is summed in float64."""
    shifted = logits.astype(np.float32) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
