"""Depth pruning: a student cut out of a larger model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgedistill.errors import UsageError

PER_LAYER_KEYS = ("layer_types", "no_rope_layers")


def choose_layers(total: int, layers: int | Sequence[int]) -> list[int]:
    """Return the indices of the layers to keep: evenly spaced with the first and the last, or the list as given.

    Raises UsageError when there is nothing left, a layer does not exist, or one is named twice or out of order.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise UsageError(f"student.layers = {layers}: the model has {total} layers")
        if layers == 1:
            return [0]
        return [round(at * (total - 1) / (layers - 1)) for at in range(layers)]
    chosen = list(layers)
    if not chosen or any(not 0 <= at < total for at in chosen):
        raise UsageError(f"student.layers = {chosen}: the layers of this model are 0 to {total - 1}")
    if chosen != sorted(set(chosen)):
        raise UsageError(f"student.layers = {chosen}: name each layer once, in ascending order")
    return chosen


def prune_depth(model: Any, layers: int | Sequence[int]) -> Any:
    """Keep some layers of a causal LM, in place, and return it; its config says so and the saved checkpoint loads.

    Embeddings, final norm and head stay as they are. Per-layer lists of the config (attention kinds) are cut with it.
    """
    from torch import nn

    decoder = getattr(model, model.base_model_prefix)
    name = next((name for name in ("layers", "h") if isinstance(getattr(decoder, name, None), nn.ModuleList)), None)
    if name is None:
        raise UsageError(
            f"a model of type {model.config.model_type!r} cannot be depth-pruned: its layers were not found"
        )
    blocks = getattr(decoder, name)
    config = model.config
    chosen = choose_layers(len(blocks), layers)
    setattr(decoder, name, nn.ModuleList(blocks[at] for at in chosen))
    for at, block in enumerate(getattr(decoder, name)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = at
    for key in PER_LAYER_KEYS:
        values = getattr(config, key, None)
        if isinstance(values, list) and len(values) == len(blocks):
            setattr(config, key, [values[at] for at in chosen])
    config.num_hidden_layers = len(chosen)
    return model
