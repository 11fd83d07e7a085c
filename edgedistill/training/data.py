"""Training examples: encoding with the chat template, batches fixed in advance, padded tensors.

An example is token ids and nothing else, so that a row of soft targets can be tied to the hash of what the teacher saw.
Batches are a pure function of (lengths, batch size, seed, epoch): a resumed run walks the same batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that carries no loss (the value that torch.nn.CrossEntropyLoss ignores by default)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its completion, as token ids; the completion ends with the token that ends a turn.

    ``weight`` is the row's in the loss, ``weights`` those of its completion tokens (empty: 1 each); a token counts by their
    product. ``evolution`` is the round of evolution that made the prompt, 0 for a seed (``curriculum.py``). Rows of one ``group``
    are the answers to one prompt, weighed by their shares: an optimiser step takes all of them, or none.
    """

    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    weight: float = 1.0
    weights: tuple[float, ...] = ()
    evolution: int = 0
    group: str = ""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.completion_ids):
            raise UsageError(
                f"row {self.id!r}: {len(self.weights)} weights for {len(self.completion_ids)} completion tokens"
            )
        if self.weight < 0 or any(one < 0 for one in self.weights):
            raise UsageError(f"row {self.id!r}: a weight is negative: the loss would be driven up")

    @property
    def token_weights(self) -> list[float]:
        """Return what each completion token counts in the loss."""
        if not self.weights:
            return [self.weight] * len(self.completion_ids)
        return [self.weight * one for one in self.weights]

    @property
    def length(self) -> int:
        """Number of tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def token_hash(self) -> bytes:
        """Hash the prompt and completion ids (16 bytes); the place where the completion starts is part of it."""
        return token_hash(self.prompt_ids, self.completion_ids)


def token_hash(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """Hash token ids to 16 bytes; equal ids cut at another place give another hash."""
    digest = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.asarray([*prompt_ids, *completion_ids], dtype="<u4").tobytes())
    return digest.digest()[:16]


def counter_rng(*parts: object) -> np.random.Generator:
    """Make the generator that belongs to these parts (seed, row id, sample…): no state is shared between rows.

    Philox is counter-based: the draw of one row does not depend on what was drawn before it, so a resumed run, another
    batch size or another order of rows draws the same numbers.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def prompt_tokens(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Encode the messages, and the definitions of tools, with the chat template up to where the model starts to write."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template",
            hint="use an instruction-tuned model, or add chat_template.jinja to it",
        )
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def turn_end(tokenizer: Any) -> int:
    """Find the token with which the chat template ends an assistant's turn (ChatML: ``<|im_end|>``); else the EOS
    token.
    """
    known = getattr(tokenizer, "_edgedistill_turn_end", None)
    if known is not None:
        return known
    token = None
    marker = "xyzzy"
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": marker}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False)
        rest = tokenizer.encode(text.rpartition(marker)[2], add_special_tokens=False)
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        token = next((one for one in rest if one in special), None)
    if token is None:
        token = tokenizer.eos_token_id
    if token is None:
        raise UsageError("the tokenizer has neither an end-of-turn nor an EOS token")
    tokenizer._edgedistill_turn_end = int(token)
    return int(token)


def encode_example(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    completion: str,
    *,
    tools: Sequence[dict[str, Any]] = (),
    id: str = "",
    context: int | None = None,
    weight: float = 1.0,
    evolution: int = 0,
    group: str = "",
) -> Example:
    """Encode one row; ``context`` is the longest sequence in tokens that the model takes.

    Raises UsageError, naming the row, when the row does not fit or its completion is empty: a row cut short would teach
    the student to stop nowhere.
    """
    prompt = prompt_tokens(tokenizer, messages, tools)
    answer = list(tokenizer.encode(completion, add_special_tokens=False))
    if not answer:
        raise UsageError(f"row {id!r}: the completion is empty")
    answer.append(turn_end(tokenizer))
    if context is not None and len(prompt) + len(answer) > context:
        raise UsageError(
            f"row {id!r}: {len(prompt)} prompt and {len(answer)} completion tokens do not fit a context of {context}",
            hint="shorten or remove the row, or raise the context length",
        )
    return Example(
        id=id,
        prompt_ids=tuple(prompt),
        completion_ids=tuple(answer),
        weight=weight,
        evolution=evolution,
        group=group,
    )


