"""Find quantized tensors again in the files of earlier builds, by what they were made from.

A quantized file is an entry of the store; beside it ``log/tensors.json`` says what each of its tensors was made from, and where it
lies. So no tensor is stored twice, and an entry that is deleted takes its tensors along. Bytes are compared with the digest that
stands there before they are used: a damaged tensor is quantized anew. The table that types are chosen by has every matrix in every
type: it leaves those beside it that take longest (``Aside``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.fingerprint import digest
from edgedistill.formats.gguf.read import TensorInfo

INDEX = "log/tensors.json"  # inside an entry, outside its digest
_BLOCK = 1 << 22  # bytes read at once
_VERSION = 1  # of the code that makes tensors: a new one finds none of the old


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie. ``errors`` are those of its products before and after rounding by feedback, where it was
    (``rounding``).
    """

    path: Path
    offset: int
    nbytes: int
    sha256: str
    errors: tuple[float, float] | None = None

    def read(self) -> bytes | None:
        """Return the bytes; None where they are no longer those that were written."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == self.sha256 else None


def source_digest(file: int, tensor: TensorInfo) -> str:
    """Return the sha256 of a tensor's bytes in an open file."""
    found = hashlib.sha256()
    for at in range(0, tensor.nbytes, _BLOCK):
        found.update(os.pread(file, min(_BLOCK, tensor.nbytes - at), tensor.offset + at))
    return found.hexdigest()


def tensor_key(
    source: str, source_type: str, shape: Iterable[int], type_name: str, importance: bytes | None, library: str
) -> str:
    """Name a quantized tensor by what it is made from: ``source`` is the sha256 of the whole one's bytes, ``library`` that of
    llama.cpp's.
    """
    means = hashlib.sha256(importance).hexdigest() if importance is not None else ""
    return digest([_VERSION, source, source_type, list(shape), type_name, means, library])


def rounded_key(key: str, name: str, feedback: str) -> str:
    """Name the tensor of ``key`` rounded by ``feedback``, a digest of what decides that; it hangs on whose tensor it is."""
    return digest([key, name, feedback])


def find_tensors(root: Path) -> dict[str, Place]:
    """Return the tensors of all quantized files in the store at ``root``."""
    found: dict[str, Place] = {}
    for path in sorted((root / "entries").glob(f"*/*/{INDEX}")):
        try:
            index = json.loads(path.read_text())
            file = path.parent.parent / index["file"]
            for key, (offset, nbytes, sha256, *errors) in index["tensors"].items():
                found[key] = Place(file, offset, nbytes, sha256, (errors[0], errors[1]) if errors else None)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue  # half deleted, or of another version: what it had is made anew
    return found


def write_index(
    out: Path, tensors: Sequence[TensorInfo], keys: Mapping[str, str], errors: Mapping[str, tuple[float, float]]
) -> None:
    """Write beside the file ``out`` where the tensors lie whose ``keys`` are given, and ``errors`` of those that were rounded."""
    places: dict[str, list[Any]] = {}
    with out.open("rb") as file:
        for tensor in tensors:
            if tensor.name in keys:
                file.seek(tensor.offset)
                sha256 = hashlib.sha256(file.read(tensor.nbytes)).hexdigest()
                places[keys[tensor.name]] = [tensor.offset, tensor.nbytes, sha256, *errors.get(tensor.name, ())]
    path = out.parent / INDEX
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"file": out.name, "tensors": places}, sort_keys=True))


class Aside:
    """Tensors in no file of a model: ``log/tensors.bin`` of the entry that ``out`` becomes."""

    def __init__(self, out: Path, nbytes: int) -> None:
        """Set aside about ``nbytes``: nothing where the disk has less than four times as much."""
        self.path, self._places = out / "log" / "tensors.bin", {}
        self.has_room = shutil.disk_usage(out).free > 4 * nbytes
        self._end = 0

    def add(self, key: str, data: bytes) -> None:
        """Put a tensor behind the others."""
        if self.has_room:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab") as file:
                file.write(data)
            self._places[key] = [self._end, len(data), hashlib.sha256(data).hexdigest()]
            self._end += len(data)

    def close(self) -> None:
        """Write where they lie."""
        if self._places:
            index = {"file": "log/tensors.bin", "tensors": self._places}
            (self.path.parent.parent / INDEX).write_text(json.dumps(index, sort_keys=True))
