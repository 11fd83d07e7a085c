"""Width pruning: fewer neurons in the FFN of every layer, what is cut done by what stays.

A gated FFN computes y = D a with a = act(gate x) * (up x): neuron j is column j of D and row j of gate and up. Over a
sample of text with second moments G = E[a a'], the neurons K that stay do most of the others' work when

    D_K <- (D G + E[e a'])[:, K] (G[K, K] + r)^-1,

and taking one more neuron j away then costs |D_j|^2 / [(G[K, K] + r)^-1]_jj (Optimal Brain Surgeon, Hassibi and Stork
1993; for whole columns ZipLM, Kurtic et al. 2023, arXiv:2302.04089). The layers are cut from the first to the last, each
on the states that the cut ones before it leave, as OBC and GPTQ quantize (Frantar and Alistarh 2022, arXiv:2208.11580);
e is what those states lack of the teacher's, so that a layer makes good what its predecessors spoilt. Where layers go
too, the states to come to are those where the next kept layer began (as in ``hidden.py``).

A token counts by 1 / |state|^2, its share of the state that the layer leaves: without that the first token, an attention
sink with states a thousand times as large, would be all that is fitted, and left out altogether it breaks, and every later
token with it.

On the quickstart's task, 704 of 1,536 neurons in all 30 layers by 600 rows, no training at all: 0.73 and 0.47 of the dev
sets' calls are right (n = 240 each; the whole teacher: 0.95 and 0.67); every layer alone, by the whole model's states and other
rows, 0.72 and 0.43. By the same rows the states of 100 dev rows are off by 0.023, and by 0.031 with every layer alone.
For one size of the file a few layers may go too, those whose loss alone hurts least: 26 layers of 896 neurons 0.79 and 0.51,
24 of 1,024 0.79 and 0.55, 22 of 1,184 0.78 and 0.50, 20 of 1,344 0.69 and 0.50 (one run each, standard error 0.03).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, PaddedBatch
from edgedistill.training.hidden import token_counts
from edgedistill.training.packing import PackedBatch, body, completion_states, make_batch, packed_mode

PARTS = ("gate_proj", "up_proj", "down_proj")
RIDGE = 0.01  # of the mean second moment; 0.001 and 0.0001 measured the same when every layer was fitted alone
TINY = 1e-12  # a layer that never fires has moments of 0, and any choice will do
ROUNDS = 8  # a round takes away an eighth of the neurons at most: what stays is fitted and ranked anew


@dataclass(frozen=True)
class Cut:
    """What stays of one FFN: the neurons, and the output matrix fitted to them [H, kept]."""

    kept: torch.Tensor
    down: torch.Tensor


def ffn_width(model: Any) -> int:
    """Return the number of neurons of a layer. Raises UsageError for FFNs of another form than gate, up and down."""
    parts = [
        getattr(getattr(layer, "mlp", None), name, None)
        for layer in getattr(body(model), "layers", ())
        for name in PARTS
    ]
    if parts and all(isinstance(part, nn.Linear) for part in parts):
        return model.config.intermediate_size
    raise UsageError(
        f"student.ffn: a model of type {model.config.model_type!r} cannot be made narrower",
        "its FFN has no gate_proj, up_proj and down_proj; set student.layers instead",
    )


def choose_neurons(moments: torch.Tensor, down: torch.Tensor, width: int, owed: torch.Tensor | None = None) -> Cut:
    """Choose ``width`` neurons and fit the output matrix to them.

    ``moments``: second moments of the activations, [F, F]; ``down``: the output matrix, [H, F]; ``owed``: moments of what
    the output ought to be beyond D a with the activations, [H, F]; all float32.
    """
    count = len(moments)
    full = moments + (RIDGE * moments.diagonal().mean()).clamp_min(TINY) * torch.eye(count)
    aim = down @ full
    kept, fitted = torch.arange(count), down
    if owed is not None:
        aim += owed
        fitted = torch.linalg.solve(full, aim.T).T
    while len(kept) > width:
        costs = fitted.square().sum(0) / torch.linalg.inv(full[kept][:, kept]).diagonal()
        left = max(width, len(kept) - max(1, count // ROUNDS // 2, len(kept) // ROUNDS))
        kept = kept[costs.topk(left).indices.sort().values]
        fitted = torch.linalg.solve(full[kept][:, kept], aim[:, kept].T).T
    return Cut(kept, fitted)


@dataclass(eq=False)
class _Batch:
    """Rows on their way through the layers: what each layer is called with, the tokens' counts, and the states of the
    teacher and of the student that is being cut.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    counts: torch.Tensor
    teacher: torch.Tensor
    student: torch.Tensor


