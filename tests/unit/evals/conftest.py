"""A tiny random model with a real tokenizer, as an HF folder and as the f32 GGUF converted from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.data.prompts import Row
from tests.unit.formats.gguf.conftest import TEXT, make_model

SYSTEM = {"role": "system", "content": "Answer with one function call."}


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("evals") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def tiny_file(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgedistill.formats.gguf.convert import convert

    return convert(tiny_hf, tmp_path_factory.mktemp("evals") / "tiny.gguf", dtype="f32").path


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """Return 30 rows with a shared system message, prompts of many lengths, and references."""
    words = TEXT[-1].split()
    return [
        Row(
            id=f"r{i}",
            messages=(SYSTEM, {"role": "user", "content": " ".join(words[i % 5 : i % 5 + 1 + i % 11]) + f" {i}"}),
            reference=f'{{"name":"play","arguments":{{"n":{i}}}}}',
            tags=("even",) if i % 2 == 0 else ("odd",),
        )
        for i in range(30)
    ]
