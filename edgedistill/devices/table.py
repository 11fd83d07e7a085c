"""Measurements as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgedistill.kv_cache import told
from edgedistill.target import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from edgedistill.devices.protocol import Latencies, Measurement, Samples


def bench_table(measurements: Sequence[Measurement]) -> Table:
    """Lay measurements out as a table, one artifact a row, with machine, builds, sample counts and noise below it."""
    from rich.table import Table

    table = Table(title="speed and memory", caption="\n".join(_notes(measurements)), caption_justify="left")
    table.add_column("artifact", overflow="fold")
    settings = measurements[0].settings if measurements else None
    pp, tg = (settings.pp, settings.tg) if settings else (512, 128)
    speeds = (f"pp{pp} t/s", f"tg{tg} t/s", "bandwidth")
    for heading in ("size", *speeds, "TTFT p50/p95/p99", "request p50/p95/p99", "peak RSS", "load"):
        table.add_column(heading, justify="right")
    for one in measurements:
        table.add_row(
            Path(one.artifact).name + (" [yellow](noisy)[/]" if one.noisy else ""),
            format_size(one.file_size),
            _speed(one.pp),
            _speed(one.tg),
            f"{'' if one.bytes_exact else '≤ '}{one.bandwidth_share:.0%}",
            _latency(one.ttft),
            _latency(one.request),
            format_size(one.peak_rss),
            f"{one.load_seconds:.2f} s",
        )
    return table


def told_load(before: float | None, after: float | None, others: float | None) -> str:
    """Say how busy a machine was: load average before and after, and cores that other processes kept busy meanwhile."""
    average = "unknown" if before is None or after is None else f"{before:.1f} before, {after:.1f} after"
    return f"load average {average}, " + (
        "others unknown" if others is None else f"others kept {others:.1f} cores busy"
    )


def told_runner(runner: Mapping[str, str]) -> str:
    """Name the build of the library that ran a model."""
    return f"{runner['version']}, {runner['commit']}: {runner['build']}"


def _speed(samples: Samples) -> str:
    low, high = samples.interval
    return f"{samples.median:.1f} [{low:.1f}, {high:.1f}]"


def _latency(latencies: Latencies | None) -> str:
    if latencies is None:
        return "-"
    return f"{latencies.p50:.0f}/{latencies.p95:.0f}/{latencies.p99:.0f} ms (n = {latencies.n})"


def _notes(measurements: Sequence[Measurement]) -> list[str]:
    notes: list[str] = []
    for one in measurements:
        host, settings = one.host, one.settings
        notes += [
            f"{host.cpu}, {host.cores} cores, {format_size(host.memory_bytes)}; {settings.threads} threads read "
            f"{one.bandwidth / 1e9:.1f} GB/s; context {settings.context}, KV cache in {told(settings.kv)}",
            f"medians of {one.tg.n} with 95 % intervals; batch 2048/512 as in llama-bench",
            told_runner(one.runner),
        ]
        load = told_load(one.load_before, one.load_after, one.load_of_others)
        notes.append(f"{Path(one.artifact).name}: {load}")
        if one.noisy:
            notes.append(f"{Path(one.artifact).name}: NOISY: {'; '.join(one.noise)}")
    return list(dict.fromkeys(notes))
