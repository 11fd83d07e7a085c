"""Read what a GGUF file says about itself, and refuse a damaged one with a clear word.

The header is parsed here, not by ``gguf.GGUFReader``: that one memory-maps first and fails in many odd ways on a
damaged file (ValueError from a reshape, IndexError, a Unicode error), and it takes seconds on a vocabulary of 150,000
entries. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.types import FILE_TYPES, GGML_TYPES, GGML_TYPES_BY_ID

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_SOURCE_HINT = "download or build the file again; compare its size and digest with the source's"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: shape in rows-first order (as numpy and transformers have it), offset from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, kw_only=True)
class GgufInfo:
    """What a GGUF holds. ``metadata`` has every key, token lists included; ``to_json`` leaves the long lists out."""

    path: Path
    size: int
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """Name of the model family in llama.cpp's words, such as ``llama`` or ``qwen2``."""
        return str(self.metadata.get("general.architecture", ""))

    def of_arch(self, key: str, default: Any = None) -> Any:
        """Look up ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def _count(self, key: str) -> int:
        value = self.of_arch(key, 0)
        return value if isinstance(value, int) else 0

    @property
    def n_layers(self) -> int:
        return self._count("block_count")

    @property
    def hidden(self) -> int:
        return self._count("embedding_length")

    @property
    def context_length(self) -> int:
        return self._count("context_length")

    @property
    def vocab(self) -> int:
        """Number of tokens: from the list of tokens, else from the embedding's rows."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and tokens:
            return len(tokens)
        return next((t.shape[0] for t in self.tensors if t.name == "token_embd.weight"), 0)

    @property
    def file_type(self) -> str:
        """llama.cpp's name of the whole file's type, such as ``Q4_K_M``; empty when the file does not say."""
        number = self.metadata.get("general.file_type")
        return next((name for name, kind in FILE_TYPES.items() if kind.number == number), "")

    def special_token(self, name: str) -> str:
        """Return the text of a special token ("bos", "eos"), "" where the file names none."""
        tokens, number = (
            self.metadata.get("tokenizer.ggml.tokens", []),
            self.metadata.get(f"tokenizer.ggml.{name}_token_id"),
        )
        return str(tokens[number]) if number is not None and number < len(tokens) else ""

    @property
    def chat_template(self) -> str:
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def tokenizer_model(self) -> str:
        return str(self.metadata.get("tokenizer.ggml.model", ""))

    @property
    def tokenizer_pre(self) -> str:
        return str(self.metadata.get("tokenizer.ggml.pre", ""))

    @property
    def name(self) -> str:
        return str(self.metadata.get("general.name", ""))

    @property
    def license(self) -> str:
        return str(self.metadata.get("general.license", ""))

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors (metadata not counted, as llama.cpp prints it)."""
        return 8 * self.tensor_bytes / self.parameters if self.tensors else 0.0

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is stored in a block type, so that its weights are no longer those of the checkpoint."""
        return any(GGML_TYPES[tensor.type].block > 1 for tensor in self.tensors)

    def types(self) -> dict[str, dict[str, int]]:
        """Count tensors and bytes per type, largest first."""
        table: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            row = table.setdefault(tensor.type, {"tensors": 0, "bytes": 0})
            row["tensors"] += 1
            row["bytes"] += tensor.nbytes
        return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for manifests: lists longer than 32 entries become their length."""
        short = {
            key: f"[{len(value)} entries]" if isinstance(value, list) and len(value) > 32 else value
            for key, value in self.metadata.items()
        }
        return {
            "architecture": self.architecture, "name": self.name, "license": self.license, "size": self.size,
            "file_type": self.file_type, "bpw": round(self.bpw, 4), "parameters": self.parameters,
            "is_quantized": self.is_quantized, "n_layers": self.n_layers, "hidden": self.hidden, "vocab": self.vocab,
            "context_length": self.context_length, "types": self.types(), "metadata": short,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }  # fmt: skip


class _Cut(Exception):
    """The header ends in the middle: ``missing`` is the least number of bytes that are not there."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


class _Header:
    """Sequential reader of a GGUF header; every read is checked against the size of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), len(MAGIC)

    def skip(self, count: int) -> int:
        """Step over ``count`` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            raise _Cut(count - (self.size - start))
        self.at = start + count
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """Read a list of strings: the tokens of a vocabulary, so the loop is kept short."""
        data, at, size, unpack = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        if 8 * count > size - at:
            raise _Cut(8 * count - (size - at))
        found = []
        for _ in range(count):
            if at + 8 > size:
                raise _Cut(at + 8 - size)
            end = at + 8 + unpack(data, at)[0]
            if end > size:
                raise _Cut(end - size)
            found.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"unknown value type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            return self.strings(count)
        if item in _SCALARS:
            code = _SCALARS[item]
            start = self.skip(count * struct.calcsize("<" + code))
            return list(struct.unpack_from(f"<{count}{code}", self.data, start))
        return [self.value(item, depth + 1) for _ in range(count)]


