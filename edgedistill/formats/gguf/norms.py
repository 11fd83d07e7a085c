"""Put other norms into a GGUF, in place: they are float32 there in every type of file, so nothing else moves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.dequantize import hf_tensor_name
from edgedistill.formats.gguf.read import read_info

if TYPE_CHECKING:
    import numpy as np


def replace_norms(path: Path, norms: Mapping[str, np.ndarray]) -> int:
    """Write ``norms``, gains by their names in transformers, over those of a llama-family file; return how many there are.

    Raises StepFailed, with nothing written, where a name, shape or type does not fit.
    """
    import numpy as np

    places = {hf_tensor_name(tensor.name): tensor for tensor in read_info(path).tensors if tensor.type == "F32"}
    for name, value in norms.items():
        tensor = places.get(name)
        if tensor is None or tensor.shape != tuple(value.shape):
            found = "none" if tensor is None else str(tensor.shape)
            raise StepFailed(f"{path}: no place for {name} of shape {tuple(value.shape)}: the file has {found}")
    with open(path, "r+b") as file:
        for name, value in norms.items():
            file.seek(places[name].offset)
            file.write(np.ascontiguousarray(value, dtype="<f4").tobytes())
    return len(norms)
