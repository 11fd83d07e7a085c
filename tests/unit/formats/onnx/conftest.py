"""A tiny random model, and its ONNX folders: each precision built once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.formats.onnx.build import OnnxReport, build
from tests.unit.formats.gguf.conftest import make_model


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tied model with grouped heads whose hidden size is no multiple of 256, as the real student's."""
    folder = tmp_path_factory.mktemp("onnx") / "tiny"
    # Not SmolLM's own way to cut: onnxruntime-genai skips its digit splitting, which shows where merges hold digits.
    return make_model(folder, pre="gpt-2", hidden_size=96, num_attention_heads=6, head_dim=16)


@pytest.fixture(scope="session")
def even_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows have an even number of blocks of 64: ``mixed`` needs one."""
    folder = tmp_path_factory.mktemp("onnx") / "even"
    return make_model(folder, pre="gpt-2", hidden_size=128, num_attention_heads=8, head_dim=16)


@pytest.fixture(scope="session")
def reports() -> dict[str, tuple[OnnxReport, list[tuple[int, int, str]]]]:
    """Hold what ``tiny_onnx`` was told about each build: the report and the progress."""
    return {}


@pytest.fixture(scope="session")
def tiny_onnx(
    tiny_hf: Path,
    tmp_path_factory: pytest.TempPathFactory,
    reports: dict[str, tuple[OnnxReport, list[tuple[int, int, str]]]],
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("onnx") / "deep" / precision
            seen: list[tuple[int, int, str]] = []
            report = build(tiny_hf, made[precision], precision, progress=lambda *step: seen.append(step))
            reports[precision] = report, seen
        return made[precision]

    return get
