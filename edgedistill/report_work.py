"""The sheets of what a build took and measured: speeds, drafts, training, quantization, times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.data.verdicts import told
from edgedistill.report import ReportData
from edgedistill.report_cells import count, filled, machine_notes, slashed, text
from edgedistill.tables import Sheet, duration
from edgedistill.target import format_size


def speeds_sheet(data: ReportData) -> Sheet:
    """Lay out speed, latency and memory of what was measured."""
    rows = []
    for model in data.models:
        if (speed := model.speed) is None:
            continue
        first = slashed(speed.ttft_p50_ms, speed.ttft_p95_ms, speed.ttft_p99_ms)
        rows.append(
            [
                model.label,
                format_size(model.size) if model.size else "",
                text(speed.pp, 1),
                text(speed.tg, 1),
                text(speed.ratio, 2),
                first,
                slashed(speed.request_p50_ms, speed.request_p95_ms, speed.request_p99_ms),
                count(speed.requests if first else None),
                format_size(speed.peak_rss) if speed.peak_rss else "",
                f"{speed.bandwidth_share:.0%}" if speed.bandwidth_share is not None else "",
                count(speed.threads),
                slashed(speed.load_before, speed.load_after, speed.load_of_others, digits=1),
            ]
        )
    columns = (
        "model",
        "size",
        "pp512 t/s",
        "tg128 t/s",
        "speed-up",
        "TTFT p50 / p95 / p99 ms",
        "request p50 / p95 / p99 ms",
        "requests",
        "peak RSS",
        "of bandwidth",
        "threads",
        "load",
    )
    notes = (
        ["load: load average before / after, and the cores that other processes kept busy meanwhile"] if rows else []
    )
    return filled(
        Sheet(
            title="speed and memory",
            columns=columns,
            rows=rows,
            right=frozenset(range(1, 12)),
            notes=[*notes, *machine_notes(data)],
        )
    )


def drafts_sheet(data: ReportData) -> Sheet:
    """Lay out what each draft model brings."""
    rows = [
        [
            line.target,
            format_size(line.size),
            str(line.tokens),
            text(line.acceptance),
            count(line.acceptance.n),
            text(line.tokens_per_check, 2),
            text(line.answer, 2),
            text(line.decode, 2),
            count(line.answer.n),
            line.verdict,
            f"not shipped: {line.refused}" if line.refused else "shipped",
        ]
        for line in data.drafts
    ]
    columns = (
        *("target", "draft", "tokens", "kept", "of drafted", "tokens a check", "whole answers", "decode", "prompts"),
        *("verdict", "package"),
    )
    notes = [
        "kept: share of the drafted tokens; whole answers, decode: speed with the draft over that without, turn by turn in one "
        "session; greedy, and token for token the same answers"
    ]
    for line in data.drafts:
        if line.unproved:
            notes.append(f"{line.target}: speeds are unproved: {line.unproved}")
        if line.ties:
            notes.append(f"{line.target}: {line.ties} answers part where two tokens are equal to rounding")
        if line.noise:
            notes.append(f"NOISY {line.target}: {'; '.join(line.noise)}")
    title = "speculative decoding"
    return Sheet(title=title, columns=columns, rows=rows, right=frozenset(range(1, 9)), notes=notes if rows else [])


def caches_sheet(data: ReportData) -> Sheet:
    """Lay out the KV caches that are not f16 anyway: memory, and what they cost where the context is full."""
    rows = [
        [
            line.target,
            line.types,
            ", ".join(f"{format_size(size)} in {name}" for name, size in line.peak_rss.items()),
            count(line.context),
            text(line.kld, 4),
            text(line.rounding, 4),
            count(line.kld.n if line.kld else None),
            text(line.top1, 4),
            count(line.top1.n if line.top1 else None),
        ]
        for line in data.caches
    ]
    columns = ("target", "types", "peak memory", "context", "KLD", "rounding", "rows", "same first choice", "tokens")
    notes = [
        "KLD: nats a token from the same file with an f16 cache, at the end of rows as long as the context; rounding: f16 without "
        "flash attention from f16 with it, which no cache can be told from"
    ]
    return filled(
        Sheet(title="KV cache", columns=columns, rows=rows, right=frozenset(range(3, 9)), notes=notes if rows else [])
    )


def training_sheet(data: ReportData) -> Sheet:
    """Lay out the training steps."""
    rows = []
    for step, found in data.training.items():
        pairs = [
            (x["gradient_kd"], x["gradient_ce"])
            for x in data.curves.get(step, ())
            if x.get("gradient_kd") and x.get("gradient_ce")
        ]
        norms = sorted(kd / ce for kd, ce in pairs)
        rows.append(
            [
                step,
                str(found.get("method", "")),
                str(found.get("dtype", "")),
                count(found.get("steps")),
                f"{found.get('loss', 0):.4f}",
                f"{found['kd']:.4f}" if found.get("kd") else "",
                f"{found['ce']:.4f}" if found.get("ce") else "",
                f"{norms[len(norms) // 2]:.2f} (n = {len(norms)})" if norms else "",
                f"{found.get('trainable_parameters', 0):,}",
                f"{found.get('tokens_per_s', 0):.0f}",
                duration(found.get("seconds")),
                format_size(found.get("peak_memory", 0)),
            ]
        )
    columns = (
        "step",
        "method",
        "dtype",
        "steps",
        "loss",
        "kd",
        "ce",
        "gradient kd/ce",
        "trained weights",
        "tokens/s",
        "time",
        "peak memory",
    )
    notes = [
        "loss, kd, ce: means of the last 10 steps, nats a completion token; gradient kd/ce: median ratio of their norms"
    ]
    if data.yields:
        lines = ", ".join(f"{line['filter']} {line['out']} of {line['in']}" for line in data.yields.get("yields", ()))
        notes.append(
            f"filters: {lines}; kept {data.yields.get('kept')} rows, {data.yields.get('teacher')} by the teacher, "
            f"{data.yields.get('gold')} references"
            + (f", {hedged} hedges" if (hedged := data.yields.get("hedged")) else "")
            + (f", {edited} edited by people" if (edited := data.yields.get("edited")) else "")
        )
        notes += [
            f"{name} answered {found['asked']} prompts that were failed before, {found['good']} of them right"
            for name, found in data.yields.get("recovery", {}).items()
        ]
        if data.yields.get("review"):
            notes.append(f"review: {told(data.yields['review'])}")
    return filled(
        Sheet(title="training", columns=columns, rows=rows, right=frozenset(range(3, 12)), notes=notes if rows else [])
    )


def types_sheet(data: ReportData) -> Sheet:
    """Lay out what quantization made of each file, what fell back to larger types, and what rounding and tuning gained."""
    rows = []
    for step, found in data.fallbacks.items():
        moved = ", ".join(f"{count} x {move}" for move, count in found["moved"].items())
        bpw = [f"{found[key]:.2f}" if found[key] is not None else "" for key in ("bpw", "asked_bpw")]
        notes = [str(found["warning"])] if found["warning"] else []
        if rounding := found.get("rounding"):
            notes.append(
                f"gptq: {rounding['tensors']} matrices rounded by {rounding['tokens']:,} tokens of text; squared error of "
                f"their products {rounding['after']:.2g}, to nearest {rounding['before']:.2g}"
            )
        if tune := found.get("tune"):
            what = "norms"
            if tune.get("parts") == "weights":
                what = f"{tune['matrices']} matrices ({tune['turned']:.1%} of the codes are others) and norms"
            notes.append(
                f"{what} tuned: KLD to the student before rounding {tune['before']:.2g} to {tune['after']:.2g}, on "
                f"{tune['tokens']:,} tokens of {tune['rows']} rows held out"
                + elsewhere(tune)
                + ("" if tune["helped"] else "; that is no help, and the file is as it was")
            )
        rows.append([step, str(found["type"]), *bpw, str(found["tensors"] or ""), moved, "; ".join(notes)])
    columns = ("step", "type", "bpw", "without fallbacks", "tensors", "fell back", "note")
    return filled(Sheet(title="quantization", columns=columns, rows=rows, right=frozenset({2, 3, 4})))


def elsewhere(tune: Mapping[str, Any]) -> str:
    """Say what tuning did to text that is not of the task, where it was looked at."""
    if "elsewhere" not in tune:
        return ""
    before, after = tune["elsewhere"]
    beyond = after > tune["worse"] * before
    return f", and {before:.2g} to {after:.2g} on other text" + (" (too much)" if beyond else "")


def times_sheet(data: ReportData) -> Sheet:
    """Lay out the seconds that each step took when it last ran."""
    rows = [
        [line["step"], duration(line["seconds"]), line["created"]] for line in data.times if line["seconds"] is not None
    ]
    total = sum(line["seconds"] for line in data.times if line["seconds"] is not None)
    ending = [["total", duration(total), ""]] if rows else []
    return Sheet(
        title="time per step",
        columns=("step", "time", "built"),
        rows=rows + ending,
        right=frozenset({1}),
        rules=frozenset({len(rows)}),
    )
