"""Event files, read back: by hand, and by protobuf from the fields that TensorBoard declares."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.tensorboard import crc32c, event, record, write_events
from tests.unit.made_build import make_session


def unmask(crc: int) -> int:
    rotated = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def records(data: bytes) -> list[bytes]:
    found = []
    while data:
        length, of_length = struct.unpack("<QI", data[:12])
        assert unmask(of_length) == crc32c(data[:8])
        body, (of_body,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert unmask(of_body) == crc32c(body)
        found.append(body)
        data = data[16 + length :]
    return found


def proto() -> Any:
    """Declare Event as tensorboard/compat/proto/event.proto and summary.proto do, and return the class."""
    pb = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = pb.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    kinds = pb.FieldDescriptorProto
    shapes = {
        "Value": [("tag", 1, kinds.TYPE_STRING, ""), ("simple_value", 2, kinds.TYPE_FLOAT, "")],
        "Summary": [("value", 1, kinds.TYPE_MESSAGE, ".t.Value")],
        "Event": [
            ("wall_time", 1, kinds.TYPE_DOUBLE, ""),
            ("step", 2, kinds.TYPE_INT64, ""),
            ("file_version", 3, kinds.TYPE_STRING, ""),
            ("summary", 5, kinds.TYPE_MESSAGE, ".t.Summary"),
        ],
    }
    for name, fields in shapes.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            label = kinds.LABEL_REPEATED if field == "value" else kinds.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, label=label, **({"type_name": of} if of else {}))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def test_the_checksum_is_rfc_3720s() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_records_come_back(parts: list[bytes]) -> None:
    assert records(b"".join(map(record, parts))) == parts


@given(st.integers(0, 2**40), st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(0, 1e6))
def test_events_are_what_tensorboard_declares(step: int, loss: float, seconds: float) -> None:
    line = {"step": step, "loss": loss, "kd": None, "tokens": 900, "seconds": seconds}
    found = proto().FromString(event(1e9, line))
    assert (found.step, found.wall_time) == (step, 1e9 + seconds)
    assert {one.tag: one.simple_value for one in found.summary.value} == {"loss": loss, "tokens": 900}


def test_every_training_of_a_build_is_a_run(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    paths = write_events(session, tmp_path / "runs")
    names = {path.parent.name for path in paths}
    assert names == {"adapt", "heal", "distill-1", "distill-gold-sft", "tune-phone-midrange"}
    (path,) = (path for path in paths if path.parent.name == "distill-1")
    first, *found = [proto().FromString(one) for one in records(path.read_bytes())]
    assert first.file_version == "brain.Event:2"
    entry = session.store.load(session.plan.match("distill/1")[0].key)
    assert entry
    lines = [json.loads(line) for line in (entry.path / "log" / "train.jsonl").read_text().splitlines()]
    assert [one.step for one in found] == [line["step"] for line in lines]
    tags = {one.tag: one.simple_value for one in found[25].summary.value}
    wanted = {"loss", "kd", "ce", "gradient", "gradient_kd", "lr", "tokens_per_s", "memory"}
    assert wanted <= tags.keys() and tags["loss"] == pytest.approx(lines[25]["loss"], rel=1e-6)
    assert found[-1].wall_time - found[0].wall_time == pytest.approx(lines[-1]["seconds"] - lines[0]["seconds"])
    before = path.read_bytes()
    write_events(session, tmp_path / "runs")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_build_without_training_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training step is built yet"):
        write_events(make_session(tmp_path, keep=lambda name: False), tmp_path / "runs")
