"""Take the blocks of a llama-family GGUF out as transformers orders their rows, and put others in: same types, same places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.blocks import FORMATS, BlockFormat
from edgedistill.formats.gguf.convert import permute
from edgedistill.formats.gguf.dequantize import hf_tensor_name, unpermute
from edgedistill.formats.gguf.read import GgufInfo, TensorInfo, read_info

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Matrix:
    """A quantized matrix [R, C] by its ``name`` in transformers: blocks uint8 [R, C / size, bytes], rows in its order."""

    name: str
    type: str
    blocks: np.ndarray

    @property
    def form(self) -> BlockFormat:
        """Return the layout of its blocks."""
        return FORMATS[self.type]


def read_matrices(path: Path, *, coarse: bool = False) -> Iterator[Matrix]:
    """Read the matrices of a file whose types ``blocks.FORMATS`` knows, one after the other; with ``coarse``, those of 8 bits
    only where there are no others. Raises UsageError as ``read_info``.
    """
    import numpy as np

    info = read_info(path)
    places = _places(info)
    fine = {name for name, tensor in places.items() if tensor.type == "Q8_0"}
    left_out = fine if coarse and len(fine) < len(places) else set()
    for name, tensor in places.items():
        if name in left_out:
            continue
        raw = np.fromfile(info.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        blocks = raw.reshape(tensor.shape[0], -1, FORMATS[tensor.type].bytes)
        heads = _heads(info, tensor.name)
        yield Matrix(name, tensor.type, np.ascontiguousarray(unpermute(blocks, heads)) if heads else blocks)


def replace_codes(path: Path, matrices: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """Write codes uint8 [R, C] and bases float16 [R, C / size, halves] into the blocks of the file, by the matrices' names in
    transformers and with rows in its order; return how many matrices there are.

    Raises StepFailed, with nothing written, where a name or a shape does not fit.
    """
    import numpy as np

    info = read_info(path)
    places = _places(info)
    for name, (codes, _) in matrices.items():
        tensor = places.get(name)
        if tensor is None or tensor.shape != codes.shape:
            found = "none" if tensor is None else f"{tensor.type} {tensor.shape}"
            raise StepFailed(f"{path}: no place for the codes of {name}, {codes.shape}: the file has {found}")
    with open(path, "r+b") as file:
        for matrix in read_matrices(path):
            if matrix.name not in matrices:
                continue
            (codes, bases), form, tensor = matrices[matrix.name], matrix.form, places[matrix.name]
            blocks = form.with_codes(matrix.blocks, codes.reshape(*matrix.blocks.shape[:2], form.size))
            blocks, heads = form.with_bases(blocks, bases), _heads(info, tensor.name)
            file.seek(tensor.offset)
            file.write(np.ascontiguousarray(permute(blocks, heads) if heads else blocks).tobytes())
    return len(matrices)


def _places(info: GgufInfo) -> dict[str, TensorInfo]:
    """Return where the matrices lie that can be taken apart, by their names in transformers."""
    found = {}
    for tensor in info.tensors:
        if tensor.type in FORMATS and len(tensor.shape) == 2 and (name := hf_tensor_name(tensor.name)):
            found[name] = tensor
    return found


def _heads(info: GgufInfo, name: str) -> int:
    """Return how many heads the rows of q and k are reordered in, 0 for other matrices."""
    heads = int(info.of_arch("attention.head_count", 0))
    if ".attn_q." in name:
        return heads
    return int(info.of_arch("attention.head_count_kv", heads)) if ".attn_k." in name else 0
