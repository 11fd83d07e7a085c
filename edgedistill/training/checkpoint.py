"""Training checkpoints and the training log: safetensors only, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines

PREFIX = "step-"


@dataclass(kw_only=True)
class State:
    """Where a run stands: finished optimiser steps and what the checks on the loss remember."""

    step: int = 0
    digest: str = ""
    tokens: int = 0
    seconds: float = 0.0
    best: float = 1e30
    last_losses: list[float] = field(default_factory=list)
    within: int = (
        0  # the last step whose loss on general rows was within its bound, and how many looks went beyond since
    )
    beyond: int = 0
    looked: float = 1e30  # the least divergence on rows held out, and how many looks since were not below it
    without: int = 0
    lowest: float = 1e30  # the least of weights that may ship, and the step that they are of
    lowest_step: int = 0


def save_checkpoint(
    folder: Path, state: State, masters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write the weights in training, the optimiser's moments and the state as ``folder/step-N``; drop older ones.

    The folder is written under another name, flushed to disk and renamed: a checkpoint that exists is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{state.step:07d}"
    partial = folder / f"partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in masters.items()}, partial / "weights.safetensors")
    moments = {}
    for name, tensor in masters.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            moments[f"{name}\t{key}"] = value.detach().contiguous()
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(vars(state)))
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(folder)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in the folder, or None."""
    found = sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []
    return found[-1] if found else None


def load_checkpoint(
    path: Path, digest: str, masters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> State:
    """Put a checkpoint's weights and moments back in place and return its state.

    Raises UsageError when it was made with other settings, data or model (another ``digest``).
    """
    state = State(**json.loads((path / "state.json").read_text()))
    if state.digest != digest:
        raise UsageError(
            f"{path}: this checkpoint was made with other settings or data", hint=f"remove {path.parent} and run again"
        )
    weights = load_file(path / "weights.safetensors")
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, _, key = name.partition("\t")
        moments.setdefault(parameter, {})[key] = tensor
    for name, master in masters.items():
        master.data.copy_(weights[name])
        if name in moments:
            # A fused optimizer's kernel reads the step where the weights are, any other on the host.
            here = () if optimizer.defaults.get("fused") else ("step",)
            optimizer.state[master] = {
                key: tensor if key in here else tensor.to(master.device) for key, tensor in moments[name].items()
            }
    return state


def save_weights(path: Path, masters: dict[str, torch.Tensor]) -> None:
    """Write the weights in training to one file, whole and on the disk: a checkpoint that is written after it counts on it."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in masters.items()}, partial)
    _sync(partial)
    os.replace(partial, path)


def load_weights(path: Path, masters: dict[str, torch.Tensor]) -> None:
    """Put the weights of a file of ``save_weights`` back in place."""
    for name, tensor in load_file(path).items():
        masters[name].data.copy_(tensor)


class StepLog:
    """``log.jsonl``: one line an optimiser step, each step once, however often the run was cut off."""

    def __init__(self, path: Path, finished_steps: int) -> None:
        lines = []
        if path.exists():
            for line in json_lines(path):
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError):
                    break  # the line that was being written when the run was cut off
                if step > finished_steps:
                    break
                lines.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in lines))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Add one step; what is not finite becomes null, for which JSON has a word."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to disk: called before a checkpoint, which must not know more steps than the log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
