"""What each weight matrix's errors cost: second moments of its inputs and of the gradients of its outputs, from one pass.

Quantizing W to W + D moves the outputs of a matrix by D x, and the model's distributions p by KL divergences whose second order
is the Fisher information: with tokens y drawn from p and g the gradient of the sum of log p(y) by the matrix's output,

    KLD(D) = 1/2 E[(sum over t of g_t' D x_t)^2] / N ~ k/2 sum over o of G_o (D H D')_oo,

    G_o = sum over t of g_to^2 / N,    H = sum over t of s_t x_t x_t' / sum of s_t,    s_t = sum over o of g_to^2,

N the number of predicted tokens (K-FAC: Martens and Grosse 2015, arXiv:1503.05671, each token's input weighed by its own gradient).
What the tokens of a text share, such as values that attention averages, is in k: the squared norm of the text's gradient
by the weights over what single tokens add to it, so that errors of no direction come out right,

    k = sum over texts of |sum over t of g_t x_t'|^2 / sum over t of |g_t|^2 |x_t|^2.

Where a model is sure, as one that was taught a task mostly is, tokens drawn from p say nothing: what an error moves there hangs on
the few tokens that p gives little. So y is drawn from q(y) ~ p(y) |g(y)|^2 and its gradient weighed by sqrt(p / q), with a sign by
chance, so that its mean stays 0: the same moments, and no draw adds more than another (by the norm of the gradient at the head;
importance sampling, as of any mean). On a student of SmolLM2, over 1,436 tokens, costs by two seeds differed by 1.8 times with y
from p, and by 2 % so.

The head's outputs are the logits, where the mean over y is known: G_o = sum of p (1 - p) / N. An embedding is looked up as
well: there its error is D_v itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.cpus import usable_cpus
from edgedistill.errors import StepFailed, UsageError

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]

MEMORY = 2**30  # bytes of second moments held at once; more matrices take another pass over the text
_BATCH = 1024  # tokens run at once
_LOGITS = 256  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Moments:
    """Of one matrix [R, C]: ``inputs`` is H, float32 [C, C]; ``outputs`` is G, float32 [R], in the order of the GGUF's rows.

    An embedding also has ``looked_up`` [R], what an error of each token's row counts, and ``columns`` [C], what share of
    that each column has (summing to 1). An embedding that is no head has no ``inputs``.
    """

    inputs: np.ndarray | None
    outputs: np.ndarray | None
    looked_up: np.ndarray | None = None
    columns: np.ndarray | None = None

    def importance(self) -> np.ndarray:
        """Return what an error of each column counts, float32 [C]: the diagonal, as an importance matrix holds it."""
        import numpy as np

        parts = []
        if self.inputs is not None and self.outputs is not None:
            parts.append(self.inputs.diagonal() * float(self.outputs.sum(dtype=np.float64)))
        if self.columns is not None and self.looked_up is not None:
            parts.append(self.columns * float(self.looked_up.sum(dtype=np.float64)))
        return np.asarray(np.sum(parts, axis=0, dtype=np.float64), dtype=np.float32)

    def cost(self, error: np.ndarray) -> float:
        """Return the KLD, nats a token, that an ``error`` [R, C] of the weights is expected to make."""
        import numpy as np

        total = 0.0
        if self.inputs is not None and self.outputs is not None:
            each = np.einsum("rc,rc->r", error @ self.inputs, error, dtype=np.float64)
            total += float(each @ self.outputs)
        if self.columns is not None and self.looked_up is not None:
            total += float((np.square(error) @ self.columns) @ self.looked_up)
        return total / 2


def collect(
    checkpoint: Path,
    token_rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    seed: int = 0,
    memory: int = MEMORY,
    threads: int | None = None,
    as_gguf: bool = True,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Moments]]:
    """Yield (GGUF name, moments) of every matrix of a checkpoint, layer by layer; with ``as_gguf`` off the checkpoint's own names
    and order of rows.

    ``token_rows`` are texts in token ids; of each, tokens from ``starts`` on are the ones whose distributions are to be kept (an
    answer after its prompt). At most ``memory`` bytes of moments are held: a larger model takes more passes. Raises
    UsageError for text without an answer, StepFailed where a gradient is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.formats.gguf.convert import places

    rows = [
        (list(row), max(1, start)) for row, start in zip(token_rows, starts, strict=True) if len(row) > max(1, start)
    ]
    if not rows:
        raise UsageError(
            "no calibration row has an answer behind its prompt", "give at least a few dozen texts of the task"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cpus())
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
        names = places(checkpoint) if as_gguf else _OwnNames()
        groups = _groups(model, memory)
        of_head = None
        for at, layers in enumerate(groups):
            told = f"pass {at + 1} of {len(groups)}, " if len(groups) > 1 else ""

            def tell(done: int, total: int, told: str = told, at: int = at) -> None:
                if progress:
                    progress(at * total + done, len(groups) * total, f"{told}{done} of {total} rows")

            one = _Pass(model, layers, of_head)
            one.run(batches(rows), seed, tell, len(rows))
            yield from one.result(names)
            of_head = one.of_head
    finally:
        torch.set_num_threads(before)


