"""Types tried on the whole model: the KLD of their errors, scaled where they are large; a grid that weights came from is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedistill.formats.gguf import sensitivity, tried
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.ggml import round_trip
from tests.unit.formats.gguf.conftest import make_model

Tiny = Callable[..., Path]
RNG = np.random.default_rng(5)
ROWS = [(RNG.integers(3, 300, length).tolist(), int(RNG.integers(1, 9))) for length in RNG.integers(12, 40, 24)]
LR = 5e-4
ONES = {64: np.ones(64, dtype=np.float32), 128: np.ones(128, dtype=np.float32)}


def inner(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name)


def test_it_is_the_divergence_of_the_model_with_these_errors(tiny: Tiny) -> None:
    """Row by row, in float64; errors under the bound as they are, those over it scaled; one type leaves no trace in the next."""
    errors = {
        name: 0.02 * RNG.standard_normal(weight.shape).astype(np.float32)
        for name, weight in inner(AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32))
    }

    def divergence(scale: float) -> float:
        found = [AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float64) for _ in range(2)]
        for name, weight in inner(found[1]):
            weight.data += scale * torch.from_numpy(errors[name]).double()
        total = 0.0
        for row, start in ROWS:
            with torch.no_grad():
                p, q = (one(torch.tensor([row])).logits[0, start - 1 : -1].log_softmax(-1) for one in found)
            total += float((p.exp() * (p - q)).sum())
        return total / sum(len(row) - start for row, start in ROWS)

    none = {name: np.zeros_like(error) for name, error in errors.items()}
    found = tried.try_types(
        tiny(),
        ROWS,
        {"small": (5e-4, errors.items), "large": (0.1, errors.items), "none": (0.0, none.items)},
        threads=1,
    )
    assert found["small"].scale == 1 and found["small"].measured == pytest.approx(divergence(1), rel=1e-3)
    assert found["large"].scale == pytest.approx(0.1)
    assert found["large"].measured == pytest.approx(divergence(0.1) * 100, rel=2e-2)
    assert found["small"].factor == pytest.approx(found["small"].measured / 5e-4)
    assert found["none"].measured == pytest.approx(0, abs=1e-12) and found["none"].factor == 1
    assert {one.tokens for one in found.values()} == {sum(len(row) - start for row, start in ROWS)}


def test_no_more_logits_are_in_memory_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tried, "LOGITS", 300 * 50)
    some = tried._few(ROWS, 300)
    assert 1 <= sum(len(row) - start for row, start in some) <= 50 and {tuple(row) for row, _ in some} <= {
        tuple(row) for row, _ in ROWS
    }
    monkeypatch.setattr(tried, "LOGITS", 1)
    assert len(tried._few(ROWS, 300)) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_grid_that_the_weights_were_taught_away_from_is_found_out(tmp_path: Path, family: str) -> None:
    """Rounding to the type that they came from takes back what they were taught, in all matrices at once."""
    folder = make_model(tmp_path / "tiny", family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turned = family == "gpt2"  # its matrices lie columns first: these weights come from no grid
    for weight in model.parameters():
        if weight.ndim == 2 and not turned:
            weight.data = torch.from_numpy(round_trip(weight.detach().numpy(), "Q4_1", ONES[weight.shape[1]]))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(10):
        for row, _ in ROWS:
            model(torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    source = convert(folder, tmp_path / "f16.gguf").path
    rows, starts = [row for row, _ in ROWS], [start for _, start in ROWS]
    report = sensitivity.measure(
        source, folder, rows, starts, tmp_path, palette=("Q4_0", "Q4_1", "Q5_0", "Q8_0"), threads=1
    )
    others = [factor for name, factor in report.tried.items() if name != "Q4_1"]
    assert len(others) == 3 and min(others) > 0.4 and max(others) < 2.5
    if turned:
        assert 0.4 < report.tried["Q4_1"] < 2.5
    else:
        assert report.tried["Q4_1"] > 3 * max(others)
