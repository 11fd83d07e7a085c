"""``quantize MODEL`` for ONNX targets whose codes are chosen on text: through the store, kept to the size, proved, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.devices.host import fingerprint
from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key
from edgedistill.formats.onnx.check import compare
from edgedistill.quantize_model import quantize_model
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import TEXT

pytestmark = pytest.mark.onnx

PROMPTS = [[{"role": "user", "content": "turn the volume down to thirty percent"}]]


def target(folder: Path, name: str, types: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(
        f'summary = "s"\narch = "{fingerprint().arch}"\n[runtime]\nformat = "onnx"\nengine = "onnxruntime-genai"\n'
        f"threads = 1\ncontext = 256\n[quantize]\n{types}\n"
    )
    return str(path)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 40))
    return {
        "types": [],
        "calibration": tmp_path / "text.txt",
        "store": Store(tmp_path / "store"),
        "out": tmp_path / "out",
    }


@pytest.mark.slow
def test_auto_keeps_to_its_size(tiny_hf: Path, tmp_path: Path, made: dict[str, Any]) -> None:
    name = target(tmp_path, "small", 'type = "auto"\nsize = "180 KiB"')
    (auto,) = quantize_model(str(tiny_hf), targets=[name], **made)
    assert 150 * 1024 < auto.size <= 180 * 1024 and auto.format == "onnx"
    assert auto.size == sum(file.stat().st_size for file in auto.path.iterdir())
    assert "predicted KLD" in auto.notes[0] and "rounded with feedback" in auto.notes[2]
    assert compare(tiny_hf, auto.path, PROMPTS).kld < 3.0
    stages = {
        entry.stage
        for path in (made["store"].root / "entries").glob("*/*")
        if (entry := made["store"].load(Key(path.name)))
    }
    assert {"sensitivity-onnx", "allocate", "quantize"} < stages and "convert" not in stages
    with pytest.raises(UsageError, match="to choose types takes text of the task"):
        quantize_model(str(tiny_hf), targets=[name], **{**made, "calibration": None})


@pytest.mark.slow
def test_feedback_through_the_store(tiny_hf: Path, tmp_path: Path, made: dict[str, Any]) -> None:
    names = [
        target(tmp_path, "plain", 'type = "int4"'),
        target(tmp_path, "fine", 'type = "int4"\nrounding = "gptq"'),
        target(tmp_path, "zeros", 'type = "int4"\nrounding = "gptq"\nsymmetric = false'),
    ]
    plain, fine, zeros = quantize_model(str(tiny_hf), targets=names, **made)
    assert plain.notes == [] and "11 x int4/32, rounded with feedback" in fine.notes[0]
    assert "11 x uint4/32" in zeros.notes[0]  # in the shared embedding too
    assert abs(fine.size - plain.size) < 40_000 > abs(zeros.size - plain.size)
    with pytest.raises(UsageError, match="to round with feedback takes text of the task"):
        quantize_model(str(tiny_hf), targets=names[1:2], **{**made, "calibration": None})
