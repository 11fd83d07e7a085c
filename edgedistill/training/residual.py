"""Hidden-width reduction: fewer dimensions of the residual stream, in every layer at once.

A decoder of the Llama kind adds to one stream and reads it through RMS norms without offsets, which do nothing to a rotation
but pass it on. So, with the norms' weights taken into the matrices that follow them, the stream may be written in any
orthonormal basis and the model stays the same function (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024). Taken is the
basis of the principal components of the stream over the task's rows, one for the whole model (SliceGPT's own for each layer need
matrices on the residual path that a Llama has not), and the last components are left out. A state counts by its direction alone,
since a norm passes on no more: the attention sink, with states a thousand times as large, would be all that is kept.

The final norm cannot be taken into a head that is tied to the embedding. Untied, the head would be a second matrix of the
embedding's size: 25 million weights in SmolLM2-135M, a fifth of the file (6 million with 12,288 tokens). But the span of the
basis may be turned inside of itself until that norm acts on each direction alone (``keep_tie``), and the tie stays at no cost.

Measured on the quickstart's teacher (SmolLM2-135M, 576 wide), directions chosen by 180 rows, nothing trained after it; mean KL
divergence from the whole model and share of the tokens with the same best one, over the 2,179 completion tokens of 100 dev rows
(one run): 512 of 576 dimensions 0.036 and 0.989, with the head untied 0.036 and 0.988, tied without turning (the best diagonal by
least squares) 0.100 and 0.970; 448 0.13 and 0.959; 384 0.36 and 0.903. Channels instead of directions, 512 of the largest
activations behind the norms (Minitron, Muralidharan et al. 2024, arXiv:2407.14679): 0.35 and 0.913, and 0.22 and 0.939 with the
norms' scale mended as it is here; those of the largest moments 0.19 and 0.940. With 1,184 of 1,536 neurons (alone 0.025) too: 0.069
where the neurons are chosen on the narrow stream, 0.082 the other way round, 0.090 where their output is fitted to the whole
model's states; that fit without cutting a neuron makes 0.036 into 0.062.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.hidden import token_counts
from edgedistill.training.packing import body, completion_states, make_batch, packed_mode
from edgedistill.training.shaping import narrowed_config

BASIS = "basis.safetensors"
"""Beside ``model/``, where its residual stream was narrowed: the tensor ``basis``, [hidden size before, after], float32."""
READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Linear layers of a block that read the residual stream, each through the norm before it."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def read_basis(entry: Path) -> torch.Tensor | None:
    """Read what the residual stream of a shaped student is written in; None where it is its model's own."""
    from safetensors.torch import load_file

    path = entry / BASIS
    return load_file(path)["basis"] if path.is_file() else None


def write_basis(basis: torch.Tensor, entry: Path) -> None:
    """Write the basis beside ``model/``: whatever lies in there would be taken for weights."""
    from safetensors.torch import save_file

    save_file({"basis": basis.float().contiguous()}, entry / BASIS)


def residual_moments(
    model: Any, examples: Sequence[Example], *, layers: Sequence[int] | None = None, batch_size: int = 16
) -> torch.Tensor:
    """Return the second moments of the residual stream, E[x x' / |x|^2] added over all norms that read it: [H, H], float64.

    ``layers`` are those whose norms count (all by default); the final norm always does. A state counts by its direction
    alone, which is all that a norm passes on. ``model`` is left as it was.
    """
    decoder = body(model)
    blocks = decoder.layers
    chosen = [blocks[at] for at in (range(len(blocks)) if layers is None else layers)]
    norms = [norm for block in chosen for norm in (block.input_layernorm, block.post_attention_layernorm)]
    hidden = model.config.hidden_size
    total = torch.zeros(hidden, hidden, dtype=torch.float64)
    counts: list[torch.Tensor] = []  # of the batch that is running

    def watch(_module: Any, inputs: Any) -> None:
        states = inputs[0].float().flatten(0, -2)
        shares = states * (counts[0].sqrt() / states.norm(dim=-1).clamp_min(1e-6))[:, None]
        total.add_((shares.T @ shares).cpu())

    hooks = [norm.register_forward_pre_hook(watch) for norm in (*norms, decoder.norm)]
    seen = 0.0
    try:
        with torch.no_grad(), packed_mode(model) as packed:
            for start in range(0, len(examples), batch_size):
                batch = make_batch(examples[start : start + batch_size], packed=packed)
                counts[:] = [token_counts(batch).flatten().to(next(model.parameters()).device)]
                completion_states(model, batch)
                seen += float(counts[0].sum())
    finally:
        for hook in hooks:
            hook.remove()
    return total / seen


