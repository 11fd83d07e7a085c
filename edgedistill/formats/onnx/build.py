"""Build an ONNX decoder with a KV cache from a Hugging Face folder, by onnxruntime-genai's own builder.

The builder runs in a process of its own: it loads the whole model, prints by the page and leaves half-written folders
behind. That it exits with 0 proves nothing (see check.py); some of its options build folders that cannot be loaded.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgedistill.child import bound
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.runners.onnx import require_onnx

Progress = Callable[[int, int, str], None]

PRECISIONS = ("fp32", "int8", "int4", "mixed")
NEEDED = ("genai_config.json", "model.onnx", "tokenizer.json")
LOG_LINES = 25


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """Describe a built folder: its size in bytes, file by file, how long the builder took and what it was."""

    precision: str
    size: int
    files: dict[str, int]
    seconds: float
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def build(
    model_dir: Path,
    out: Path,
    precision: str,
    *,
    block: int = 32,
    symmetric: bool = True,
    accuracy: int = 4,
    progress: Progress | None = None,
) -> OnnxReport:
    """Build the new folder ``out`` from ``model_dir`` with weights in ``precision``: fp32, int8, int4, or mixed (4 bits, with the
    head and the matrices that llama.cpp's mixes give more in 8). Of what is not fp32: ``block`` weights share a scale, int4's codes
    lie around 0 (``symmetric``), and ``accuracy`` 4 lets the runtime round inputs to 8 bits, 1 does not.

    Written beside ``out`` under another name and renamed when complete. Raises UsageError for a missing extra, an
    unknown precision or a folder without safetensors; StepFailed with the end of the builder's log where it fails.
    """
    require_onnx()
    model_dir, out = Path(model_dir).resolve(), Path(out).resolve()
    if precision not in PRECISIONS:
        raise UsageError(f"ONNX has no precision {precision!r} here", f"Choose one of {', '.join(PRECISIONS)}.")
    if not (model_dir / "config.json").is_file() or not any(model_dir.glob("*.safetensors")):
        raise UsageError(
            f"{model_dir}: needs config.json and *.safetensors", "Name a merged checkpoint in Hugging Face's layout."
        )
    if out.exists():
        raise UsageError(f"{out}: exists already", "Remove it, or name another folder.")
    layers = int(json.loads((model_dir / "config.json").read_text()).get("num_hidden_layers", 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        partial, cache = Path(work) / "model", Path(work) / "cache"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model_dir), "-o", str(partial)]
        command += ["-p", "int4" if precision == "mixed" else precision, "-e", "cpu", "-c", str(cache)]
        if options := _options(precision, block, symmetric, accuracy):
            command += ["--extra_options", *options]
        _run(command, layers, progress)
        files = {p.relative_to(partial).as_posix(): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        if missing := [name for name in NEEDED if name not in files]:
            raise StepFailed(
                f"the ONNX builder exited with 0 but wrote no {missing[0]}",
                "Check the free disk space: edgedistill doctor",
            )
        os.replace(partial, out)
    return OnnxReport(
        precision=precision,
        size=sum(files.values()),
        files=files,
        seconds=round(time.perf_counter() - started, 2),
        versions=versions(),
    )


def _options(precision: str, block: int, symmetric: bool, accuracy: int) -> list[str]:
    """Return the builder's words for what is not its default."""
    found = ["algo_config=k_quant_mixed"] if precision == "mixed" else []
    found += [f"block_size={block}"] if block != 32 else []
    found += [f"accuracy_level={accuracy}"] if accuracy != 4 else []
    if not symmetric:
        # The embedding would look for codes of a name that this quantizer does not give: built so, it cannot be loaded.
        found += ["is_symmetric=false", "shared_embeddings=false"]
    return found


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a build."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-genai", "onnx-ir", "onnx", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _run(command: list[str], layers: int, progress: Progress | None) -> None:
    """Run the builder, follow it layer by layer, and raise StepFailed with the end of its log where it fails."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }
    tail: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
    with subprocess.Popen(
        bound(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None  # asked for above
        try:
            for raw in process.stdout:
                # Progress bars overwrite their line with carriage returns: keep what a terminal would show in the end.
                line = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
                if line:
                    tail.append(line)
                if progress is not None and (found := re.match(r"Reading layer (\d+)", line)):
                    progress(min(int(found.group(1)) + 1, layers), layers, "ONNX layers")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        log = "\n".join(tail)
        raise StepFailed(
            f"the ONNX builder exited with {process.returncode}. The end of its log:\n{log}",
            _hint(log, shutil.disk_usage(tempfile.gettempdir()).free),
        )


def _hint(log: str, free: int) -> str:
    if "No space left" in log or free < 100 * 2**20:
        return "Free disk space and build again."
    if "No module named" in log:
        return "pip install 'edgedistill[onnx]'"
    return "The builder knows the families named by: python -m onnxruntime_genai.models.builder; try GGUF for others."
