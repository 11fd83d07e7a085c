"""Flat batches: no padding in the linear layers, and the prefix that all rows share is computed once.

A chat template puts the same system prompt in front of every row, often a third of the tokens of a short row. Here the
sequences of a batch lie one after the other in a tensor [1, tokens], the common prefix first and once. Positions and
attention make each row see what it would see alone: the results are those of one row at a time, up to rounding, which
``selfcheck`` proves for the model at hand before it trains. Attention alone is computed on a padded view.

transformers hands every keyword that a model does not know to the attention function: that is how the layout of the
batch reaches it without a change to any model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from edgedistill.training.data import Example, PaddedBatch, collate
from edgedistill.training.fused_layer import fused
from edgedistill.training.short_attention import ShortAttention, fits

ATTENTION = "edgedistill_packed"
ROUND, ROUND_ROWS = 16, 8
"""Batches are filled up to a multiple of so many tokens, and the padded view of attention to one of so many columns: oneDNN
compiles a kernel for every new shape of a product (1.6 ms each, measured with bf16 on a Xeon with AMX) and keeps the last 1,024, so
shapes that come back are worth a few tokens that nobody reads."""
PACKABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "smollm3"})
"""Model types whose attention hands keywords on and whose mask is causal, with or without a sliding window."""


class _Rows(torch.autograd.Function):
    """Select rows where each real row is used once; the way back is a selection too, no scatter with addition."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Unpad(torch.autograd.Function):
    """Drop padding rows; their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.count, *grads[0].shape[1:]))
        out[index] = grads[0]
        return out, None


@dataclass(eq=False)
class Layout:
    """Where the rows of a flat batch lie: a shared prefix of ``prefix`` tokens, then each row's own tokens."""

    prefix: int
    counts: list[int]
    pad_index: torch.Tensor  # [rows * widest] flat index among the own tokens (0 where there is padding)
    unpad_index: torch.Tensor  # [own tokens] where each own token lies in the padded view
    width: int = 0  # columns of the padded view; 0: those of the longest row
    tail: int = 0  # tokens behind the rows that fill the batch up, and that no row sees
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    additive: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> None:
        """Move the indices to the model's device."""
        self.pad_index, self.unpad_index = self.pad_index.to(device), self.unpad_index.to(device)

    @property
    def widest(self) -> int:
        """Return the columns of the padded view: at least the tokens of the longest row without the prefix."""
        return self.width or max(self.counts)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return the boolean mask [widest, prefix + widest] (true = may look), or None where plain causal will do."""
        if window is not None and window >= self.prefix + self.widest:
            window = None
        if window not in self.masks:
            self.masks[window] = _causal(self.widest, self.prefix, window, self.pad_index.device)
        return self.masks[window]

    def additive_mask(self, window: int | None, groups: int) -> torch.Tensor:
        """Return 0 and -inf for [groups * widest, prefix + widest], float32: the form of ``short_attention``."""
        if (window, groups) not in self.additive:  # teacher and student may group their heads differently
            mask = _causal(self.widest, self.prefix, window, self.pad_index.device, always=True)
            assert mask is not None
            zeros = torch.zeros(mask.shape, device=mask.device)
            self.additive[window, groups] = zeros.masked_fill_(~mask, -torch.inf).repeat(groups, 1)
        return self.additive[window, groups]

    @functools.cached_property
    def real(self) -> torch.Tensor:
        """Return 1 for a token and 0 for padding: [rows, 1, 1, widest, 1]."""
        real = torch.zeros(len(self.counts) * self.widest, dtype=torch.bool, device=self.unpad_index.device)
        real[self.unpad_index] = True
        return real.view(len(self.counts), 1, 1, self.widest, 1)

    @functools.cached_property
    def prefix_alone(self) -> Layout:
        """Return the layout of the prefix as one row by itself."""
        every = torch.arange(self.prefix, device=self.pad_index.device)
        return Layout(0, [self.prefix], every, every)

    def prefix_mask(self, window: int | None) -> torch.Tensor | None:
        """Return the mask of the prefix on itself."""
        if window is None or window >= self.prefix:
            return None
        return _causal(self.prefix, 0, window, self.pad_index.device)


def _causal(
    width: int, prefix: int, window: int | None, device: torch.device, *, always: bool = False
) -> torch.Tensor | None:
    if prefix == 0 and window is None and not always:
        return None
    behind = prefix + torch.arange(width, device=device)[:, None] - torch.arange(prefix + width, device=device)[None, :]
    mask = behind >= 0
    return mask & (behind < window) if window is not None else mask


@dataclass(eq=False, kw_only=True)
class PackedBatch:
    """A flat batch [1, tokens] with the indices of the states that predict completion tokens, and those tokens."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    index: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pick the states that predict completion tokens: [1, tokens, H] -> [completion tokens, H]."""
        return hidden[0].index_select(0, self.index)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all sequences start with."""
    # What the smallest and the largest share, all others share.
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    count = 0
    for left, right in zip(first, last, strict=False):
        if left != right:
            break
        count += 1
    return count


def lay_out(
    sequences: Sequence[Sequence[int]], prefix: int, *, multiple: int = 1
) -> tuple[list[int], list[int], Layout]:
    """Flatten sequences that share their first ``prefix`` tokens; return ids, positions and the layout. The padded view gets a
    multiple of ``multiple`` columns.
    """
    ids = list(sequences[0][:prefix])
    positions = list(range(prefix))
    counts = [len(sequence) - prefix for sequence in sequences]
    widest = -(-max(counts) // multiple) * multiple
    pad_index: list[int] = []
    unpad_index: list[int] = []
    start = 0
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        ids += sequence[prefix:]
        positions += range(prefix, prefix + count)
        pad_index += [*range(start, start + count), *([0] * (widest - count))]
        unpad_index += range(row * widest, row * widest + count)
        start += count
    layout = Layout(prefix, counts, torch.tensor(pad_index), torch.tensor(unpad_index), widest)
    return ids, positions, layout


def pack(examples: Sequence[Example], *, share_prefix: bool = True) -> PackedBatch:
    """Lay examples out flat; the shared prefix ends before the last prompt token of the shortest prompt."""
    sequences = [(*example.prompt_ids, *example.completion_ids) for example in examples]
    prefix = 0
    if share_prefix and len(examples) > 1:
        prefix = min(common_prefix(sequences), min(len(example.prompt_ids) for example in examples) - 1)
    ids, positions, layout = lay_out(sequences, max(prefix, 0), multiple=ROUND_ROWS)
    layout.tail = -len(ids) % ROUND
    ids, positions = [*ids, *([0] * layout.tail)], [*positions, *([0] * layout.tail)]
    index: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    start = layout.prefix
    for example, count in zip(examples, layout.counts, strict=True):
        end = start + count
        index += range(end - len(example.completion_ids) - 1, end - 1)
        targets += example.completion_ids
        weights += example.token_weights
        start = end
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        layout=layout,
        index=torch.tensor(index),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights, dtype=torch.float32),
    )


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a flat batch. query [1, heads, tokens, D], key and value [1, kv heads, tokens, D] -> [1, tokens,
    heads, D].

    ``layout`` is a Layout, or an object with an ``attend`` method (the decoder's key/value cache).
    """
    if hasattr(layout, "attend"):
        return layout.attend(module, query, key, value, scaling, sliding_window), None
    heads, dim, groups = query.shape[1], query.shape[3], query.shape[1] // key.shape[1]
    prefix, real = layout.prefix, query.shape[2] - layout.tail
    query, key, value = (tensor[:, :, :real] for tensor in (query, key, value))
    filled = query.new_zeros((layout.tail, heads, dim))
    if fits(len(layout.counts), heads, layout.widest, prefix, query.device) and not dropout:
        scale = scaling if scaling is not None else dim**-0.5
        out: torch.Tensor = ShortAttention.apply(query, key, value, layout, scale, sliding_window)  # pyright: ignore
        return torch.cat([out, filled])[None], None
    own = _long_attention(query, key, value, layout, scaling, sliding_window, dropout)
    if not prefix:
        return torch.cat([own, filled])[None], None
    mask = layout.prefix_mask(sliding_window)
    alone = nn.functional.scaled_dot_product_attention(
        query[:, :, :prefix],
        key[:, :, :prefix].repeat_interleave(groups, 1),
        value[:, :, :prefix].repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
    )
    return torch.cat([alone[0].transpose(0, 1), own, filled], 0)[None], None


