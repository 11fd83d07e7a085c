"""Try a type on all matrices at once: errors that go one way do together what no matrix's own cost says.

``Moments.cost`` takes the errors of rows and matrices for independent. Mostly they are. But weights that were taught after they
came out of a quantized file lie near the grid of that file's type, and rounding to this type puts them back there: its errors are
small, and they are what was taught, backwards, in every matrix.

So each type's costs are multiplied by what it does to the whole model over what was predicted of it. Errors too large for a second
order are scaled down first: a file that is worth shipping has matrices of such a type here and there, and not throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.cpus import usable_cpus
from edgedistill.formats.gguf.moments import batches, run_decoder

if TYPE_CHECKING:
    import numpy as np
    import torch

Errors = Callable[[], Iterable[tuple[str, "np.ndarray"]]]
"""Gives (name of the checkpoint's tensor, error of its weights [R, C]) for every matrix, in the checkpoint's order of rows."""
Progress = Callable[[int, int, str], None]

TOKENS = 2048  # of text that every type is tried on
LOGITS = 2**26  # of the reference that are in memory: 256 MiB
SMALL = 1e-3  # nats a token: what is predicted to be more is scaled down to this
_LEAST = 1e-6  # nats a token: under this float32 tells nothing


@dataclass(frozen=True, kw_only=True)
class Tried:
    """KLD that was ``predicted`` of a type in every matrix, KLD that was ``measured``, both nats a token over ``tokens`` predicted
    tokens, errors scaled by ``scale`` for it and the figure scaled back by its square.
    """

    predicted: float
    measured: float
    scale: float
    tokens: int

    @property
    def factor(self) -> float:
        """What costs of this type are to be multiplied by."""
        return self.measured / self.predicted if min(self.predicted, self.measured) > _LEAST else 1.0


def try_types(
    checkpoint: Path,
    rows: Sequence[tuple[Sequence[int], int]],
    types: Mapping[str, tuple[float, Errors]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tried]:
    """Return what each of ``types`` (name: KLD predicted, errors) does to the model in ``checkpoint`` on ``rows`` (token ids, where
    the answer starts; an answer each).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cpus())
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
        rows = _few(rows, model.config.vocab_size)
        parameters = dict(model.named_parameters())
        turned = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
        }  # GPT-2's: [C, R]
        whole = _answers(model, rows)
        found: dict[str, Tried] = {}
        for at, (name, (predicted, errors)) in enumerate(types.items()):
            if progress:
                progress(at, len(types), f"{name} in every matrix")
            scale = min(1.0, (SMALL / predicted) ** 0.5) if predicted > 0 else 1.0
            kept: dict[str, torch.Tensor] = {}
            for tensor, error in errors():
                weight = parameters[tensor]
                kept[tensor] = weight.clone()
                weight += scale * torch.from_numpy(error.T if tensor in turned else error)
            measured = _divergence(whole, _answers(model, rows)) / scale**2
            for tensor, weight in kept.items():
                parameters[tensor].copy_(weight)
            found[name] = Tried(predicted=predicted, measured=measured, scale=scale, tokens=len(whole))
        return found
    finally:
        torch.set_num_threads(before)


def _few(rows: Sequence[tuple[Sequence[int], int]], vocabulary: int) -> list[tuple[list[int], int]]:
    """Return rows, spread evenly, that are few enough for ``LOGITS``; one at least."""
    most, wanted = max(1, LOGITS // vocabulary), sum(len(row) - start for row, start in rows)
    some = [(list(row), start) for row, start in rows[:: max(1, -(-wanted // most))]]
    while len(some) > 1 and sum(len(row) - start for row, start in some) > most:
        some.pop()
    return some


def _answers(model: Any, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Return the log-probabilities of every token of the answers [tokens, vocabulary]."""
    import torch

    found = []
    with torch.no_grad():
        for batch in batches(rows):
            _, wanted, hidden = run_decoder(model, batch)
            found.append(model.get_output_embeddings()(hidden[wanted]).log_softmax(-1))
    return torch.cat(found)


def _divergence(whole: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL divergence of the second from the first, nats a token."""
    import torch

    return float((whole.exp() * (whole - other)).sum(-1, dtype=torch.float64).mean())
