"""What errors of a matrix cost, by a real forward pass, against what its moments predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from edgedistill.formats.gguf.moments import Moments

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(3, 300, length).tolist() for length in RNG.integers(12, 40, 60)]
STARTS = [len(row) // 2 for row in ROWS]


def distributions(model: torch.nn.Module) -> torch.Tensor:
    """Return the log-probabilities at the places that count: [places, vocabulary]. All rows at once, filled up at their ends."""
    longest = max(map(len, ROWS))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        logits = model(input_ids=rows, attention_mask=mask).logits
    places = [logits[at, start - 1 : len(row) - 1] for at, (row, start) in enumerate(zip(ROWS, STARTS, strict=True))]
    return torch.cat(places).log_softmax(-1)


def cost_ratios(
    model: torch.nn.Module,
    where: Mapping[str, tuple[str, Callable[[Any], Any]]],
    found: Mapping[str, Moments],
    matrices: list[str],
    *,
    turned: Callable[[str], bool] = lambda name: False,
    seed: int,
) -> dict[str, float]:
    """Return predicted / measured KLD of three random errors in each of the ``matrices``, which ``where`` places in the GGUF;
    ``turned`` says which of them the checkpoint holds the other way round.
    """
    whole, weights, rng, ratios = distributions(model), dict(model.named_parameters()), np.random.default_rng(seed), {}
    for hf in matrices:
        name, order = where[hf]
        value, seen = weights[hf], []
        for _ in range(3):
            error = (rng.standard_normal(value.shape) * 0.01 * float(value.detach().std())).astype(np.float32)
            kept = value.data.clone()
            value.data += torch.from_numpy(error)
            other = distributions(model)
            value.data = kept
            kld = float((whole.exp() * (whole - other)).sum(-1).mean())
            seen.append(found[name].cost(np.ascontiguousarray(order(error.T if turned(hf) else error))) / kld)
        ratios[name] = float(np.mean(seen))
    return ratios