def _groups(model: Any, memory: int) -> list[range]:
    """Cut the layers into runs whose second moments fit ``memory``, one layer at least in each; the last layers first."""
    layers = _layers(model)
    groups: list[range] = []
    end = len(layers)
    while end:
        start, left = end, memory
        while start:
            need = sum(4 * _columns(one) ** 2 for one in _matrices(layers[start - 1]))
            if start < end and need > left:
                break
            start, left = start - 1, left - need
        groups.append(range(start, end))
        end = start
    return groups


def _layers(model: Any) -> Any:
    """Return the decoder's layers; GPT-2 calls them h."""
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def _matrices(layer: Any) -> list[Any]:
    """Return the matrices of a layer: torch's, and GPT-2's Conv1D, whose weights lie columns first."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return [one for one in layer.modules() if isinstance(one, torch.nn.Linear | Conv1D)]


def _columns(matrix: Any) -> int:
    return matrix.in_features if hasattr(matrix, "in_features") else matrix.weight.shape[0]


def batches(rows: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Put rows of like length together, ``_BATCH`` tokens at most where a row is not longer by itself."""
    batch: list[tuple[list[int], int]] = []
    for row in sorted(rows, key=lambda one: (len(one[0]), one[0])):
        if batch and (len(batch) + 1) * len(row[0]) > _BATCH:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def run_decoder(model: Any, batch: Sequence[tuple[list[int], int]]) -> tuple[Any, Any, Any]:
    """Run a batch of rows through the decoder; return token ids [B, T], where the next token is of an answer [B, T], and what the
    head is given [B, T, C].
    """
    import torch

    ids = torch.zeros((len(batch), max(len(row) for row, _ in batch)), dtype=torch.long)
    mask, wanted = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for at, (row, start) in enumerate(batch):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
        wanted[at, start - 1 : len(row) - 1] = True
    return ids, wanted, model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


