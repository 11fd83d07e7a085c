"""Vectors of texts by a text encoder in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.errors import StepFailed, UsageError
from edgedistill.pooling import Pooling
from edgedistill.training.precision import pick_device
from edgedistill.training.quiet import quiet

TOKENS = 4096  # of a batch, padding included


class Embedder:
    """Give the vector of a text: its tokens' last states, pooled, of length 1. A text longer than the model's context is read in
    windows, so that no part of it is left out: "mean" is that of all tokens of all windows, "cls" and "last" the mean of the
    windows' vectors. In single precision, as thresholds are compared with it. Raises UsageError for what cannot be loaded.
    """

    def __init__(self, folder: Path, pooling: Pooling) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.pooling = pooling
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            with quiet():
                model: Any = AutoModel.from_pretrained(
                    folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"{folder}: cannot be loaded as a text encoder: {first}") from error
        self.model: Any = model.eval().requires_grad_(False).to(pick_device())
        self.size = int(model.config.hidden_size)
        own, said = folder / "sentence_bert_config.json", []
        if own.is_file():
            said.append(json.loads(own.read_text()).get("max_seq_length"))
        said += [self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
        self.context = min(int(one) for one in said if one)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts: float32 [texts, size]. Raises StepFailed where one is not finite."""
        found = self.tokenizer(
            list(texts), truncation=True, max_length=self.context, return_overflowing_tokens=True, padding=False
        )
        windows, owners = found["input_ids"], found["overflow_to_sample_mapping"]
        sums, weights = np.zeros((len(texts), self.size)), np.zeros(len(texts))
        for batch in self._batches([len(one) for one in windows]):
            states, lengths = self._states([windows[at] for at in batch])
            for at, one, length in zip(batch, states, lengths, strict=True):
                weight = length if self.pooling == "mean" else 1
                sums[owners[at]] += one * weight
                weights[owners[at]] += weight
        vectors = sums / np.maximum(weights, 1)[:, None]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(vectors).all() or not norms.all():
            raise StepFailed(
                "the encoder's vector of a text is zero or not finite", "check the checkpoint (NaN weights?)"
            )
        return (vectors / norms).astype(np.float32)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the numbers of windows in batches, by length."""
        found: list[list[int]] = []
        for at in sorted(range(len(lengths)), key=lambda at: (lengths[at], at)):
            if found and (len(found[-1]) + 1) * lengths[at] <= TOKENS:
                found[-1].append(at)
            else:
                found.append([at])
        return found

    @torch.inference_mode()
    def _states(self, windows: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[int]]:
        """Return the pooled states of a batch, float64 [windows, size], and how many tokens each window has."""
        lengths = [len(one) for one in windows]
        width, pad = max(lengths), self.tokenizer.pad_token_id or 0
        device = self.model.device
        ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in windows], device=device)
        mask = torch.tensor([[1] * one + [0] * (width - one) for one in lengths], device=device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "mean":
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states[torch.arange(len(lengths), device=device), mask.sum(1) - 1]
        return pooled.double().cpu().numpy(), lengths