def choose_basis(
    model: Any, examples: Sequence[Example], width: int, *, layers: Sequence[int] | None = None
) -> tuple[torch.Tensor, float]:
    """Choose the ``width`` directions that the rows use most: (orthonormal columns [H, width] in float64, the share of the
    states' squares that lies outside of them).

    Arguments as ``residual_moments`` takes them. Raises UsageError when there are no rows, or not so many dimensions.
    """
    if not 1 <= width <= model.config.hidden_size:
        raise UsageError(f"student.hidden = {width}: the hidden size of this model is {model.config.hidden_size}")
    if not examples:
        raise UsageError("student.hidden: no rows to choose the directions by", "give [heal] or [adapt] files")
    moments = residual_moments(model, examples, layers=layers)
    basis = principal_basis(moments, width)
    lost = 1.0 - float((basis * (moments @ basis)).sum() / moments.trace())
    return keep_tie(basis, body(model).norm.weight.detach().cpu()), lost


def principal_basis(moments: torch.Tensor, width: int) -> torch.Tensor:
    """Return the ``width`` directions that hold most of the moments, as orthonormal columns [H, width], float64: the largest
    first, each with its largest part positive.
    """
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :width]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return vectors * signs


def keep_tie(basis: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Turn a basis [H, width] inside of what it spans until the final norm's ``gains`` [H] act on each of its directions alone:
    then a norm of the narrow stream can stand for that norm, and the head can stay tied to the embedding.

    Between the two lies B' diag(gains) B, which is symmetric: its eigenvectors are the directions.
    """
    return basis @ torch.linalg.eigh(basis.T @ (gains.to(basis)[:, None] * basis)).eigenvectors


def narrow_residual(model: Any, basis: torch.Tensor) -> Any:
    """Return the causal LM with its residual stream written in ``basis`` [H, width], of the class that its config needs.

    What reads the stream takes in the weights of the norm before it and the basis; what writes it is projected. A norm
    divides by the length of fewer parts: its weight and its epsilon carry the factor, so that a stream that lies in the
    basis altogether gives the same function; of a tied model, if the basis is one of ``keep_tie`` and the final norm leaves
    the stream there. Raises UsageError as ``narrowed_config`` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, width = basis.shape
    old, prefix = model.state_dict(), model.base_model_prefix
    dtype, gain = next(model.parameters()).dtype, (hidden / width) ** 0.5
    config = AutoConfig.for_model(**narrowed_config(model.config.to_dict(), width))
    last, head = f"{prefix}.norm.weight", "lm_head.weight"
    new: dict[str, torch.Tensor] = {}
    for name, tensor in old.items():
        block, _, part = name.rpartition(".")
        module = ".".join(block.split(".")[-2:])
        if module in READERS and part == "weight":
            norm = old[f"{block.removesuffix(module)}{READERS[module]}.weight"]
            new[name] = (tensor.double() * norm.double()) @ basis
        elif module in WRITERS:
            new[name] = basis.T @ tensor.double()
        elif name == f"{prefix}.embed_tokens.weight":
            new[name] = tensor.double() @ basis
        elif name == head and not config.tie_word_embeddings:
            new[name] = (tensor.double() * old[last].double()) @ basis
        elif name == last and config.tie_word_embeddings:
            new[name] = gain * (basis * (tensor.double()[:, None] * basis)).sum(0)
        elif name == last or block.rpartition(".")[2] in READERS.values():
            new[name] = torch.full((width,), gain)
        elif name != head:  # biases of what reads the stream
            new[name] = tensor
        if name in new:
            new[name] = new[name].to(dtype)
    if config.tie_word_embeddings:
        new[head] = new[f"{prefix}.embed_tokens.weight"]
    small = AutoModelForCausalLM.from_config(config).to(dtype)
    small.load_state_dict(new)
    small.generation_config = model.generation_config
    return small.eval()
