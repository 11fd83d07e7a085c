"""This machine as a device: measure artifacts here, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from edgedistill.child import bound
from edgedistill.devices.bandwidth import bandwidth
from edgedistill.devices.host import HostFingerprint, busy_seconds, fingerprint, load_average
from edgedistill.devices.protocol import (
    NOISY_LOAD,
    NOISY_SPREAD,
    Latencies,
    Measurement,
    Messages,
    Progress,
    Ratio,
    RatioMeasurement,
    Samples,
    Settings,
)
from edgedistill.errors import StepFailed, UsageError
from edgedistill.kv_cache import F16, Pair

__all__ = ["Local", "bandwidth", "fingerprint", "measure", "measure_ratio"]

_PAIRS = 8  # fewest pairs of a ratio: below, the bootstrap interval of a median is mostly luck


def measure(
    artifact: Path,
    settings: Settings,
    *,
    prompts: Sequence[Messages] | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure speed, memory and time to first token of ``artifact`` on this machine (about 15 s for a 100 MB model).

    pp and tg are llama-bench's tests; ``prompts`` (chat messages; the first ``settings.ttft_prompts``) give time to
    first token and request time. Raises UsageError for an artifact that cannot be run, StepFailed if its runner dies.
    """
    file_size = artifact_size(artifact)
    asked = list(prompts or [])[: settings.ttft_prompts]
    say = Steps(progress, total=3 + len(asked) + 2 * (settings.reps + settings.warmup))
    load_before = load_average()
    say("memory bandwidth")
    ceiling = bandwidth(settings.threads)
    say(f"loading {artifact.name}")
    with Worker(artifact, settings.threads, kv=settings.kv) as worker:
        # Memory first, while nothing but the model and one context of the target's length is there.
        say("memory")
        peak = worker.ask("fill", context=settings.context, prompt=settings.pp)["peak_rss"]
        first, last, prompt_tokens = [], [], []
        others = Others()
        for index, messages in enumerate(asked):
            say(f"prompt {index + 1}/{len(asked)}")
            with others.watch(worker):
                reply = worker.ask("answer", messages=messages, limit=settings.answer_tokens, context=settings.context)
            first.append(1000 * reply["first"])
            last.append(1000 * reply["last"])
            prompt_tokens.append(reply["prompt_tokens"])
            peak = max(peak, reply["peak_rss"])
        speeds: dict[str, list[float]] = {"prompt": [], "generate": []}
        for test, n in (("prompt", settings.pp), ("generate", settings.tg)):
            if settings.warmup:
                say(f"{test}: warm-up")
                worker.ask(test, n=n)
            for index in range(settings.reps):
                say(f"{test} {index + 1}/{settings.reps}")
                with others.watch(worker):
                    speeds[test].append(n / worker.ask(test, n=n)["seconds"])
        loaded = worker.loaded
    pp, tg = Samples(values=tuple(speeds["prompt"])), Samples(values=tuple(speeds["generate"]))
    load_after = load_average()
    return Measurement(
        artifact=str(artifact),
        format="onnx" if artifact.is_dir() else "gguf",
        file_size=file_size,
        settings=settings,
        host=fingerprint(),
        runner=loaded["runner"],
        pp=pp,
        tg=tg,
        ttft=Latencies(values=tuple(first)) if first else None,
        request=Latencies(values=tuple(last)) if last else None,
        prompt_tokens=tuple(prompt_tokens),
        peak_rss=peak,
        runner_rss=loaded["runner_rss"],
        load_seconds=loaded["load_seconds"],
        bytes_per_token=loaded["bytes_per_token"],
        bytes_exact=loaded["bytes_exact"],
        bandwidth=ceiling,
        load_before=load_before,
        load_after=load_after,
        load_of_others=others.load,
        noise=noise_of({"pp": pp, "tg": tg}, others.load, settings.threads),
    )


def measure_ratio(
    ours: Path, baseline: Path, settings: Settings, *, progress: Progress | None = None
) -> RatioMeasurement:
    """Measure how many times as fast ``ours`` decodes and prefills as ``baseline``, in one session.

    Both stay loaded in processes of their own and take turns (ours first, then baseline first, and so on, which cancels
    a drift of the machine); at least 8 pairs. Formats may differ; ``settings.kv`` is for ours, the baseline's KV cache is in
    f16. The interval is a bootstrap over pairs. Raises as `measure`.
    """
    pairs = max(_PAIRS, settings.reps)
    say = Steps(progress, total=2 + 2 * (pairs + settings.warmup))
    others = Others()
    times: dict[str, tuple[list[float], list[float]]] = {"generate": ([], []), "prompt": ([], [])}
    say(f"loading {ours.name}")
    with Worker(ours, settings.threads, kv=settings.kv) as left:
        say(f"loading {baseline.name}")
        with Worker(baseline, settings.threads) as right:
            for test, n in (("generate", settings.tg), ("prompt", settings.pp)):
                if settings.warmup:
                    say(f"{test}: warm-up")
                    for worker in (left, right):
                        worker.ask(test, n=n)
                for pair in range(pairs):
                    say(f"{test}: pair {pair + 1}/{pairs}")
                    turns = [(left, times[test][0]), (right, times[test][1])]
                    for worker, kept in turns if pair % 2 == 0 else reversed(turns):
                        with others.watch(worker):
                            kept.append(n / worker.ask(test, n=n)["seconds"])
            runners = (left.loaded["runner"], right.loaded["runner"])
    tg, pp = (ratio_of(*times[test]) for test in ("generate", "prompt"))
    samples = {"tg": tg.ours, "tg of the baseline": tg.baseline, "pp": pp.ours, "pp of the baseline": pp.baseline}
    return RatioMeasurement(
        ours=str(ours),
        baseline=str(baseline),
        settings=settings,
        host=fingerprint(),
        runners=runners,
        tg=tg,
        pp=pp,
        load_of_others=others.load,
        noise=noise_of(samples, others.load, settings.threads),
    )


