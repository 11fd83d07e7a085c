"""Collect an importance matrix: mean squared input of every weight matrix over calibration text, in llama.cpp's format.

The stock tool reads raw text in chunks; here the caller passes token rows. The file is the one that ``llama-imatrix``
writes (GGUF, tensors NAME.in_sum2 and NAME.counts) and that ``llama-quantize --imatrix`` reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.activations import CHUNK, Progress, watch_inputs
from edgedistill.formats.gguf.read import read_info, read_tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class ImatrixReport:
    """What was collected: ``tensors`` of ``matrices`` weight matrices inside the layers, over ``tokens`` in
    ``rows``.
    """

    path: Path
    tensors: int
    matrices: int
    rows: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def collect(
    gguf: Path | str, token_rows: Sequence[Sequence[int]], out: Path | str, *, threads: int | None = None,
    dataset: str = "calibration", progress: Progress | None = None,
) -> ImatrixReport:  # fmt: skip
    """Run ``token_rows`` (each a text of its own, in token ids) through the model and save its importance matrix to
    ``out``.

    ``gguf`` should be the f16, bf16 or f32 file that will be quantized. Raises as ``watch_inputs``, and StepFailed when
    the activations are not finite.
    """
    import numpy as np

    started = time.monotonic()
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def take(name: str, _input: str, inputs: np.ndarray) -> None:
        total = np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(inputs)

    out = Path(out)
    info = read_info(gguf)
    seen = watch_inputs(gguf, token_rows, take, threads=threads, progress=progress)
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise StepFailed(
                f"the input of {name} is not finite: the model is broken", "compare the f16 file with the checkpoint"
            )
    save(out, {name: (values, counts[name]) for name, values in sums.items()}, seen.tokens, dataset)
    matrices = sum(1 for tensor in info.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1)
    return ImatrixReport(
        path=out, tensors=len(sums), matrices=matrices, rows=seen.rows, tokens=seen.tokens,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def save(out: Path, sums: dict[str, tuple[np.ndarray, int]], tokens: int, dataset: str) -> None:
    """Write {tensor: (sum of squares per column, tokens seen)} in llama.cpp's imatrix format, whole or not at all."""
    import gguf
    import numpy as np

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "imatrix")
    try:
        writer.kv_data[0].pop("general.architecture")  # llama.cpp's own file has none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", -(-tokens // CHUNK))
        writer.add_uint32("imatrix.chunk_size", CHUNK)
        for name in sorted(sums):
            values, count = sums[name]
            writer.add_tensor(f"{name}.in_sum2", np.asarray(values, dtype=np.float32).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror or error}", "free some disk space") from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def load(path: Path | str) -> dict[str, np.ndarray]:
    """Read an importance matrix: {tensor name: mean squared input per column, float32}, as llama-quantize normalizes
    it.

    Raises UsageError for a damaged file, one that is no imatrix, and the old .dat format.
    """
    import numpy as np

    info = read_info(path)
    names = [tensor.name.removesuffix(".in_sum2") for tensor in info.tensors if tensor.name.endswith(".in_sum2")]
    known = {tensor.name for tensor in info.tensors}
    if info.metadata.get("general.type") != "imatrix" or not names:
        raise UsageError(f"{path}: not an importance matrix (general.type is {info.metadata.get('general.type')!r})")
    means: dict[str, np.ndarray] = {}
    for name in names:
        if f"{name}.counts" not in known:
            raise UsageError(f"{path}: {name} has sums but no counts", "collect the importance matrix again")
        sums, counts = read_tensor(info, f"{name}.in_sum2"), read_tensor(info, f"{name}.counts").reshape(-1, 1)
        sums = sums.reshape(counts.shape[0], -1)
        # An expert that no token reached counts as 1, as in llama-quantize.
        means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0).astype(np.float32).reshape(-1)
    return means
