"""What the benches of quantization share: calibration text, KLD from the full-precision file, the interval of a ratio, and a model
whose weights lie on no grid.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.evals.likelihood import kl_divergence, token_rows
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.read import read_info, read_tensor


def calibration(runner: Any, rows: Sequence[Row]) -> tuple[list[list[int]], list[int]]:
    """Encode prompts with their references, as the calibrate step does; return token rows and where the answers start."""
    prompts = [runner.encode(row) for row in rows]
    texts = [
        [*ids, *runner.encode_text(row.reference or ""), runner.end_token()]
        for ids, row in zip(prompts, rows, strict=True)
    ]
    return texts, [len(ids) for ids in prompts]


def divergences(path: Path, reference: Path, rows: Sequence[Row]) -> np.ndarray:
    """Return the mean KLD of every row, nats a token."""
    return Reference(reference, {"": list(rows)}).divergences(path)[""]


class Reference:
    """A full-precision file's distributions over the answers of some sets of rows: run once, in memory."""

    def __init__(self, path: Path, sets: dict[str, list[Row]], runner: Callable[[Path], Any] = GgufRunner) -> None:
        with runner(path) as whole:
            tokens = {name: token_rows(whole, rows) for name, rows in sets.items()}
            self.places = {
                name: ([one.ids for one in of], [one.positions for one in of]) for name, of in tokens.items()
            }
            self.own = {name: list(whole.logprobs(*places)) for name, places in self.places.items()}

    def divergences(self, path: Path, runner: Callable[[Path], Any] = GgufRunner) -> dict[str, np.ndarray]:
        """Return the mean KLD of every row of each set, nats a token."""
        with runner(path) as candidate:
            return {
                name: np.array([
                    kl_divergence(own, other)[0].mean()
                    for own, other in zip(self.own[name], candidate.logprobs(*places), strict=True)
                ])
                for name, places in self.places.items()
            }  # fmt: skip


def ratio(ours: np.ndarray, peer: np.ndarray) -> tuple[float, float, float]:
    """Return ours over peer, means over the rows, with the 95 % interval of a bootstrap over the rows.

    Both are [rows], or [seeds, rows]: the rows are the same for all seeds, and drawn once.
    """
    rng = np.random.default_rng(0)
    rows = ours.shape[-1]
    picks = rng.integers(0, rows, (2000, rows))
    own, other = (one.reshape(-1, rows).mean(0)[picks].mean(1) for one in (ours, peer))
    low, high = np.quantile(own / other, [0.025, 0.975])
    return float(ours.mean() / peer.mean()), float(low), float(high)


def dither(source: Path, out: Path, seed: int) -> None:
    """Copy an f16 GGUF whose weights came from 4-bit blocks, each moved within its cell.

    Weights that came from Q4_1 are lossless in Q4_1 and flatter every 4-bit type; a step is a 15th of a block's range.
    """
    shutil.copyfile(source, out)
    info, rng = read_info(source), np.random.default_rng(seed)
    with out.open("r+b") as file:
        for tensor in info.tensors:
            if tensor.type != "F16" or tensor.shape[-1] % 32:
                continue
            weights = read_tensor(info, tensor.name).reshape(-1, 32)
            step = (weights.max(1, keepdims=True) - weights.min(1, keepdims=True)) / 15
            weights += step * rng.uniform(-0.5, 0.5, weights.shape).astype(np.float32)
            file.seek(tensor.offset)
            file.write(weights.astype(np.float16).tobytes())
