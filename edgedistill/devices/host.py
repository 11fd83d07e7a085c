"""What a machine is: architecture, processor, instruction sets, cores, memory; and how busy others keep it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedistill.cpus import usable_cpus
from edgedistill.fingerprint import digest

_ARCHES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

# Linux flags -> our names (target.FEATURES). llama.cpp's AVX-512 kernels want all five of avx512f, cd, bw, dq and vl.
_X86_FLAGS = {
    "sse4.2": ("sse4_2",),
    "avx": ("avx",),
    "f16c": ("f16c",),
    "fma": ("fma",),
    "avx2": ("avx2",),
    "avx_vnni": ("avx_vnni",),
    "avx512": ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_vbmi": ("avx512vbmi",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_int8": ("amx_tile", "amx_int8"),
}
_ARM_FLAGS = {
    "neon": ("asimd",),
    "fp16": ("asimdhp",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme",),
}
_MACOS_FLAGS = {
    "fp16": "hw.optional.arm.FEAT_FP16",
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
    "sme": "hw.optional.arm.FEAT_SME",
}
# Linux on ARM gives numbers, not names: "CPU part" of implementer 0x41 (ARM Ltd), from the cores' reference manuals.
_ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD05: "Cortex-A55", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
    0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2",
    0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HostFingerprint:
    """One machine as far as speed depends on it. With equal ``digest`` the speed of one stands for the other."""

    arch: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str

    @property
    def digest(self) -> str:
        """Return 16 hex digits over all fields; memory in whole GiB, for kernels keep back differing bits of it."""
        data = {**asdict(self), "memory_bytes": round(self.memory_bytes / 2**30)}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def isa(self) -> str:
        """Return 16 hex digits over the instruction sets: with equal ones the same kernels run, and logits are the same."""
        return digest([self.arch, sorted(self.features)])[:16]

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, the digest included."""
        return {**asdict(self), "features": list(self.features), "digest": self.digest}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HostFingerprint:
        """Read what `to_json` wrote."""
        kept = {key: value for key, value in data.items() if key != "digest"}
        return cls(**{**kept, "features": tuple(kept["features"])})


@functools.cache
def fingerprint() -> HostFingerprint:
    """Describe this machine (0.01 s; asks /proc on Linux, sysctl on macOS)."""
    machine = platform.machine().lower()
    arch = _ARCHES.get(machine, machine)
    cpuinfo = _read("/proc/cpuinfo")
    if cpuinfo:
        cpu, features = parse_cpuinfo(cpuinfo, arch)
    elif sys.platform == "darwin":
        cpu, features = _macos()
    else:
        cpu, features = platform.processor() or arch, ()
    return HostFingerprint(
        arch=arch,
        cpu=cpu,
        features=features,
        cores=usable_cores(),
        memory_bytes=_memory(),
        system=platform.system(),
    )


def parse_cpuinfo(text: str, arch: str) -> tuple[str, tuple[str, ...]]:
    """Return (processor name, features in our words) of a Linux /proc/cpuinfo; of unlike cores the shared ones."""
    blocks = [_block(block) for block in text.strip().split("\n\n")]
    flag_sets = [set(flags.split()) for block in blocks if (flags := block.get("flags") or block.get("Features"))]
    shared = set.intersection(*flag_sets) if flag_sets else set()
    wanted = _X86_FLAGS if arch == "x86_64" else _ARM_FLAGS if arch == "aarch64" else {}
    features = tuple(name for name, needed in wanted.items() if shared.issuperset(needed))
    names = [block["model name"] for block in blocks if "model name" in block]
    parts = [_part(block) for block in blocks if "CPU part" in block]
    board = next((block["Model"] for block in blocks if "Model" in block), "")
    kinds = list(dict.fromkeys(names or parts))
    cpu = " + ".join(kinds) or "unknown processor"
    return (f"{board} ({cpu})" if board else cpu), features


def usable_cores() -> int:
    """Count the physical cores that this process may use: no hyper-threads, nothing that a cgroup or an affinity withholds."""
    logical = usable_cpus()
    if sys.platform == "darwin":
        return min(int(_sysctl("hw.physicalcpu") or logical), logical)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return min(physical_cores(_read("/proc/cpuinfo") or "", allowed) or logical, logical)


def physical_cores(cpuinfo: str, allowed: Collection[int] | None = None) -> int:
    """Count the cores of a Linux /proc/cpuinfo that have a processor among ``allowed`` (None: any); 0 where it does not tell."""
    cores = set()
    for block in cpuinfo.strip().split("\n\n"):
        fields = _block(block)
        if "core id" in fields and (allowed is None or int(fields["processor"]) in allowed):
            cores.add((fields.get("physical id"), fields["core id"]))
    return len(cores)


def load_average() -> float | None:
    """Return the load of the last minute, or None where the system has none (Windows)."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy_seconds() -> float | None:
    """Return the CPU seconds that all processes have used on this process's cores since boot, stolen time included.

    The difference over a measurement, less our own, is the load of others; the load average lags it by a minute and
    counts our own threads too. None where there is no /proc/stat.
    """
    text = _read("/proc/stat")
    if not text or not hasattr(os, "sched_getaffinity"):
        return None
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _block(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _part(block: dict[str, str]) -> str:
    number = int(block["CPU part"], 16)
    if block.get("CPU implementer") == "0x41" and number in _ARM_PARTS:
        return _ARM_PARTS[number]
    return f"ARM {block.get('CPU implementer', '?')}/{block['CPU part']}"


def _macos() -> tuple[str, tuple[str, ...]]:
    cpu = _sysctl("machdep.cpu.brand_string") or "Apple"
    if platform.machine() != "arm64":
        flags = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".lower().replace(
            "avx1.0", "avx"
        )
        flags = flags.replace("sse4.2", "sse4_2")
        return cpu, parse_cpuinfo(f"flags : {flags}", "x86_64")[1]
    return cpu, ("neon", *(name for name, key in _MACOS_FLAGS.items() if _sysctl(key) == "1"))


def _memory() -> int:
    total = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = (_read("/sys/fs/cgroup/memory.max") or "max").strip()
    return min(total, int(limit)) if limit.isdigit() and total else total


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