def _long_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Attend with torch's kernel over a padded view: the rows' own tokens -> [own tokens, heads, D]."""
    heads, dim, groups = query.shape[1], query.shape[3], query.shape[1] // key.shape[1]
    prefix, rows, widest = layout.prefix, len(layout.counts), layout.widest
    padded: list[torch.Tensor] = []
    for tensor in (query, key, value):
        own = tensor[0, :, prefix:].transpose(0, 1)
        own: torch.Tensor = _Rows.apply(own, layout.pad_index, layout.unpad_index)  # pyright: ignore
        padded.append(own.view(rows, widest, tensor.shape[1], dim).transpose(1, 2))
    wide_query, wide_key, wide_value = padded
    if prefix:
        wide_key = torch.cat([key[:, :, :prefix].expand(rows, -1, -1, -1), wide_key], 2)
        wide_value = torch.cat([value[:, :, :prefix].expand(rows, -1, -1, -1), wide_value], 2)
    mask = layout.mask(window)
    wide = nn.functional.scaled_dot_product_attention(
        wide_query,
        wide_key.repeat_interleave(groups, 1),
        wide_value.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
    )
    wide = wide.transpose(1, 2).reshape(rows * widest, heads, dim)
    return _Unpad.apply(wide, layout.unpad_index)  # pyright: ignore[reportReturnType]


def register() -> None:
    """Make the attention function known to transformers under the name ``ATTENTION``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)


