"""What a step will take: its work and memory by arithmetic, its time by the rate at which this machine did the same kind of
work before, else by a measured default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgedistill.data.prompts import Row
from edgedistill.store import write_atomic

MIB = 2**20
RUNTIME_MIB = 700  # torch, transformers and Python themselves

# Units per second on 2 Zen 4 cores (AVX-512, BF16): training and scoring from single-thread CPU time of SmolLM2-135M,
# shape from one cut of it (46,651 tokens in 52 s), the rest from one quickstart build. A first run elsewhere may be off by
# several times; the second run of a kind uses what was measured on that machine.
DEFAULTS = {
    "train": 300e9,
    "train-full": 470e9,
    "forward": 320e9,
    "shape": 300e9,
    "decode": 150e9,
    "decode-failed": 600e9,  # of all prompts, of which a quarter is put: what a student fails is known once it has answered
    "decode-gguf": 150e9,
    "forward-gguf": 150e9,
    "decode-onnx": 40e9,
    "bytes": 300e6,
    "convert": 25e6,
    "quantize": 60e6,
    "sensitivity": 150e9,
    "quantize-gptq": 6e6,
    "build-onnx": 20e6,
    "round-onnx": 3e6,
    "measure": 1e9,
    "served": 100.0,  # tokens that a server reads and writes; its speed is not this machine's
    "served-scores": 1000.0,
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """An amount of one kind of work: floating-point operations for training and decoding, tokens of servers, bytes for the rest."""

    kind: str
    amount: float


class Rates:
    """Rates learnt on this machine, in ``rates.json`` of the store. A new figure weighs as much as all before it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "rates.json"
        try:
            self._rates: dict[str, float] = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            self._rates = {}

    def seconds(self, work: Work) -> float:
        """Estimate the seconds that ``work`` takes."""
        rate = self._rates.get(work.kind) or DEFAULTS[work.kind]
        return work.amount / rate

    def measured(self, kind: str) -> bool:
        """Tell whether the rate was measured on this machine."""
        return kind in self._rates

    def learn(self, work: Work, seconds: float) -> None:
        """Take in how long a piece of work took; very short ones say nothing about the rate."""
        if seconds < 0.5 or work.amount <= 0:
            return
        rate = work.amount / seconds
        self._rates[work.kind] = (self._rates.get(work.kind, rate) + rate) / 2
        write_atomic(self.path, json.dumps(self._rates, indent=1, sort_keys=True))


def row_tokens(row: Row) -> int:
    """Estimate the tokens of a row, template included: about 3.3 characters a token, 6 tokens around each message."""
    characters = sum(len(str(message.get("content"))) for message in row.messages) + len(row.reference or " " * 80)
    characters += len(str(row.tools)) if row.tools else 0
    return int(characters / 3.3) + 6 * (len(row.messages) + 1)


def train_work(params: int, tokens: float, *, full: bool) -> Work:
    """Operations of training: forward and backward through the activations, and the weights' gradients in full
    training.
    """
    return Work(kind="train-full" if full else "train", amount=(6 if full else 4) * params * tokens)


def ffn_work(params: int, layers: int, ffn: int, tokens: float) -> Work:
    """Operations of making FFNs narrower: the whole and the cut model's pass over the text, the moments of every layer's
    activations, and the fit, which takes some inverses of a matrix [ffn, ffn].
    """
    return Work(kind="shape", amount=tokens * (4 * params + 3 * layers * ffn**2) + 16 * layers * ffn**3)


MOMENTS = {"adafactor": 0, "sgd": 0, "adagrad": 1, "rmsprop": 1}
"""Averages that an optimizer keeps of every weight's gradient; AdamW keeps two."""


def train_memory(params: int, *, full: bool, bf16: bool, optimizer: str = "", beside: int = 0) -> int:
    """Bytes of training at its peak; ``bf16`` is what it computes in, else float32. ``beside`` are the weights of a teacher in
    memory, or of what else is read along.

    In full a weight has a master in float32, its gradient and the optimizer's moments, and, in what is computed in, a copy and the
    gradient that the way back leaves: 20 bytes by AdamW in bf16, 24 in float32. An adapter has 24 bytes for each of its own, up to
    a twelfth of the model's: 6 for each of those hold that and the model in float32, as it is loaded. (Without activations, a Llama
    of 97 million weights, torch 2.13: 20.0 and 24.0 in full, 5.3 by LoRA of rank 32 in float32; in bf16 3.2, and 4 where the
    checkpoint is no file of float32 that is mapped into memory.) Checkpoints are written from where the weights lie.
    """
    width = 2 if bf16 else 4
    trained = (2 * width + 8 + 4 * MOMENTS.get(optimizer, 2)) * params if full else 6 * params
    loaded = 4 * (params + beside)  # both in float32, before either is made narrower
    return max(trained + width * beside, loaded) + (RUNTIME_MIB + 1200) * MIB


def merge_memory(params: int) -> int:
    """Bytes of merging an adapter: the base in float32, and the merged weights that take its places one by one."""
    return 8 * params + RUNTIME_MIB * MIB


def convert_memory(params: int, *, wide: bool = False) -> int:
    """Bytes of making a GGUF in f16 (``wide``: float32), beside the checkpoint that it is then compared with, in float32."""
    return (12 if wide else 8) * params + RUNTIME_MIB * MIB


def quantize_memory(params: int, *, onnx: bool, gptq: bool, chosen: bool) -> int:
    """Bytes of quantizing; ``gptq``: rounded with feedback, ``chosen``: to types of each matrix's own."""
    if onnx and (gptq or chosen):  # gradients as well
        return 10 * params + 2500 * MIB
    # Second moments of a gibibyte at most, the inputs of a batch, and torch.
    return 6 * params + 300 * MIB + (gptq and not onnx) * (1500 + RUNTIME_MIB) * MIB


def calibrate_memory(params: int) -> int:
    """Bytes of measuring an importance matrix: the model in f16, and sums of its activations."""
    return 3 * params + 300 * MIB


def base_memory(size: int) -> int:
    """Bytes of bringing a checkpoint of ``size`` bytes into the store."""
    return size + 300 * MIB


def sensitivity_work(params: int) -> Work:
    """Return the work of a table of types: gradients over a fixed amount of text, and every matrix in every type."""
    return Work(kind="sensitivity", amount=(4 * 8192 + 30_000) * float(params))
