"""Runners answer prompts and give log-probabilities: one protocol (base.py), one file an engine."""

from __future__ import annotations

from pathlib import Path

from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Runner
from edgedistill.kv_cache import F16, Pair


def open_runner(path: Path, *, threads: int | None = None, kv: Pair = F16) -> Runner:
    """Open the runner that fits: a GGUF file, an ONNX folder (genai_config.json), an HF folder (config.json).

    ``threads`` defaults to the cores this process may use; ``kv`` are the types of a GGUF's KV cache. Raises UsageError for
    anything else.
    """
    path = Path(path)
    if path.is_file():
        from edgedistill.evals.runners.gguf import GgufRunner

        return GgufRunner(path, threads=threads, kv=kv)
    if (path / "genai_config.json").is_file():
        from edgedistill.evals.runners.onnx import OnnxRunner

        return OnnxRunner(path, threads=threads)
    if (path / "config.json").is_file():
        from edgedistill.evals.runners.transformers import TransformersRunner

        return TransformersRunner(path, threads=threads)
    raise UsageError(
        f"{path}: no model that can be run",
        "Name a .gguf file, an ONNX folder with genai_config.json, or a folder with config.json and safetensors.",
    )
