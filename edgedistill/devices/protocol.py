"""What every device can do, and what it hands back: settings in, samples with their spread and their noise out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edgedistill.devices.host import HostFingerprint
from edgedistill.kv_cache import F16, Pair

Progress = Callable[[int, int, str], None]
Messages = list[dict[str, Any]]

# llama-bench's defaults, of which no target may choose others: a speed is then one that anybody can check.
BATCH, MICRO_BATCH = 2048, 512

# Above these a measurement is called noisy: spread of the samples, and cores' worth of work by other processes.
NOISY_SPREAD, NOISY_LOAD = 0.05, 0.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure. ``pp``, ``tg``, ``reps`` are llama-bench's -p, -n, -r, ``kv`` its -ctk and -ctv; ``context`` is for chat and
    memory.
    """

    threads: int
    context: int = 2048
    pp: int = 512
    tg: int = 128
    reps: int = 5
    warmup: bool = True
    ttft_prompts: int = 16
    answer_tokens: int = 32
    kv: Pair = F16

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, llama-bench's fixed batch sizes included; ``kv`` where it is not f16."""
        value = {**asdict(self), "batch": BATCH, "micro_batch": MICRO_BATCH}
        if self.kv == F16:
            del value["kv"]
        return value

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """Read what `to_json` wrote."""
        known = {key: value for key, value in data.items() if key not in ("batch", "micro_batch")}
        return cls(**{**known, "kv": tuple(known.get("kv", F16))})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Repeated measurements of one speed in tokens/s, in the order taken, none left out."""

    values: tuple[float, ...]
    unit: str = "tokens/s"

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean, which llama-bench prints."""
        return sum(self.values) / self.n

    @property
    def median(self) -> float:
        """Median: the number that gates use."""
        return percentile(self.values, 0.5)

    @property
    def sd(self) -> float:
        """Sample standard deviation; 0 for a single sample."""
        if self.n < 2:
            return 0.0
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (self.n - 1))

    @property
    def spread(self) -> float:
        """Coefficient of variation: standard deviation over mean."""
        return self.sd / self.mean

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the median."""
        from edgedistill.evals.statistics import median

        estimate = median(self.values)
        return estimate.low, estimate.high

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict: the samples and what is printed of them."""
        return {
            "unit": self.unit, "n": self.n, "median": self.median, "mean": self.mean, "sd": self.sd,
            "interval": list(self.interval), "values": list(self.values),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Samples:
        """Read what `to_json` wrote."""
        return cls(values=tuple(data["values"]), unit=data["unit"])


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Milliseconds per request over real prompts. With n below 100, P99 is close to the slowest request."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of requests."""
        return len(self.values)

    @property
    def p50(self) -> float:
        """Median request."""
        return percentile(self.values, 0.50)

    @property
    def p95(self) -> float:
        """95th percentile."""
        return percentile(self.values, 0.95)

    @property
    def p99(self) -> float:
        """99th percentile."""
        return percentile(self.values, 0.99)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "unit": "ms", "n": self.n, "p50": self.p50, "p95": self.p95, "p99": self.p99, "values": list(self.values),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Latencies:
        """Read what `to_json` wrote."""
        return cls(values=tuple(data["values"]))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed, memory and time to first token of one artifact on one device, and what is needed to judge them."""

    artifact: str
    format: str
    file_size: int
    settings: Settings
    host: HostFingerprint
    runner: dict[str, str]  # engine, version, commit, build
    pp: Samples
    tg: Samples
    ttft: Latencies | None  # from the messages to the first token: template, tokenizer, prompt, choice
    request: Latencies | None  # to the last of `answer_tokens` tokens, or to the end of turn
    prompt_tokens: tuple[int, ...]
    peak_rss: int  # bytes, of the process that runs the model, with `context` tokens of KV cache
    runner_rss: int  # bytes of that process before it loads the model: Python and the libraries
    load_seconds: float
    bytes_per_token: int  # weights read for one generated token
    bytes_exact: bool  # False: an upper bound that counts the whole embedding table, of which a token reads one row
    bandwidth: float  # bytes/s that `threads` threads read from this machine's memory, best of several
    load_before: float | None
    load_after: float | None
    load_of_others: float | None  # cores kept busy by other processes while the samples were taken
    noise: tuple[str, ...] = field(default=())

    @property
    def noisy(self) -> bool:
        """Whether the numbers are not to be trusted; ``noise`` says why. Such are shown and never cached."""
        return bool(self.noise)

    @property
    def bandwidth_share(self) -> float:
        """Share of the memory bandwidth that generating uses: near 1, only a smaller file makes it faster."""
        return self.tg.median * self.bytes_per_token / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for entries, manifests and ``--json``."""
        return {
            "artifact": self.artifact, "format": self.format, "file_size": self.file_size,
            "settings": self.settings.to_json(), "host": self.host.to_json(), "runner": dict(self.runner),
            "pp": self.pp.to_json(), "tg": self.tg.to_json(),
            "ttft_ms": self.ttft.to_json() if self.ttft else None,
            "request_ms": self.request.to_json() if self.request else None,
            "prompt_tokens": list(self.prompt_tokens),
            "peak_rss": self.peak_rss, "runner_rss": self.runner_rss, "load_seconds": self.load_seconds,
            "bytes_per_token": self.bytes_per_token, "bytes_exact": self.bytes_exact,
            "bandwidth": self.bandwidth, "bandwidth_share": self.bandwidth_share,
            "load_before": self.load_before, "load_after": self.load_after, "load_of_others": self.load_of_others,
            "noisy": self.noisy, "noise": list(self.noise),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        plain = (
            "artifact", "format", "file_size", "runner", "peak_rss", "runner_rss", "load_seconds", "bytes_per_token",
            "bytes_exact", "bandwidth", "load_before", "load_after", "load_of_others",
        )  # fmt: skip
        return cls(
            **{key: data[key] for key in plain},
            settings=Settings.from_json(data["settings"]),
            host=HostFingerprint.from_json(data["host"]),
            pp=Samples.from_json(data["pp"]),
            tg=Samples.from_json(data["tg"]),
            ttft=Latencies.from_json(data["ttft_ms"]) if data["ttft_ms"] else None,
            request=Latencies.from_json(data["request_ms"]) if data["request_ms"] else None,
            prompt_tokens=tuple(data["prompt_tokens"]),
            noise=tuple(data["noise"]),
        )


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as the baseline: median over pairs of neighbours in time, with its 95 % interval."""

    value: float
    low: float
    high: float
    ours: Samples
    baseline: Samples

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "value": self.value, "low": self.low, "high": self.high, "n": self.ours.n,
            "ours": self.ours.to_json(), "baseline": self.baseline.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ratio:
        """Read what `to_json` wrote."""
        ours, baseline = Samples.from_json(data["ours"]), Samples.from_json(data["baseline"])
        return cls(value=data["value"], low=data["low"], high=data["high"], ours=ours, baseline=baseline)


@dataclass(frozen=True, kw_only=True)
class RatioMeasurement:
    """Two artifacts measured turn by turn in one session on one device, both loaded all the time."""

    ours: str
    baseline: str
    settings: Settings
    host: HostFingerprint
    runners: tuple[dict[str, str], dict[str, str]]
    tg: Ratio
    pp: Ratio
    load_of_others: float | None
    noise: tuple[str, ...] = field(default=())

    @property
    def noisy(self) -> bool:
        """Whether the ratios are not to be trusted; ``noise`` says why."""
        return bool(self.noise)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "ours": self.ours, "baseline": self.baseline, "settings": self.settings.to_json(),
            "host": self.host.to_json(), "runners": [dict(runner) for runner in self.runners],
            "tg": self.tg.to_json(), "pp": self.pp.to_json(), "load_of_others": self.load_of_others,
            "noisy": self.noisy, "noise": list(self.noise),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RatioMeasurement:
        """Read what `to_json` wrote."""
        return cls(
            ours=data["ours"],
            baseline=data["baseline"],
            settings=Settings.from_json(data["settings"]),
            host=HostFingerprint.from_json(data["host"]),
            runners=(data["runners"][0], data["runners"][1]),
            tg=Ratio.from_json(data["tg"]),
            pp=Ratio.from_json(data["pp"]),
            load_of_others=data["load_of_others"],
            noise=tuple(data["noise"]),
        )


class Device(Protocol):
    """One board that runs artifacts. Every method raises `StepFailed` when the runner on it fails."""

    def fingerprint(self) -> HostFingerprint:
        """Describe the board."""
        ...

    def measure(
        self,
        artifact: Path,
        settings: Settings,
        *,
        prompts: Sequence[Messages] | None = None,
        progress: Progress | None = None,
    ) -> Measurement:
        """Measure one artifact: a ``.gguf`` file, or an ONNX folder with ``genai_config.json``."""
        ...

    def measure_ratio(
        self, ours: Path, baseline: Path, settings: Settings, *, progress: Progress | None = None
    ) -> RatioMeasurement:
        """Measure ``ours`` against ``baseline`` in one session, turn by turn."""
        ...


class Measured(Protocol):
    """Something measured that knows why it is not to be trusted."""

    @property
    def noise(self) -> tuple[str, ...]:
        """The reasons; none means quiet."""
        ...


_Measured = TypeVar("_Measured", bound=Measured)


def again_if_noisy(take: Callable[[], _Measured], note: Callable[[str], None]) -> _Measured:
    """Measure; once more where the machine was noisy. The second stands whatever it says: to choose would flatter."""
    found = take()
    if found.noise:
        note("the machine is noisy; measuring again")
        found = take()
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie, interpolated linearly (numpy's default)."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
