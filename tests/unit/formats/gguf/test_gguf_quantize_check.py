"""A quantized file is handed over only where it says nearly what full precision says."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.quantize_check import MOST_TOKENS, compare_quantized
from edgedistill.quantize_model import quantize_model, sample_rows
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model's f16 file, its Q8_0 and Q4_0, and the file of another model with the same tokens."""
    folder = tmp_path_factory.mktemp("hop")
    made = {name: folder / f"{name}.gguf" for name in ("whole", "Q8_0", "Q4_0", "other")}
    convert(make_model(folder / "one"), made["whole"])
    convert(make_model(folder / "two", seed=7), made["other"])
    for name in ("Q8_0", "Q4_0"):
        quantize(made["whole"], made[name], name)
    return made


def test_fewer_bits_are_further_away_and_another_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    def hop(name: str, rows: tuple[Row, ...] = sample_rows()) -> float:
        steps: list[tuple[int, int]] = []
        found = compare_quantized(
            files["whole"],
            files[name],
            rows,
            store=tmp_path,
            threads=1,
            progress=lambda done, total, _: steps.append((done, total)),
        )
        assert steps == [(at, len(rows)) for at in range(1, len(rows) + 1)]
        assert 0 < found.tokens <= MOST_TOKENS * found.texts and 0 <= found.top1 <= 1
        assert f"n = {found.tokens} tokens of {len(rows)} texts" in found.told()
        return found.kld

    assert hop("whole") == 0
    assert 0 < hop("Q8_0") < hop("Q4_0")
    answered = tuple(Row(id=row.id, messages=row.messages, reference="So be it.") for row in sample_rows())
    assert hop("Q8_0", answered) != hop("Q8_0")  # the answer counts, too
    with pytest.raises(StepFailed, match=r"other\.gguf: .* away from full precision .*: this is another model"):
        hop("other")


def test_what_a_type_costs_is_said(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    (made,) = quantize_model(
        str(model), targets=[], types=["Q8_0"], out=tmp_path / "out", store=Store(tmp_path / "store")
    )
    assert "nats a token from the file that it was made from, first choices alike" in made.notes[-1]
