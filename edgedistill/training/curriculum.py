"""From easy to hard: the order in which the rows of the first epoch are learnt.

Easy rows first can lead training to better or earlier solutions (Bengio et al. 2009, "Curriculum Learning", ICML). How hard a row
is, is told by one of four measures:

- ``length``: tokens of its completion, the longer the harder (Kocmi and Bojar 2017, arXiv:1707.09533);
- ``loss``: nats a token that its completion costs the student before it is trained (Hacohen and Weinshall 2019, arXiv:1904.03626);
- ``confidence``: how unsure the teacher is, by the stored targets: 1 less the mean of its largest probability (Weinshall et al.
  2018, arXiv:1802.03796, who rank by a teacher);
- ``evolution``: the round of evolution that made its prompt, 0 for a seed (Evol-Instruct, arXiv:2304.12244).

The pacing is the plainest that is well founded: one epoch in order, then shuffled ones (SortaGrad, Amodei et al. 2015,
arXiv:1512.02595, section 3.2). Nothing is left out or repeated, so an epoch has the steps and tokens that it has without. In order
are windows of a few batches; inside of one, rows are batched by length as elsewhere (``data.make_batches``), and the batches
shuffled: a batch of equal rows in a strict order would be a poor sample, and a slow one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.packing import causal_lm, completion_states, make_batch, packed_mode
from edgedistill.training.targets import SparseTargets

ROWS = 16
"""Rows whose loss is measured in one forward."""
POSITIONS = 128
"""Completion tokens whose logits exist at a time."""
FILE = "difficulty.json"


def difficulty(
    model: Any,
    examples: Sequence[Example],
    targets: Sequence[SparseTargets] | None,
    by: str,
    *,
    vocab_size: int,
    folder: Path,
    digest: str,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str], object] = lambda note: None,
) -> list[float]:
    """Return how hard each row is, larger for harder: [rows].

    ``by`` is a measure from the head of this file; ``confidence`` reads ``targets``, ``loss`` runs ``model``, the student at its
    start, over all rows. Losses are kept in ``folder`` until the run of this ``digest`` ends: a resumed run must walk the same
    order, and losses that differ in their last bits could make another one. For the same reason the first of several processes,
    ``part`` = (rank, processes), measures for all. Raises UsageError for confidence without targets.
    """
    if by == "length":
        return [float(len(one.completion_ids)) for one in examples]
    if by == "evolution":
        return [float(one.evolution) for one in examples]
    if by == "confidence":
        if targets is None:
            raise UsageError(
                'curriculum = "confidence" needs the stored distributions of the teacher, and there are none',
                hint='set score.kind = "sampled", or curriculum = "loss"',
            )
        return [unsureness(one) for one in targets]
    rank, world = part
    found: list[list[float]] = [[]]
    if rank == 0:
        found = [_read(folder / FILE, digest) or losses_of(model, examples, vocab_size=vocab_size, progress=progress)]
        _write(folder / FILE, digest, found[0])
    if world > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(found, src=0)
    return found[0]


def unsureness(targets: SparseTargets) -> float:
    """Return 1 less the mean over positions of the largest probability (at T = 1) among the ids that are kept, in [0, 1].

    Of n draws the likeliest id is missing only where it is unlikely, too: with probability (1 - p)^n.
    """
    best = np.zeros(max(1, targets.positions))
    np.maximum.at(best, targets.rows, np.exp(targets.logp.astype(np.float64)))
    return float(1.0 - best.clip(0.0, 1.0).mean())


def losses_of(
    model: Any,
    examples: Sequence[Example],
    *,
    vocab_size: int,
    progress: Callable[[str], object] = lambda note: None,
) -> list[float]:
    """Return the mean cross-entropy of each row's completion under the model, in nats a token, by the tokens' weights in the loss.

    ``vocab_size`` is the tokenizer's: rows of the head beyond it are padding. The model's mode is left as it was.
    """
    found = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda row: (examples[row].length, row))
    head, training = causal_lm(model).get_output_embeddings(), model.training
    bias = None if head.bias is None else head.bias[:vocab_size]
    model.eval()
    try:
        with torch.no_grad(), packed_mode(model) as packed:
            for start in range(0, len(order), ROWS):
                rows = order[start : start + ROWS]
                batch = make_batch([examples[row] for row in rows], packed=packed)
                states, labels = completion_states(model, batch), batch.targets
                each = [
                    torch.nn.functional.cross_entropy(
                        torch.nn.functional.linear(states[at : at + POSITIONS], head.weight[:vocab_size], bias).float(),
                        labels[at : at + POSITIONS].to(states.device),
                        reduction="none",
                    )
                    for at in range(0, len(labels), POSITIONS)
                ]
                parts = torch.cat(each).double().cpu().split([len(examples[row].completion_ids) for row in rows])
                for row, part in zip(rows, parts, strict=True):
                    weights = torch.tensor(examples[row].token_weights, dtype=torch.float64)
                    found[row] = float((part * weights).sum() / (weights.sum() or 1.0))
                progress(f"how hard the rows are: {start + len(rows)} of {len(order)}")
    finally:
        model.train(training)
    return found


def _read(path: Path, digest: str) -> list[float]:
    known = json.loads(path.read_text()) if path.exists() else {}
    return known["difficulty"] if known.get("digest") == digest else []


def _write(path: Path, digest: str, difficulty: list[float]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps({"digest": digest, "difficulty": difficulty}))
        file.flush()
        os.fsync(file.fileno())  # checkpoints that are written after it count on it
    os.replace(partial, path)
