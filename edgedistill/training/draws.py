"""From logits to sparse targets: the draws of RS-KD, top-K, log-normalisers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgedistill.training.data import counter_rng
from edgedistill.training.objectives import TEMPERATURES
from edgedistill.training.targets import Kind, SparseTargets


def uniforms(seed: int, row_id: str, positions: int, n: int) -> np.ndarray:
    """Return the numbers in [0, 1) that decide a row's draws, from (seed, row) alone: float32 [positions, n]."""
    return counter_rng("targets", seed, row_id).random((positions, n), dtype=np.float32)


def stored_temperatures(temperature: float) -> tuple[float, ...]:
    """Return the temperatures whose normalisers are stored: the usual ones and the one asked for."""
    if any(abs(temperature - one) < 1e-6 for one in (1.0, *TEMPERATURES)):
        return TEMPERATURES
    return (*TEMPERATURES, temperature)


def log_normalisers(p: torch.Tensor, z: torch.Tensor, lse: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
    """Return A(t) = log sum p^(1/t) for each temperature: [positions, temperatures].

    p = softmax(z) [positions, V] and lse [positions, 1], float32.
    """
    half = p.sqrt()
    quarter: torch.Tensor | None = None
    sums = []
    for t in temperatures:
        beta = 1.0 / t
        if abs(beta - 2.0) < 1e-9:
            total = torch.linalg.vecdot(p, p)
        elif abs(beta - 1.5) < 1e-9:
            total = torch.linalg.vecdot(p, half)
        elif abs(beta - 0.5) < 1e-9:
            total = half.sum(-1)
        elif abs(beta - 0.75) < 1e-9 or abs(beta - 0.25) < 1e-9:
            quarter = half.sqrt() if quarter is None else quarter
            total = torch.linalg.vecdot(half, quarter) if beta > 0.5 else quarter.sum(-1)
        else:
            sums.append(torch.logsumexp((z - lse) / t, -1))
            continue
        sums.append(total.log())
    return torch.stack(sums, -1)


BLOCK = 128


def invert(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution at ``uniform`` [rows, n] in [0, 1): ids [rows, n]. p [rows, V] need not add up
    to 1.

    In two levels, over sums of blocks and then inside one block a draw: a running sum over a whole vocabulary costs
    more than all the rest of a draw.
    """
    rows, size = p.shape
    blocks = torch.nn.functional.pad(p, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    edges = blocks.sum(-1).cumsum(-1)
    # Scaled by the sum as computed, and kept below it: every draw falls inside the vocabulary, on an id with p > 0.
    point = torch.minimum(uniform * edges[:, -1:], torch.nextafter(edges[:, -1:], torch.zeros_like(edges[:, -1:])))
    block = torch.searchsorted(edges, point, right=True).clamp_(max=edges.shape[1] - 1)
    before = edges.gather(1, (block - 1).clamp_min(0)).mul_(block > 0)
    inside = blocks[torch.arange(rows, device=p.device)[:, None], block].cumsum(-1)
    offset = torch.searchsorted(inside, (point - before)[..., None], right=True)[..., 0]
    # Rounding can put the point past the block's last id that has any probability: that id is meant.
    last = (inside < inside[..., -1:]).sum(-1)
    return block * BLOCK + torch.minimum(offset, last)


def sparse_from_logits(
    logits: torch.Tensor,
    *,
    kind: Kind,
    n: int,
    temperature: float,
    uniform: torch.Tensor | None = None,
) -> SparseTargets:
    """Keep n draws (decided by ``uniform`` [positions, n]) of each row of ``logits`` [positions, V], its top n, or both: the
    best two thirds of n, and a third in draws from the rest.
    """
    z = logits.float()
    p = torch.softmax(z, -1)
    lse = (z.amax(-1) - p.amax(-1).log())[:, None]
    temperatures = stored_temperatures(temperature)
    normalisers = log_normalisers(p, z, lse, temperatures).cpu().numpy()
    positions = z.shape[0]
    if kind == "top-k":
        values, ids = z.topk(n, -1)
        values -= lse
        return SparseTargets(
            kind=kind,
            n=n,
            temperature=temperature,
            temperatures=temperatures,
            offsets=np.arange(positions + 1, dtype=np.int64) * n,
            ids=ids.to(torch.int32).cpu().numpy().ravel(),
            counts=np.zeros(0, np.float32),
            logp=values.cpu().numpy().ravel(),
            normalisers=normalisers,
        )
    assert uniform is not None
    if abs(temperature - 1.0) > 1e-9:
        p = torch.softmax(z / temperature, -1)
    uniform = uniform.to(p.device)
    if kind == "top-sampled":
        return _top_and_draws(p, z - lse, normalisers, n, temperature, uniform)
    drawn = invert(p, uniform)
    drawn = drawn.sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    start = first.reshape(-1).nonzero()[:, 0].cpu().numpy()
    counts = np.diff(np.append(start, drawn.numel())).astype(np.float32)
    offsets = np.zeros(positions + 1, dtype=np.int64)
    np.cumsum(first.sum(-1).cpu().numpy(), out=offsets[1:])
    return SparseTargets(
        kind=kind,
        n=n,
        temperature=temperature,
        temperatures=temperatures,
        offsets=offsets,
        ids=drawn[first].to(torch.int32).cpu().numpy(),
        counts=counts,
        logp=(z.gather(1, drawn) - lse)[first].cpu().numpy(),
        normalisers=normalisers,
    )


def exact_ids(n: int) -> int:
    """Return how many of n ids of ``top-sampled`` are the best ones."""
    return n * 2 // 3


def _top_and_draws(
    p: torch.Tensor,
    logp: torch.Tensor,
    normalisers: np.ndarray,
    n: int,
    temperature: float,
    uniform: torch.Tensor,
) -> SparseTargets:
    """Keep the best ids of ``p`` [positions, V] and draws from the rest; ``logp`` are the logs at T = 1."""
    positions, exact = p.shape[0], exact_ids(n)
    best = p.topk(exact, -1).indices
    rest = p.scatter(1, best, 0.0)
    drawn = invert(rest, uniform[:, exact:n]).sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    # Where the best ids hold all that float32 can tell, there is nothing to draw from.
    first &= (rest.sum(-1, keepdim=True) > 1e-7) & (rest.gather(1, drawn) > 0)
    times = (drawn[:, :, None] == drawn[:, None, :]).sum(-1)
    ids = torch.cat([best, drawn], 1)
    kept = torch.cat([torch.ones_like(best, dtype=torch.bool), first], 1)
    counts = torch.cat([torch.zeros_like(best), times], 1)
    offsets = np.zeros(positions + 1, dtype=np.int64)
    np.cumsum(kept.sum(-1).cpu().numpy(), out=offsets[1:])
    return SparseTargets(
        kind="top-sampled",
        n=n,
        temperature=temperature,
        temperatures=stored_temperatures(temperature),
        offsets=offsets,
        ids=ids[kept].to(torch.int32).cpu().numpy(),
        counts=counts[kept].float().cpu().numpy(),
        logp=logp.gather(1, ids)[kept].cpu().numpy(),
        normalisers=normalisers,
    )


def slice_targets(targets: SparseTargets, start: int, end: int) -> SparseTargets:
    """Cut the positions [start, end) out."""
    from dataclasses import replace

    low, high = targets.offsets[start], targets.offsets[end]
    return replace(
        targets,
        offsets=targets.offsets[start : end + 1] - low,
        ids=targets.ids[low:high],
        counts=targets.counts[low:high] if len(targets.counts) else targets.counts,
        logp=targets.logp[low:high],
        normalisers=targets.normalisers[start:end],
    )


def join_targets(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Put the positions of several parts one after the other."""
    from dataclasses import replace

    if len(parts) == 1:
        return parts[0]
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return replace(
        parts[0],
        offsets=offsets,
        ids=np.concatenate([part.ids for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        logp=np.concatenate([part.logp for part in parts]),
        normalisers=np.concatenate([part.normalisers for part in parts]),
    )
