"""Headers are read right, and no damage to a file ends in anything but a plain word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.formats.gguf.types import GGML_TYPES
from edgedistill.models import resolve

MANY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_info_says_what_gguf_says(tiny_gguf: Callable[..., Path]) -> None:
    from gguf import GGUFReader

    path = tiny_gguf()
    info, reader = read_info(path), GGUFReader(path)
    assert info.metadata == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert [(t.name, t.type, t.nbytes, t.offset) for t in info.tensors] == [
        (t.name, t.tensor_type.name, int(t.n_bytes), int(t.data_offset)) for t in reader.tensors
    ]
    for theirs in reader.tensors:
        np.testing.assert_array_equal(read_tensor(info, theirs.name), np.asarray(theirs.data, dtype=np.float32))


def test_summary_of_a_model(tiny_gguf: Callable[..., Path]) -> None:
    info = read_info(tiny_gguf())
    assert (info.architecture, info.n_layers, info.hidden, info.context_length) == ("llama", 2, 64, 256)
    assert info.file_type == "F16" and not info.is_quantized and 16 < info.bpw < 17
    assert info.vocab == info.of_arch("vocab_size") and "<|im_start|>" in info.chat_template
    told = info.to_json()
    assert told["metadata"]["tokenizer.ggml.tokens"] == f"[{info.vocab} entries]"
    assert sum(row["bytes"] for row in told["types"].values()) == info.tensor_bytes < info.size


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "BF16"]
)
def test_block_formats_come_back_as_gguf_reads_them(kind: str, tmp_path: Path) -> None:
    import gguf

    columns = GGML_TYPES[kind].block * 3
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (5, columns // GGML_TYPES[kind].block * GGML_TYPES[kind].bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("a.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_info(tmp_path / "one.gguf")
    assert info.tensors[0].shape == (5, columns) and info.is_quantized == (kind != "BF16")
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(read_tensor(info, "a.weight"), want)


@MANY
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(share: float, tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = tiny_gguf().read_bytes()
    info = read_info(tiny_gguf())
    end = max(tensor.offset + tensor.nbytes for tensor in info.tensors)
    cut = tmp_path / "cut.gguf"
    # Half of the cuts fall into the header, which is the smaller part of the file.
    where = int(share * 2 * info.tensors[0].offset) if share < 0.5 else int((share * 2 - 1) * end)
    cut.write_bytes(whole[:where])
    with pytest.raises(UsageError, match=r"cut short|not a GGUF"):
        read_info(cut)


def test_the_missing_bytes_are_counted(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    info = read_info(tiny_gguf())
    end = max(tensor.offset + tensor.nbytes for tensor in info.tensors)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf().read_bytes()[: end - 1000])
    with pytest.raises(UsageError, match="GGUF cut short: 1000 bytes are missing"):
        read_info(cut)


@MANY
@given(data=st.data())
def test_a_flipped_header_never_crashes(data: st.DataObject, tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = bytearray(tiny_gguf().read_bytes())
    start = read_info(tiny_gguf()).tensors[0].offset
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(whole)
    try:
        info = read_info(path)
        info.to_json()
        _ = (info.n_layers, info.vocab, info.file_type, info.context_length)
    except UsageError:
        pass


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UsageError):
        read_info(tmp_path / "x.gguf")


def test_a_missing_file_and_tensor_are_refused(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such GGUF"):
        read_info(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match=r"no tensor 'blk\.9"):
        read_tensor(read_info(tiny_gguf()), "blk.9.attn_q.weight")


def test_the_real_file(smollm2_gguf: Path) -> None:
    info = read_info(smollm2_gguf)
    assert (info.architecture, info.n_layers, info.hidden, info.vocab) == ("llama", 30, 576, 49152)
    assert (info.file_type, info.tokenizer_pre, info.license, info.is_quantized) == (
        "Q4_1",
        "smollm",
        "apache-2.0",
        True,
    )
    assert {name: row["tensors"] for name, row in info.types().items()} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}


def test_a_part_of_a_split_model_is_refused_wherever_a_file_is_given(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    whole = gguf.GGUFReader(tiny_gguf())
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=12)
    for name, field in whole.fields.items():
        kind, value = field.types[0], field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, value, kind)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("big-*.gguf"))
    assert len(parts) == 2
    for number, part in enumerate(parts, 1):
        with pytest.raises(UsageError, match=f"part {number} of a model that is split into 2 files") as caught:
            read_info(part)
        assert caught.value.hint.endswith(f"--merge {tmp_path}/big-00001-of-00002.gguf {tmp_path}/big-whole.gguf")
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "store"))
    for command in (["quantize", str(parts[0]), "--types", "Q4_0"], ["bench", str(parts[0]), "-r", "1"]):
        found = CliRunner().invoke(app, command)
        assert isinstance(found.exception, UsageError) and "is split into 2 files" in found.exception.message
    with pytest.raises(UsageError, match="is split into 2 files"):
        resolve(f"gguf:{parts[1]}", tmp_path / "store")