def read_info(path: Path | str) -> GgufInfo:
    """Read the header of the GGUF at ``path`` and check that all its tensors are there (0.1 s, data not read).

    Raises UsageError when the file is missing, is no GGUF, has a damaged header, uses an unknown tensor type, is cut
    short ("GGUF cut short: N bytes are missing"), or is one of the parts that a model was split into.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such GGUF file", "check the path")
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            if size < 4 and MAGIC.startswith(magic):
                raise UsageError(f"{path}: GGUF cut short: the file has only {size} bytes", _SOURCE_HINT)
            raise UsageError(
                f"{path}: not a GGUF file (it starts with {magic!r})", "pass a .gguf file, or a model folder"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, size, _Header(data))
            except _Cut as cut:
                raise UsageError(
                    f"{path}: GGUF cut short: at least {cut.missing} bytes are missing (it ends inside its header)",
                    _SOURCE_HINT,
                ) from None
            except (ValueError, struct.error, OverflowError, MemoryError) as error:
                raise UsageError(f"{path}: damaged GGUF header: {error}", _SOURCE_HINT) from None


def _parse(path: Path, size: int, header: _Header) -> GgufInfo:
    version = header.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3 (a big-endian file is not supported)")
    n_tensors, n_values = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = header.string()
        metadata[key] = header.value(header.number("I"))
    _refuse_part(path, metadata)
    entries: list[tuple[str, tuple[int, ...], str, int]] = []
    for _ in range(n_tensors):
        name, dims = header.string(), header.number("I")
        if dims > _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(reversed([header.number("Q") for _ in range(dims)]))
        kind, offset = header.number("I"), header.number("Q")
        if kind not in GGML_TYPES_BY_ID:
            raise ValueError(f"tensor {name!r} has the unknown type {kind}: a newer llama.cpp wrote it")
        entries.append((name, shape, GGML_TYPES_BY_ID[kind], offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-header.at // alignment) * alignment
    tensors = []
    for name, shape, type_name, offset in entries:
        kind = GGML_TYPES[type_name]
        columns = shape[-1] if shape else 1
        if columns % kind.block:
            raise ValueError(
                f"tensor {name!r}: {columns} columns are no multiple of {type_name}'s block of {kind.block}"
            )
        elements = 1
        for extent in shape:
            elements *= extent
        nbytes = elements // kind.block * kind.bytes
        tensors.append(TensorInfo(name=name, type=type_name, shape=shape, nbytes=nbytes, offset=start + offset))
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=start if entries else 0)
    if end > size:
        lost = sum(1 for tensor in tensors if tensor.offset + tensor.nbytes > size)
        raise UsageError(
            f"{path}: GGUF cut short: {end - size} bytes are missing ({lost} of {len(tensors)} tensors are not whole)",
            _SOURCE_HINT,
        )
    return GgufInfo(path=path, size=size, version=version, metadata=metadata, tensors=tuple(tensors))


def _refuse_part(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse a part of a split model (llama.cpp's tools/gguf-split): its digest and size would stand for the whole."""
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if not isinstance(number, int) or not isinstance(count, int) or count < 2:
        return
    first = path.with_name(re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-00001-of-\1", path.name))
    whole = path.with_name(re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", path.name).removesuffix(".gguf") + "-whole.gguf")
    raise UsageError(
        f"{path}: part {number + 1} of a model that is split into {count} files",
        f"join them with llama.cpp's tool: llama-gguf-split --merge {first} {whole}",
    )


def first_token(path: Path | str) -> list[int]:
    """Return the token that a text of this file's begins with, [] where it begins with its own."""
    metadata = read_info(path).metadata
    wanted, bos = metadata.get("tokenizer.ggml.add_bos_token"), metadata.get("tokenizer.ggml.bos_token_id")
    wanted = metadata.get("tokenizer.ggml.model") == "llama" if wanted is None else wanted  # llama.cpp's own default
    return [int(bos)] if wanted and bos is not None else []


def read_tensor(info: GgufInfo, name: str) -> np.ndarray:
    """Return one tensor dequantized to float32, in its numpy shape. Raises UsageError when the file has no such
    tensor.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = next((entry for entry in info.tensors if entry.name == name), None)
    if tensor is None:
        raise UsageError(f"{info.path}: no tensor {name!r}", "the file lacks a part of the model: convert it again")
    raw = np.fromfile(info.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    if tensor.type == "F32":
        return raw.view(np.float32).reshape(tensor.shape)
    if tensor.type == "F16":
        return raw.view(np.float16).reshape(tensor.shape).astype(np.float32)
    kind = GGML_TYPES[tensor.type]
    rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // kind.block * kind.bytes)
    return dequantize(rows, GGMLQuantizationType[tensor.type]).astype(np.float32, copy=False).reshape(tensor.shape)
