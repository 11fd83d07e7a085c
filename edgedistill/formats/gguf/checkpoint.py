"""Read a Hugging Face model folder: its config, and its safetensors one tensor at a time without torch.

Only the header of each file is parsed; a tensor is read when asked for, so a model larger than the memory converts.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.families import plain_config
from edgedistill.model_facts import read_json

if TYPE_CHECKING:
    import numpy as np

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: file, dtype in safetensors' words, shape, byte offset and length."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json under Llama's names (``plain_config``); refuse what is no text generator in full precision.

    Raises UsageError in plain words.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such model folder", "check the path")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"{folder}: a LoRA adapter, not a model", "merge it into its base model first")
        raise UsageError(f"{folder}: no config.json in this folder", "point to a Hugging Face model folder")
    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    name = str(names[0]) if names else str(config.get("model_type", "unnamed"))
    if config.get("is_encoder_decoder"):
        raise UsageError(
            f"{folder}: {name} is an encoder-decoder model; only decoder models (…ForCausalLM) can be built"
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UsageError(
            f"{folder}: {name} is an encoder or another kind of model that writes no text; only decoder models "
            "(…ForCausalLM) can be built",
            "choose a text generation model",
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UsageError(f"{folder}: the weights are already quantized ({method})", "use the full-precision checkpoint")
    return plain_config(config)


def require_keys(config: dict[str, Any], path: Path) -> None:
    """Require that ``config`` has the numbers that describe a decoder. Raises UsageError naming the key."""
    for key in (*_KEYS, "layer_norm_epsilon" if config.get("model_type") == "gpt2" else "rms_norm_eps"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UsageError(f"{path}: {key} is {config.get(key)!r}; a positive number was expected")


def open_checkpoint(folder: Path) -> dict[str, Entry]:
    """Index all tensors of the folder's safetensors files by name.

    Raises UsageError for pickle-only checkpoints, missing shards, and files that are damaged or cut short.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UsageError(f"{index}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:3])}")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise UsageError(
                f"{folder}: only pickle files ({pickles[0]}): safetensors only, since loading a pickle runs what it "
                "holds",
                "if you trust it: python -c \"from transformers import AutoModelForCausalLM as M; "
                f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
            )  # fmt: skip
        raise UsageError(f"{folder}: no *.safetensors files in this folder", "download the model again")
    entries: dict[str, Entry] = {}
    for path in files:
        entries |= _index(path)
    return entries


def _index(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UsageError(
                f"{path}: not a safetensors file, or cut short inside its header", "download the model again"
            )
        try:
            header = json.loads(file.read(length))
            entries = {
                name: Entry(
                    file=path, dtype=str(item["dtype"]), shape=tuple(int(extent) for extent in item["shape"]),
                    offset=8 + length + int(item["data_offsets"][0]),
                    nbytes=int(item["data_offsets"][1]) - int(item["data_offsets"][0]),
                )
                for name, item in header.items() if name != "__metadata__"
            }  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(f"{path}: damaged safetensors header: {error}", "download the model again") from None
    for name, entry in entries.items():
        width = _WIDTHS.get(entry.dtype)
        wrong = width is not None and math.prod(entry.shape) * width != entry.nbytes
        if wrong or entry.nbytes < 0 or entry.offset < 8 + length or min(entry.shape, default=0) < 0:
            raise UsageError(
                f"{path}: damaged safetensors header: {name} has impossible offsets", "download the model again"
            )
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
    if end > size:
        raise UsageError(f"{path}: safetensors cut short: {end - size} bytes are missing", "download the model again")
    return entries


def read_entry(entry: Entry) -> np.ndarray:
    """Read one tensor; bfloat16 comes back as float32 (numpy has none), other float types as they are.

    Raises UsageError for integer and 8-bit float types.
    """
    import numpy as np

    if entry.dtype not in _DTYPES:
        raise UsageError(
            f"{entry.file}: a tensor of type {entry.dtype}; only F32, F16, BF16 and F64 weights can be converted"
        )
    width = np.dtype(_DTYPES[entry.dtype]).itemsize
    raw = np.fromfile(entry.file, dtype=_DTYPES[entry.dtype], count=entry.nbytes // width, offset=entry.offset)
    if entry.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.reshape(entry.shape)
