"""What manifest, card, commands, gates and report say of a KV cache that is not f16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.artifact import cache_of, commands, model_card, read_manifest, write_files
from edgedistill.errors import UsageError
from edgedistill.gates import check_gates, miss_hint
from edgedistill.report_entries import caches
from edgedistill.report_work import caches_sheet
from tests.unit.devices.conftest import write_tiny
from tests.unit.stages.test_package_draft import manifest

FOUND: dict[str, Any] = {
    "k": "q8_0", "v": "q8_0", "context": 2048, "rows": 8, "tokens": 1024, "text": 9000, "standard_error": 0.0004,
    "kld": {"value": 0.0021, "low": 0.0012, "high": 0.003, "n": 8}, "top1": {"value": 0.985, "low": 0.97, "high": 0.99, "n": 1024},
    "rounding": {"value": 0.0019, "low": 0.001, "high": 0.0028, "n": 8}, "peak_rss": {"f16": 400 * 2**20, "q8_0": 376 * 2**20},
}  # fmt: skip


def of(**changes: Any) -> Any:
    return dataclasses.replace(manifest({}), kv_cache={**FOUND, **changes})


def test_manifest_card_and_commands_have_the_types_and_their_cost(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf")
    write_files(tmp_path, of(), grammar=None)
    read = read_manifest(tmp_path)
    assert read.kv_cache == FOUND and read.kv == cache_of(tmp_path, None) == ("q8_0", "q8_0")
    lines = commands(read)
    assert "llama-server -m model.gguf --jinja -c 2048 -ctk q8_0 -ctv q8_0 -fa on" in lines
    assert any(line.startswith("llama-cli ") and " -ctk q8_0 -ctv q8_0 -fa on -st -p " in line for line in lines)
    assert any('Llama("model.gguf", n_ctx=2048, type_k=8, type_v=8, flash_attn=True)' in line for line in lines)
    assert any(line.startswith("OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0 ollama serve") for line in lines)
    card = (tmp_path / "README.md").read_text()
    assert "- in q8_0; peak memory of the process with that context: 400 MiB in f16, 376 MiB in q8_0" in card
    assert "KLD 0.0021 [0.0012, 0.003] nats a token from an f16 cache, first choices agree 98.5%" in card
    assert "the text was repeated" in card and "0.0019 nats a token from f16 with it: rounding alone" in card


def test_commands_of_other_types() -> None:
    keys = commands(of(k="q8_0", v="f16"))
    assert any(line.endswith("-c 2048 -ctk q8_0 -ctv f16") for line in keys)  # keys alone need no flash attention
    assert any("Ollama has no q8_0 / f16" in line for line in keys)
    assert any('Llama("model.gguf", n_ctx=2048, type_k=8, type_v=1)' in line for line in keys)
    assert any("Ollama has no q5_1" in line for line in commands(of(k="q5_1", v="q5_1")))


def test_auto_that_came_out_as_f16_is_told_and_changes_no_command() -> None:
    plain = {"k": "f16", "v": "f16", "peak_rss": {"f16": 2**28}}
    told = dataclasses.replace(manifest({}), kv_cache=plain)
    assert commands(told) == commands(manifest({}))
    assert "- in f16; peak memory of the process with that context: 256 MiB in f16" in model_card(told, grammar=False)


def test_without_types_the_manifest_is_what_it_was(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf")
    write_files(tmp_path, manifest({}), grammar=None)
    assert "kv_cache" not in json.loads((tmp_path / "manifest.json").read_text())
    assert read_manifest(tmp_path).kv == cache_of(tmp_path, None) == ("f16", "f16")
    assert "KV cache" not in (tmp_path / "README.md").read_text()


def test_types_are_given_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert cache_of(tmp_path / "model.gguf", None) == ("f16", "f16")
    assert cache_of(tmp_path / "model.gguf", "q8_0") == ("q8_0", "q8_0")
    assert cache_of(tmp_path / "model.gguf", "q8_0,q4_0") == ("q8_0", "q4_0")
    for wrong in ("q8", "q8_0,q4_0,f16", ""):
        with pytest.raises(UsageError, match="no type of a KV cache"):
            cache_of(tmp_path / "model.gguf", wrong)
    with pytest.raises(UsageError, match="is an ONNX model"):
        cache_of(tmp_path, "q8_0")


@pytest.mark.parametrize(
    ("found", "bound", "status", "value"),
    [
        (FOUND, 0.003, "green", 0.0021),
        (FOUND, 0.0025, "missed", 0.0021),  # the upper bound counts
        ({"k": "f16", "v": "f16", "peak_rss": {}}, 1e-9, "green", 0.0),
        (None, 1e-9, None, None),
    ],
)
def test_the_gate_on_the_cache(tmp_path: Path, found: Any, bound: float, status: str | None, value: float) -> None:
    report = check_gates(
        gates={"max_kv_kld": bound}, limits={}, size=1, reference_size=None, evaluation=tmp_path, measurement={},
        teacher=tmp_path, student=None, unproved="on another machine", kv_cache=found,
    )  # fmt: skip
    assert [(line.status, line.found) for line in report.lines] == ([(status, value)] if status else [])
    if status == "missed":
        assert "runtime.kv_cache more bits" in miss_hint(report.missed, {})


def test_the_report_has_a_sheet_of_them() -> None:
    entry = SimpleNamespace(facts={"kv_cache": FOUND})
    plain = SimpleNamespace(facts={"kv_cache": {"k": "f16", "v": "f16", "peak_rss": {"f16": 2**28}}})
    read = caches({"phone": entry, "laptop": plain, "not-built": None})  # type: ignore[dict-item]
    sheet = caches_sheet(SimpleNamespace(caches=read))  # type: ignore[arg-type]
    assert [row[:4] for row in sheet.rows] == [
        ["phone", "q8_0", "400 MiB in f16, 376 MiB in q8_0", "2048"],
        ["laptop", "f16", "256 MiB in f16", ""],
    ]
    assert sheet.rows[0][4:] == [
        "0.0021 [0.0012, 0.0030]",
        "0.0019 [0.0010, 0.0028]",
        "8",
        "0.9850 [0.9700, 0.9900]",
        "1024",
    ]