def groups_of(examples: Sequence[Example]) -> list[list[int]]:
    """Return the row indices of each group, in the order of their first rows; a row without a group is one by itself."""
    found: dict[str | int, list[int]] = {}
    for at, example in enumerate(examples):
        found.setdefault(example.group or at, []).append(at)
    return list(found.values())


def make_batches(
    lengths: Sequence[int] | Sequence[Example], *, batch_size: int, seed: int, epoch: int = 0, bucket: int = 16
) -> list[list[int]]:
    """Split the row indices of one epoch into batches of rows of similar length, in an order shuffled by (seed, epoch).

    Rows are shuffled, sorted by length inside windows of ``bucket`` batches, cut, and the batches shuffled: padding is
    small and the members of a batch still change from epoch to epoch. Every row is in exactly one batch; only one batch
    may be smaller than ``batch_size``.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
    sizes = np.asarray([item.length if isinstance(item, Example) else item for item in lengths], dtype=np.int64)
    rng = counter_rng("batches", seed, epoch)
    order = rng.permutation(len(sizes))
    window = batch_size * bucket
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(sizes[rows], kind="stable")]
        batches += [rows[cut : cut + batch_size].tolist() for cut in range(0, len(rows), batch_size)]
    return [batches[at] for at in rng.permutation(len(batches))]


WINDOWS = 8
"""The fewest windows that an epoch from easy to hard has, where it has as many batches."""


def eased_batches(
    lengths: Sequence[int] | Sequence[Example],
    difficulty: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    bucket: int = 16,
) -> list[list[int]]:
    """Split the row indices of an epoch into batches from easy to hard (``curriculum.py``): as many of them as
    ``make_batches`` makes, every row in exactly one, and only one smaller than ``batch_size``.

    Rows are put in the order of their ``difficulty`` [rows] (equal ones in an order drawn from ``seed``) and parted into windows
    of at most ``bucket`` batches; inside a window they are sorted by length and cut, and its batches shuffled.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
    sizes = np.asarray([item.length if isinstance(item, Example) else item for item in lengths], dtype=np.int64)
    rng = counter_rng("eased batches", seed)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(np.asarray(difficulty, dtype=np.float64)[order], kind="stable")]
    window = batch_size * max(1, min(bucket, math.ceil(len(sizes) / batch_size) // WINDOWS))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(sizes[rows], kind="stable")]
        cut = [rows[at : at + batch_size].tolist() for at in range(0, len(rows), batch_size)]
        batches += [cut[at] for at in rng.permutation(len(cut))]
    return batches


def padding_share(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in the padded tensors of these batches (0 = none)."""
    used = sum(examples[row].length for batch in batches for row in batch)
    padded = sum(len(batch) * max(examples[row].length for row in batch) for batch in batches)
    return 1.0 - used / padded if padded else 0.0


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """Padded tensors [rows, longest]: right padding, positions from 0, labels -100 outside the completion.

    ``rows`` and ``columns`` (each [completion tokens]) select the hidden states that predict the completion, shifted:
    the state at position t predicts the token at t + 1. ``targets`` are those tokens, in the same order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pick the states that predict completion tokens: [rows, longest, H] -> [completion tokens, H]."""
        return hidden[self.rows, self.columns]


def collate(examples: Sequence[Example], *, pad_id: int = 0, pad_to: int = 1) -> PaddedBatch:
    """Put examples into padded tensors; the width is a multiple of ``pad_to``."""
    import torch

    width = math.ceil(max(example.length for example in examples) / pad_to) * pad_to
    ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), width), dtype=np.int64)
    labels = np.full((len(examples), width), IGNORED, dtype=np.int64)
    rows, columns, targets, weights = [], [], [], []
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), example.length
        ids[row, :start] = example.prompt_ids
        ids[row, start:end] = example.completion_ids
        mask[row, :end] = 1
        labels[row, start:end] = example.completion_ids
        count = end - start
        rows += [row] * count
        columns += range(start - 1, end - 1)
        targets += example.completion_ids
        weights += example.token_weights
    positions = np.broadcast_to(np.arange(width), ids.shape)
    return PaddedBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions.copy()),
        labels=torch.from_numpy(labels),
        rows=torch.tensor(rows, dtype=torch.long),
        columns=torch.tensor(columns, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
    )
