"""A checkpoint read back: where the optimiser's state lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgedistill.training.checkpoint import State, latest_checkpoint, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizers_step_lies_with_its_weights_and_any_others_on_the_host(tmp_path: Path, fused: bool) -> None:
    """The device that has no memory stands in for a GPU: places alone are looked at."""
    here = torch.ones(3)
    here.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([here], fused=fused)
    optimizer.step()
    save_checkpoint(tmp_path, State(step=1), {"w": here}, optimizer)
    there = torch.empty(3, device="meta")
    resumed = torch.optim.AdamW([torch.zeros(1)], fused=fused)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    load_checkpoint(path, "", {"w": there}, resumed)
    moved = resumed.state[there]
    assert moved["exp_avg"].device.type == moved["exp_avg_sq"].device.type == "meta"
    assert moved["step"].device.type == ("meta" if fused else "cpu")
