"""Training logs as TensorBoard's event files, written on demand from ``log/train.jsonl``: no package is needed for it.

A file is a row of TFRecords (length, its masked CRC-32C, the bytes, theirs), each a protobuf ``Event``: wall_time = 1 (double),
step = 2 (int64), file_version = 3 (string), summary = 5, which holds values = 1 of tag = 1 (string) and simple_value = 2 (float).
The fields are those of event.proto and summary.proto in tensorboard/compat/proto, the framing that of TensorFlow's
record_writer.cc; CRC-32C is RFC 3720's.
"""

from __future__ import annotations

import calendar
import functools
import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines

if TYPE_CHECKING:
    from edgedistill.session import Session

TIMES = ("step", "seconds")


def write_events(session: Session, folder: Path) -> list[Path]:
    """Write the logs of every training step that is built to ``folder/<step>/``; the same build writes the same bytes.

    Raises UsageError where nothing is trained yet, and where they cannot be written.
    """
    written = []
    for step in session.plan.steps:
        entry = session.store.load(step.key)
        log = entry.path / "log" / "train.jsonl" if entry else None
        if entry is None or log is None or not log.is_file():
            continue
        lines = [json.loads(line) for line in json_lines(log)]
        ended = calendar.timegm(time.strptime(entry.created, "%Y-%m-%dT%H:%M:%SZ"))
        begun = ended - (lines[-1]["seconds"] if lines else 0.0)
        path = folder / step.id.replace("/", "-") / f"events.out.tfevents.{int(begun)}.edgedistill"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record(event(begun)) + b"".join(record(event(begun, line)) for line in lines))
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written ({error.strerror})", "--tensorboard DIR: another one"
            ) from None
        written.append(path)
    if not written:
        raise UsageError("no training step is built yet", f"edgedistill build {session.path}")
    return written


def event(begun: float, line: Mapping[str, float | None] | None = None) -> bytes:
    """Encode one line of a log; without one, the event that a file starts with. What is not finite is left out."""
    if line is None:
        return struct.pack("<Bd", 1 << 3 | 1, begun) + _bytes(3, b"brain.Event:2")
    values = b"".join(
        _bytes(1, _bytes(1, tag.encode()) + struct.pack("<Bf", 2 << 3 | 5, value))
        for tag, value in line.items()
        if tag not in TIMES and isinstance(value, int | float)
    )
    at, step = struct.pack("<Bd", 1 << 3 | 1, begun + (line["seconds"] or 0.0)), int(line["step"] or 0)
    return at + bytes([2 << 3]) + _varint(step) + _bytes(5, values)


def record(data: bytes) -> bytes:
    """Frame bytes as a TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        found.append(byte)
    return tuple(found)


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
