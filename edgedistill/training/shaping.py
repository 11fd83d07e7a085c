"""Depth pruning: a student cut out of a larger model, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.families import of_any_width

if TYPE_CHECKING:
    from edgedistill.training.data import Example

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


def narrowed_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return config.json with a residual stream of ``width`` dimensions: heads stay as many and as large as they are.

    Raises UsageError as ``of_any_width`` does.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    narrow = {
        "hidden_size": width,
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "rms_norm_eps": config["rms_norm_eps"] * hidden / width,  # of a mean over fewer squares
    }
    return of_any_width({**config, **narrow})


def block_influence(model: Any, examples: Sequence[Example], *, batch_size: int = 16) -> list[float]:
    """Return how much each layer turns the states of the rows: 1 - cosine of what goes in and what comes out, averaged over the
    tokens but for the first of each row, which is an attention sink (ShortGPT, Men et al. 2024, arXiv:2403.03853).

    A layer that turns them little is missed little. ``model`` is left as it was.
    """
    import torch

    from edgedistill.training.hidden import layers_of, state_weights
    from edgedistill.training.packing import completion_states, make_batch, packed_mode

    layers = layers_of(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    weights: list[torch.Tensor] = []  # of the batch that is running
    count = 0.0

    def watch(at: int) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            turned = 1.0 - torch.cosine_similarity(inputs[0].float(), out.float(), dim=-1)
            totals[at] += float((turned.flatten() * weights[0]).sum())

        return hook

    hooks = [layer.register_forward_hook(watch(at)) for at, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), packed_mode(model) as packed:
            for start in range(0, len(examples), batch_size):
                batch = make_batch(examples[start : start + batch_size], packed=packed)
                weights[:] = [state_weights(batch).flatten().to(next(model.parameters()).device)]
                completion_states(model, batch)
                count += float(weights[0].sum())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return (totals / count).tolist()


def most_important(influence: Sequence[float], count: int) -> list[int]:
    """Return the ``count`` layers with the largest influence, in ascending order; of equal ones the earlier."""
    ordered = sorted(range(len(influence)), key=lambda at: (-influence[at], at))
    return sorted(ordered[:count])


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