def prune_ffn(
    model: Any,
    examples: Sequence[Example],
    width: int,
    *,
    layers: Sequence[int] | None = None,
    run: Any = None,
    batch_size: int = 16,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[float]:
    """Cut the FFNs of ``layers`` (all by default) to ``width`` neurons, in place; return how far the states that each
    leaves are from the teacher's, |s - t|^2 / |t|^2 averaged over the tokens of ``examples``.

    ``examples`` are rows of the task; ``run`` is the same model in another type, to be run over them (``model`` itself by
    default). Layers that are not named keep their width and must be cut out of the model before it is saved. Raises
    UsageError when the model has no gated FFN, the width is none that it has, or there are no rows.
    """
    have = ffn_width(model)
    if not 1 <= width <= have:
        raise UsageError(f"student.ffn = {width}: the FFN of this model has {have} neurons")
    if not examples:
        raise UsageError("student.ffn: no rows to choose the neurons by", "give [heal] or [adapt] files")
    blocks = body(model).layers
    chosen = list(range(len(blocks)) if layers is None else layers)
    run = model if run is None else run
    errors: list[float] = []
    cuts: list[Cut] = []
    with torch.no_grad(), packed_mode(run) as packed:
        batches = [
            _start(run, make_batch(examples[at : at + batch_size], packed=packed))
            for at in range(0, len(examples), batch_size)
        ]
        ends = [*chosen[1:], len(blocks)]  # the student's layer does the work of the teacher's up to the next kept one
        begin = 0
        for order, (at, end) in enumerate(zip(chosen, ends, strict=True)):
            progress(order, len(chosen), "fitting the FFNs")
            cut, error = _cut_layer(run, batches, at, range(begin, end), width)
            cuts.append(cut)
            errors.append(error)
            begin = end
    for at, cut in zip(chosen, cuts, strict=True):
        _apply(blocks[at].mlp, cut)
    model.config.intermediate_size = width
    return errors


def _cut_layer(run: Any, batches: Sequence[_Batch], at: int, work: range, width: int) -> tuple[Cut, float]:
    """Fit layer ``at`` to the teacher's states behind the layers ``work``; bring all batches behind it."""
    blocks = body(run).layers
    layer, down = blocks[at], blocks[at].mlp.down_proj
    weight = down.weight.detach()
    adds = not hasattr(layer, "post_feedforward_layernorm")  # else what the FFN gives is scaled before it is added
    moments = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32)
    owed = torch.zeros_like(weight, dtype=torch.float32)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        for each in work:
            batch.teacher = _call(blocks[each], batch.calls[each], batch.teacher)
        with _input_of(down) as seen:
            whole = _call(layer, batch.calls[at], batch.student)
        share = (batch.counts / _squares(batch.teacher)).sqrt()[:, None]
        active = seen[0].float().flatten(0, -2) * share
        moments += active.T @ active
        owed += ((batch.teacher - whole).float().flatten(0, -2) * share).T @ active
        held.append((seen[0], whole))
    cut = choose_neurons(moments.cpu(), weight.float().cpu(), width, owed.cpu() if adds else None)
    kept, fitted = cut.kept.to(weight.device), cut.down.to(weight)
    error = total = 0.0
    for batch, (active, whole) in zip(batches, held, strict=True):
        if adds:
            batch.student = whole + active[..., kept] @ fitted.T - active @ weight.T
        else:
            with _given(down, active[..., kept] @ fitted.T):
                batch.student = _call(layer, batch.calls[at], batch.student)
        off = _squares(batch.student - batch.teacher) / _squares(batch.teacher)
        error += float((off * batch.counts).sum())
        total += float(batch.counts.sum())
    return cut, error / total


def _squares(states: torch.Tensor) -> torch.Tensor:
    """Return each token's squared length, [tokens], float32."""
    return states.float().square().sum(-1).flatten().clamp_min(1e-6)


def _start(model: Any, batch: PackedBatch | PaddedBatch) -> _Batch:
    """Bring a batch before the first layer, and find out what the model calls every layer with."""
    layers = body(model).layers
    calls: list[Any] = [None] * len(layers)
    begin: dict[int, torch.Tensor] = {}

    def passed_on(at: int) -> Callable[..., torch.Tensor]:
        def forward(states: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
            calls[at] = (given, named)
            begin.setdefault(0, states)  # passed on unchanged: every layer gets these
            return states

        return forward

    try:
        for at, layer in enumerate(layers):
            layer.forward = passed_on(at)
        completion_states(model, batch)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return _Batch(calls, token_counts(batch).flatten().to(begin[0].device), begin[0], begin[0])


def _call(layer: Any, call: tuple[tuple[Any, ...], dict[str, Any]], states: torch.Tensor) -> torch.Tensor:
    out = layer(states, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def _input_of(part: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Keep what ``part`` is given inside."""
    seen: list[torch.Tensor] = []
    hook = part.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _given(part: nn.Linear, product: torch.Tensor) -> Iterator[None]:
    """Let ``part`` return ``product`` and its own bias inside, whatever it is given."""
    hook = part.register_forward_hook(lambda *_: product if part.bias is None else product + part.bias)
    try:
        yield
    finally:
        hook.remove()


def _apply(mlp: Any, cut: Cut) -> None:
    width = len(cut.kept)
    for name in ("gate_proj", "up_proj"):
        part = getattr(mlp, name)
        part.weight = nn.Parameter(part.weight.detach()[cut.kept].clone())
        if part.bias is not None:
            part.bias = nn.Parameter(part.bias.detach()[cut.kept].clone())
        part.out_features = width
    mlp.down_proj.weight = nn.Parameter(cut.down.to(mlp.down_proj.weight.dtype).contiguous())
    mlp.down_proj.in_features = width
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = width
