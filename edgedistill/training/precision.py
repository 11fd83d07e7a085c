"""Which floating-point type the processor computes fast in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import torch


@functools.cache
def cpu_has_bf16() -> bool:
    """Tell whether the CPU has bf16 dot products (AVX512-BF16 or AMX on x86, BF16 on Arm); emulated ones are slow."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def resolve_dtype(name: str, device: str = "cpu") -> str:
    """Turn ``auto`` into ``bfloat16`` or ``float32`` for the device; other names stay. Raises UsageError for unknown
    ones.
    """
    if name == "auto":
        if device == "cpu":
            return "bfloat16" if cpu_has_bf16() else "float32"
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    known = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32"}
    name = known.get(name, name)
    if name not in ("bfloat16", "float32"):
        raise UsageError(f"dtype {name!r}: use auto, bfloat16 or float32")
    return name


def torch_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Return the torch type of a name that ``resolve_dtype`` takes."""
    import torch

    return getattr(torch, resolve_dtype(name, device))


def pick_device() -> str:
    """Return ``cuda`` where there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
