"""A teacher's hidden states on disk: what ``features.py`` compares, without the teacher in memory while its student learns.

Two bytes (bf16) a token, layer and dimension: 576 dimensions and 10 layers are 11.5 kB a token, hundreds of times what 12
draws of its distribution take (``targets.py``). That pays where the same rows are read more than once (epochs, the points
of a sweep, seeds), or where teacher and student do not fit into memory together. Shards are safetensors: ``hashes``
[rows, 16] of each row's token ids, ``ends`` [rows], and ``layer.N`` [tokens, H] for each layer, the rows one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, PaddedBatch
from edgedistill.training.features import Features
from edgedistill.training.hidden import Guide, catch_output, layers_of
from edgedistill.training.objectives import FeatureTerms
from edgedistill.training.packing import PackedBatch, completion_states, make_batch, packed_mode
from edgedistill.training.vocabulary import read_origin

SUFFIX = ".safetensors"


class CachedStates:
    """The stored states of rows, found by the hash of their token ids. Raises UsageError where the folder holds none."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._shards: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}  # shard, first token, one behind the last
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            shard = safe_open(path, framework="pt")
            start = 0
            for name, end in zip(shard.get_tensor("hashes"), shard.get_tensor("ends").tolist(), strict=True):
                self._places[bytes(name.tolist())] = (len(self._shards), start, end)
                start = end
            self._shards.append(shard)
        if not self._places:
            raise UsageError(f"{folder}: no hidden states are stored there", "build the states step again")
        stored: list[str] = self._shards[0].keys()
        names = [name for name in stored if name.startswith("layer.")]
        self.tokenizer: str = self._shards[0].metadata()["tokenizer"]
        self.layers = sorted(int(name.removeprefix("layer.")) for name in names)
        self.width = int(self._shards[0].get_slice(names[0]).get_shape()[1])

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def row(self, key: bytes, layer: int) -> torch.Tensor:
        """Return a row's states at one layer: [tokens, H], bf16."""
        shard, start, end = self._places[key]
        return self._shards[shard].get_slice(f"layer.{layer}")[start:end]


class CachedFeatures(Features):
    """``Features`` of a teacher whose states are stored, at ``pairs`` of layers. ``keys`` are the teacher's token hashes of the
    examples, by the student's. Raises UsageError where a pair names a layer that is not stored.
    """

    reads_along: ClassVar[bool] = False

    def __init__(
        self,
        states: CachedStates,
        keys: dict[bytes, bytes],
        student: Any,
        terms: FeatureTerms,
        pairs: Sequence[tuple[int, int]],
        *,
        seed: int = 0,
    ) -> None:
        if absent := {of_teacher for of_teacher, _ in pairs} - set(states.layers):
            raise UsageError(
                f"the hidden states of the teacher's layers {sorted(absent)} are not stored",
                "build the states step again",
            )
        Guide.__init__(self, None, pairs)
        self.states, self.keys = states, keys
        self.terms, self.projections = terms, self._matrices(terms, states.width, student, seed)

    def sums(
        self, batch: PackedBatch | PaddedBatch, examples: Sequence[Example], *, read: bool = True
    ) -> dict[str, torch.Tensor]:
        """Return what ``Features`` does. The teacher has seen every row, whatever ``read`` says."""
        keys = [self.keys[one.token_hash] for one in examples]
        device = batch.input_ids.device
        for layer in {of_teacher for of_teacher, _ in self.pairs}:
            self._teachers[layer] = join_rows(batch, [self.states.row(key, layer) for key in keys]).to(device)
        return super().sums(batch, examples, read=False)


def write_states(
    path: Path,
    model: Any,
    examples: Sequence[Example],
    layers: Sequence[int],
    *,
    tokenizer: str,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Run ``model`` over the examples and store the states behind ``layers`` in one shard; return its bytes. ``tokenizer`` is the
    hash of what made the token ids.

    The file is written under another name first: a killed run leaves no half of it.
    """
    from safetensors.torch import save_file

    found: dict[int, list[torch.Tensor]] = {at: [] for at in layers}
    seen: dict[int, torch.Tensor] = {}
    hooks = [catch_output(layers_of(model)[at], at, seen) for at in layers]
    try:
        with torch.inference_mode(), packed_mode(model) as packed:
            start = 0
            while start < len(examples):
                end = start + max(1, batch_tokens // max(1, examples[start].length))
                batch = make_batch(examples[start:end], packed=packed)
                completion_states(model, batch)
                for at in layers:
                    found[at] += [rows.to("cpu", torch.bfloat16) for rows in split_rows(batch, seen[at])]
                start = min(end, len(examples))
                progress(start)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = torch.tensor([one.length for one in examples])
    tensors = {f"layer.{at}": torch.cat(rows).contiguous() for at, rows in found.items()}
    tensors |= {
        "ends": lengths.cumsum(0),
        "hashes": torch.tensor([list(one.token_hash) for one in examples], dtype=torch.uint8),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"tokenizer": tokenizer})
    partial.replace(path)
    return path.stat().st_size


def split_rows(batch: PackedBatch | PaddedBatch, states: torch.Tensor) -> list[torch.Tensor]:
    """Cut a batch's states [rows or 1, positions, H] into those of each row, its share of the common prefix included."""
    if isinstance(batch, PaddedBatch):
        return [own[mask.bool()] for own, mask in zip(states, batch.attention_mask, strict=True)]
    layout = batch.layout
    prefix, own = states[0, : layout.prefix], states[0, layout.prefix : states.shape[1] - layout.tail]
    return [torch.cat([prefix, part]) for part in own.split(layout.counts)]


def join_rows(batch: PackedBatch | PaddedBatch, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay the states of each row [tokens, H] out as the batch is: ``split_rows`` the other way round; padding is 0."""
    if isinstance(batch, PaddedBatch):
        laid = rows[0].new_zeros((*batch.attention_mask.shape, rows[0].shape[-1]))
        for own, mask, row in zip(laid, batch.attention_mask, rows, strict=True):
            own[mask.bool().to(own.device)] = row
        return laid
    prefix, tail = batch.layout.prefix, rows[0].new_zeros((batch.layout.tail, rows[0].shape[-1]))
    return torch.cat([rows[0][:prefix], *(row[prefix:] for row in rows), tail])[None]


def teachers_hashes(
    examples: Sequence[Example], model: Path, states: CachedStates, *, tokenizer: str
) -> dict[bytes, bytes]:
    """Return, by the hash of a student's token ids, that of the teacher's, for the examples whose states are stored.

    They differ where the vocabulary of ``model``, whose tokenizer has the hash ``tokenizer``, was trimmed; text that it cuts
    into other pieces has no states. Raises UsageError where none has.
    """
    origin = None if states.tokenizer == tokenizer else read_origin(model)
    both = {one.token_hash: (origin.example(one) if origin else one).token_hash for one in examples}
    found = {own: theirs for own, theirs in both.items() if theirs in states}
    if not found:
        raise UsageError(
            "no row has stored hidden states: the student cuts them all into other pieces than the teacher",
            "take a larger student.vocabulary, or set distill.features.cached = false",
        )
    return found