def packable(model: Any) -> bool:
    """Tell whether flat batches are possible with this model; ``selfcheck`` compares them with plain ones."""
    config = model.config
    return config.model_type in PACKABLE and not getattr(config, "attn_logit_softcapping", None)


@contextmanager
def packed_mode(model: Any, *beside: Any) -> Iterator[bool]:
    """Switch the model to packed attention while inside, where it and those that read its batches can; yields whether it
    did.
    """
    causal = causal_lm(model)
    if not all(map(packable, (causal, *beside))):
        yield False
        return
    register()
    before = causal.config._attn_implementation
    causal.set_attn_implementation(ATTENTION)
    try:
        with fused(getattr(body(model), "layers", ())):
            yield True
    finally:
        causal.set_attn_implementation(before)


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def body(model: Any) -> Any:
    """Return the decoder without its LM head."""
    causal = causal_lm(model)
    return getattr(causal, causal.base_model_prefix)


def make_batch(examples: Sequence[Example], *, packed: bool, pad_id: int = 0) -> PackedBatch | PaddedBatch:
    """Make the batch that ``completion_states`` takes: flat where the model can, padded elsewhere."""
    return pack(examples) if packed else collate(examples, pad_id=pad_id)


def completion_states(model: Any, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Run the decoder and return the last hidden states that predict completion tokens: [completion tokens, H]."""
    decoder = body(model)
    device = next(decoder.parameters()).device
    if isinstance(batch, PackedBatch):
        layout = batch.layout
        layout.to(device)
        batch.index = batch.index.to(device)
        out = decoder(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            use_cache=False,
            layout=layout,
        )
    else:
        out = decoder(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            position_ids=batch.position_ids.to(device),
            use_cache=False,
        )
    return batch.select(out.last_hidden_state)


def read_beside(teacher: Any, batch: PackedBatch | PaddedBatch, tokens: torch.Tensor | None) -> torch.Tensor:
    """Run a teacher over a batch of its student, without gradients: its ``completion_states``. ``tokens`` are the teacher's
    numbers of the student's tokens, where they have others.
    """
    if tokens is not None:
        batch = replace(batch, input_ids=tokens.to(batch.input_ids.device)[batch.input_ids])
    with torch.no_grad(), packed_mode(teacher) if isinstance(batch, PackedBatch) else nullcontext():
        return completion_states(teacher, batch)