class _Pass:
    """One run of the text through the model, forward and back, for the matrices of some layers."""

    def __init__(self, model: Any, layers: range, of_head: tuple[np.ndarray, np.ndarray] | None) -> None:
        import torch

        self.model, self.of_head = model, of_head
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.weights: dict[str, float] = {}
        self.shared: dict[str, tuple[float, float]] = {}
        self.predicted = 0
        every = _layers(model)
        self.named = {module: name for name, module in model.named_modules()}
        self.matrices = [module for at in layers for module in _matrices(every[at])]
        self.first = every[layers.start]  # gradients go no deeper
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.looked_up = torch.zeros(self.embedding.num_embeddings) if layers.start == 0 else None
        self.columns = torch.zeros(self.embedding.embedding_dim)
        # Gemma's embedding multiplies what it looks up, so that an error of the weights counts as many times more.
        self.scale = float(getattr(self.embedding, "embed_scale", 1.0))

    def run(self, every: Iterator[Any], seed: int, tell: Callable[[int, int], None], total: int) -> None:
        import torch

        handles = [module.register_forward_hook(self._watch) for module in self.matrices]
        handles.append(
            self.first.register_forward_pre_hook(_cut)
            if self.looked_up is None
            else self.embedding.register_forward_hook(self._embedded)
        )
        draws = torch.Generator().manual_seed(seed)
        done = 0
        try:
            for batch in every:
                self.tokens, wanted, hidden = run_decoder(self.model, batch)
                hidden.backward(self._head(hidden.detach(), wanted, draws))
                self.predicted += int(wanted.sum())
                done += len(batch)
                tell(done, total)
        finally:
            for handle in handles:
                handle.remove()

    def _embedded(self, module: Any, inputs: Any, output: Any) -> Any:
        out = output.detach().requires_grad_()
        out.register_hook(self._looked_up)
        return out

    def _looked_up(self, gradient: Any) -> None:
        import torch

        assert self.looked_up is not None
        if self.scale != 1:
            gradient = gradient * self.scale
        for ids, one in zip(self.tokens, gradient, strict=True):
            seen, place = ids.unique(return_inverse=True)
            square = torch.zeros(len(seen), one.shape[-1]).index_add_(0, place, one).square_()
            self.looked_up[seen] += square.sum(1)
            self.columns += square.sum(0)

    def _watch(self, module: Any, inputs: Any, output: Any) -> None:
        name, x = self.named[module], inputs[0].detach()
        output.register_hook(lambda gradient: self._add(name, x, gradient))

    def _add(self, name: str, x: Any, gradient: Any) -> None:
        """Add what one batch says of a matrix: inputs [B, T, C], gradients of its outputs [B, T, R]."""
        together = (gradient @ gradient.mT) * (x @ x.mT)  # [B, T, T]
        whole, alone = self.shared.get(name, (0.0, 0.0))
        self.shared[name] = whole + float(together.sum()), alone + float(together.diagonal(dim1=1, dim2=2).sum())
        x, square = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).square()
        self._sum(name, x, square.sum(1), square.sum(0))

    def _sum(self, name: str, x: Any, weight: Any, outputs: Any) -> None:
        moment = (x * weight[:, None]).T @ x
        if name in self.inputs:
            self.inputs[name] += moment
            self.outputs[name] += outputs
        else:
            self.inputs[name], self.outputs[name] = moment, outputs
        self.weights[name] = self.weights.get(name, 0.0) + float(weight.sum())

    def _head(self, hidden: Any, wanted: Any, draws: Any) -> Any:
        """Return the weighed gradient of the drawn tokens' log-probabilities by ``hidden`` [B, T, C]; add the head's moments."""
        import torch

        gradient = torch.zeros_like(hidden)
        places, squares = wanted.nonzero(), self.head.weight.square().sum(1)
        for first in range(0, len(places), _LOGITS):
            rows, columns = places[first : first + _LOGITS].unbind(1)
            x = hidden[rows, columns]
            p = self.head(x).softmax(-1)
            if self.of_head is None:
                spread = p * (1 - p)
                self._sum("head", x, spread.sum(1), spread.sum(0))
            # d log p(y) / d x = W_y - mean, and its squared norm for every y
            weights, mean = self.head.weight, p @ self.head.weight
            norms = squares - 2 * mean @ weights.T + mean.square().sum(1, keepdim=True)
            odds = p * norms.clamp_min(0)
            total = odds.sum(1, keepdim=True)
            drawn = torch.multinomial(odds.clamp_min(1e-30), 1, generator=draws)
            signs = 2 * torch.randint(2, drawn.shape, generator=draws) - 1
            weight = signs * (total / norms.gather(1, drawn).clamp_min(1e-30)).sqrt()  # sqrt(p / q)
            gradient[rows, columns] = weight * (weights[drawn[:, 0]] - mean)
        return gradient

    def result(self, names: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]) -> Iterator[tuple[str, Moments]]:
        """Yield what was found, under the GGUF's names and in the order of its rows."""
        import numpy as np

        def ready(name: str) -> tuple[np.ndarray, np.ndarray]:
            whole = self.inputs.pop(name) / max(self.weights[name], 1e-30)
            together, alone = self.shared.get(name, (1.0, 1.0))
            share = together / alone if alone else 1.0
            found = whole.numpy(), (self.outputs.pop(name) * (share / self.predicted)).numpy()
            if not all(np.isfinite(one).all() for one in found):
                raise StepFailed(f"the gradient at {name} is not finite: the model is broken")
            return found

        for module in self.matrices:
            hf = f"{self.named[module]}.weight"
            name, order = names[hf]
            inputs, outputs = ready(self.named[module])
            yield name, Moments(inputs, np.ascontiguousarray(order(outputs)))
        tied = self.head.weight is self.embedding.weight
        if self.of_head is None:
            self.of_head = ready("head")
            if not tied:
                yield names[f"{self.named[self.head]}.weight"][0], Moments(*self.of_head)
        if self.looked_up is not None:
            whole = max(float(self.columns.sum()), 1e-30)
            looked_up, columns = (self.looked_up / self.predicted).numpy(), (self.columns / whole).numpy()
            own = self.of_head if tied else (None, None)
            yield names[f"{self.named[self.embedding]}.weight"][0], Moments(*own, looked_up, columns)


class _OwnNames(dict[str, tuple[str, Callable[["np.ndarray"], "np.ndarray"]]]):
    """Leaves every tensor its name and its rows their order."""

    def __missing__(self, name: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
        return name, lambda values: values


def _cut(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let gradients end at a layer's input."""
    return (inputs[0].detach().requires_grad_(), *inputs[1:])