class Local:
    """This machine, as a `Device`."""

    def fingerprint(self) -> HostFingerprint:
        """Describe this machine."""
        return fingerprint()

    def measure(
        self,
        artifact: Path,
        settings: Settings,
        *,
        prompts: Sequence[Messages] | None = None,
        progress: Progress | None = None,
    ) -> Measurement:
        """Measure one artifact here; see `measure`."""
        return measure(artifact, settings, prompts=prompts, progress=progress)

    def measure_ratio(
        self, ours: Path, baseline: Path, settings: Settings, *, progress: Progress | None = None
    ) -> RatioMeasurement:
        """Measure one artifact against another here; see `measure_ratio`."""
        return measure_ratio(ours, baseline, settings, progress=progress)


def artifact_size(artifact: Path) -> int:
    """Return the bytes of a ``.gguf`` file or of all files of an ONNX folder; raise UsageError if it is neither."""
    if artifact.is_file() and artifact.suffix == ".gguf":
        return artifact.stat().st_size
    if (artifact / "genai_config.json").is_file():
        return sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    if not artifact.exists():
        raise UsageError(f"{artifact}: no such artifact", "edgedistill build RECIPE, or check the path")
    raise UsageError(
        f"{artifact}: neither a .gguf file nor a folder with genai_config.json (ONNX for onnxruntime-genai)",
        "edgedistill quantize MODEL -t TARGET",
    )


def noise_of(samples: dict[str, Samples], load_of_others: float | None, threads: int) -> tuple[str, ...]:
    """Return the reasons to distrust ``samples``; none means quiet."""
    reasons = [
        f"{name} varies by {sample.spread:.1%} between samples (quiet machines stay under {NOISY_SPREAD:.0%})"
        for name, sample in samples.items()
        if sample.spread > NOISY_SPREAD
    ]
    if load_of_others is not None and load_of_others > NOISY_LOAD:
        reasons.append(f"other processes kept {load_of_others:.1f} cores busy")
    if threads > fingerprint().cores:
        reasons.append(f"{threads} threads shared {fingerprint().cores} cores")
    return tuple(reasons)


class Worker:
    """A process that has one artifact loaded; `edgedistill.devices.worker` is its other end."""

    def __init__(self, artifact: Path, threads: int, *, draft: dict[str, Any] | None = None, kv: Pair = F16) -> None:
        artifact_size(artifact)
        self.artifact, self.threads, self.draft, self.kv = artifact, threads, draft, kv
        self.loaded: dict[str, Any] = {}
        self.cpu_seconds = 0.0
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe would fill up while nobody reads it

    def __enter__(self) -> Worker:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
        self.process = subprocess.Popen(
            bound([sys.executable, "-m", "edgedistill.devices.worker"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            kv = {} if self.kv == F16 else {"kv": self.kv}
            model = str(self.artifact.resolve())
            self.loaded = self.ask("load", path=model, threads=self.threads, draft=self.draft, **kv)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(OSError):  # what a dead process did not read cannot be flushed
                if file:
                    file.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and return its reply. Raises UsageError or StepFailed as the other end does."""
        stdin, stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            died = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise StepFailed(
                f"{self.artifact}: the process that ran it {died} during {do}: {last[:300]}",
                "out of memory, or a library built for another processor: edgedistill doctor",
            )
        reply = json.loads(line)
        if "error" in reply:
            kind = UsageError if reply["usage"] else StepFailed
            raise kind(reply["error"], reply["hint"])
        self.cpu_seconds += reply["cpu_seconds"]
        return reply


@dataclass
class Others:
    """Sum up how long and how hard other processes worked while we were sampling."""

    wall: float = 0.0
    busy: float = 0.0
    known: bool = field(default=True)

    def watch(self, worker: Worker) -> _Watch:
        """Count what happens in a ``with`` block."""
        return _Watch(self, worker)

    @property
    def load(self) -> float | None:
        """Cores that others kept busy, on average."""
        return self.busy / self.wall if self.known and self.wall else None


class _Watch:
    def __init__(self, others: Others, worker: Worker) -> None:
        self.others, self.worker = others, worker

    def __enter__(self) -> None:
        self.start, self.busy, self.ours = time.perf_counter(), busy_seconds(), self.worker.cpu_seconds

    def __exit__(self, *_: object) -> None:
        busy = busy_seconds()
        if busy is None or self.busy is None:
            self.others.known = False
            return
        self.others.wall += time.perf_counter() - self.start
        self.others.busy += busy - self.busy - (self.worker.cpu_seconds - self.ours)


class Steps:
    """Tell how far a measurement is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, note)
        self.done += 1


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # both were asked for as pipes
    return pipe


def ratio_of(ours: list[float], baseline: list[float]) -> Ratio:
    """Return how many times as fast ``ours`` is, paired by place."""
    from edgedistill.evals.statistics import median_ratio

    estimate = median_ratio(ours, baseline, paired=True)
    return Ratio(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        ours=Samples(values=tuple(ours)),
        baseline=Samples(values=tuple(baseline)),
    )
