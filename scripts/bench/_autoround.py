"""AutoRound's GGUF files, from an environment of its own: it comes after ours in the search path, and nothing of ours changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from _common import cache_folder

VERSION = "0.16.1"
NEEDS = (f"auto-round=={VERSION}", "py-cpuinfo==9.0.0", "sentencepiece")  # the rest is ours: torch, transformers, gguf
TYPES = ("Q4_K_M", "Q4_0")  # of ours; it makes no IQ4_XS
LENGTH = 128
"""Tokens of each of its rows: they have one length (2,048 by default, more than all this text has), so that what we read as rows it
reads one behind the other.
"""
ITERATIONS = 200
"""Its own default; 0 is its way without training."""

CHILD = """
import json, sys

told = json.load(sys.stdin)
import torch
from auto_round import AutoRound

rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in told["rows"]]
made = AutoRound(
    told["checkpoint"], scheme=told["scheme"], iters=told["iterations"], nsamples=len(rows), seqlen=len(told["rows"][0]),
    batch_size=8, dataset=rows, device_map="cpu", seed=told["seed"],
)
made.quantize_and_save(told["out"], format=told["scheme"])
"""


def environment() -> Path:
    """Return the Python that has AutoRound; installed once. Raises OSError where that fails, with pip's last line."""
    folder = cache_folder("autoround") / f"{VERSION}-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if (folder / "done").exists():
        return python
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"no environment for AutoRound: {error}") from error
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "edgedistill.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *NEEDS], capture_output=True, text=True, check=False
    )
    if said.returncode:
        raise OSError((said.stderr.strip().splitlines() or ["pip failed"])[-1])
    (folder / "done").touch()
    return python


def quantize(
    checkpoint: Path, folder: Path, type_: str, rows: Sequence[Sequence[int]], *, iterations: int, seed: int
) -> Path:
    """Have AutoRound make a GGUF file of an HF folder; ``rows`` of token ids are what it is calibrated on. Return the file.

    Raises OSError where it does not.
    """
    stream = [token for row in rows for token in row]
    told = {
        "checkpoint": str(checkpoint),
        "out": str(folder),
        "scheme": f"gguf:{type_.lower()}",
        "iterations": iterations,
        "seed": seed,
        "rows": [stream[at : at + LENGTH] for at in range(0, len(stream) - LENGTH + 1, LENGTH)],
    }
    said = subprocess.run(
        [environment(), "-c", CHILD],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )
    files = list(folder.rglob("*.gguf"))
    if said.returncode or len(files) != 1:
        raise OSError(f"AutoRound {VERSION}: {(said.stderr.strip().splitlines() or ['no file'])[-1]}")
    return files[0]
