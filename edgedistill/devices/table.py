"""Measurements as people read them."""

from __future__ import annotations

from collections.abc import Sequence
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
        loads = [
            f"load average {one.load_before:.1f} before, {one.load_after:.1f} after"
            if one.load_before is not None and one.load_after is not None
            else "load average unknown",
            "others unknown" if one.load_of_others is None else f"others kept {one.load_of_others:.1f} cores busy",
        ]
        notes += [
            f"{host.cpu}, {host.cores} cores, {format_size(host.memory_bytes)}; {settings.threads} threads read "
            f"{one.bandwidth / 1e9:.1f} GB/s; context {settings.context}, KV cache in {told(settings.kv)}",
            f"medians of {one.tg.n} with 95 % intervals; batch 2048/512 as in llama-bench",
            f"{one.runner['version']}, {one.runner['commit']}: {one.runner['build']}",
        ]
        notes.append(f"{Path(one.artifact).name}: {', '.join(loads)}")
        if one.noisy:
            notes.append(f"{Path(one.artifact).name}: NOISY: {'; '.join(one.noise)}")
    return list(dict.fromkeys(notes))
