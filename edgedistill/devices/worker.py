"""The process that runs a model while another one holds the watch: JSON lines in, JSON lines out.

A process of its own, so that its peak memory is the runner's alone, so that a crash of an engine is an error and not
our end, and so that two artifacts stay loaded side by side while their speeds are compared.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgedistill.errors import EdgeDistillError, UsageError


def main() -> None:
    """Serve requests from stdin until it closes. Replies go to stdout; what engines print there goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        used = _cpu_seconds()
        try:
            if request["do"] == "load":
                engine, reply = _load(request)
            else:
                reply = _serve(engine, request)
        except EdgeDistillError as error:
            reply = {"error": error.message, "hint": error.hint, "usage": isinstance(error, UsageError)}
        except Exception as error:  # what an engine throws must reach the reader of the other end as words
            reply = {"error": f"{type(error).__name__}: {error}", "hint": "edgedistill doctor", "usage": False}
        replies.write(json.dumps({**reply, "cpu_seconds": _cpu_seconds() - used}) + "\n")
        replies.flush()


def _load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    path, threads = Path(request["path"]), int(request["threads"])
    # Import the libraries first: their memory and time are the runner's, not the model's.
    if path.is_dir():
        from edgedistill.devices.engine_onnx import OnnxEngine as Engine

        __import__("onnxruntime_genai")
    else:
        from edgedistill.devices.engine_gguf import GgufEngine as Engine

        __import__("llama_cpp")
    before = _resident()
    start = time.perf_counter()
    kv: dict[str, Any] = {"kv": tuple(request["kv"])} if request.get("kv") else {}
    if draft := request.get("draft"):
        from edgedistill.devices.engine_draft import DraftedEngine

        options = {name: draft[name] for name in ("tokens", "min_probability")}
        engine: Any = DraftedEngine(path, Path(draft["path"]), threads, **options, **kv)
    else:
        engine = Engine(path, threads, **kv)
    seconds = time.perf_counter() - start
    size, exact = engine.bytes_per_token()
    return engine, {
        "load_seconds": seconds,
        "runner_rss": before,
        "runner": engine.describe(),
        "bytes_per_token": size,
        "bytes_exact": exact,
    }


def _serve(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "fill":
        engine.fill(request["context"], request["prompt"])
        return {"peak_rss": _peak_resident()}
    if request["do"] == "answer":
        first, last, prompt, made = engine.answer(request["messages"], request["limit"], request["context"])
        return {"first": first, "last": last, "prompt_tokens": prompt, "tokens": made, "peak_rss": _peak_resident()}
    if request["do"] == "draft":
        spoken = engine.answer(request["messages"], request["limit"], request["context"], drafted=request["drafted"])
        return {**asdict(spoken), "peak_rss": _peak_resident()}
    if request["do"] == "gap":
        return {"gap": engine.gap(*(request[name] for name in ("messages", "before", "one", "other", "context")))}
    return {"seconds": getattr(engine, request["do"])(request["n"])}


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _status(field: str) -> int | None:
    """Return a kB field of /proc/self/status in bytes. (ru_maxrss would count the process that started this one.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _peak_resident() -> int:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    return _status("VmRSS") or _peak_resident()


if __name__ == "__main__":
    main()
