"""Which floating-point type the processor computes fast in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import torch


@functools.cache
def cpu_computes_bf16() -> bool:
    """Tell whether bf16 matrix products are faster than fp32 ones on this CPU: AMX, BF16 on Arm, AVX512-BF16 of AMD.

    Zen 4 multiplies at 407 GFLOP/s in bf16 and 138 in fp32 on two cores. An Intel Xeon whose AMX the hypervisor hides
    has AVX512-BF16 too, at half the rate of its own fp32: 153 and 300 GFLOP/s (1024 x 576 x 1536, torch 2.13).
    """
    try:
        return computes_bf16(Path("/proc/cpuinfo").read_text())
    except OSError:
        return False


def computes_bf16(cpuinfo: str) -> bool:
    """Tell what ``cpu_computes_bf16`` does from the text of a /proc/cpuinfo."""
    words = set(cpuinfo.split())
    return bool(words & {"amx_bf16", "bf16"}) or {"avx512_bf16", "AuthenticAMD"} <= words


def resolve_dtype(name: str, device: str = "cpu") -> str:
    """Turn ``auto`` into ``bfloat16`` or ``float32`` for the device; other names stay. Raises UsageError for unknown
    ones.
    """
    if name == "auto":
        if device == "cpu":
            return "bfloat16" if cpu_computes_bf16() else "float32"
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
