"""What a report takes from single entries: a training log, what became of tensors, how a change of format was checked, speeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedistill.kv_cache import told
from edgedistill.report import CacheLine, Figure, Speed
from edgedistill.store import Entry

CURVE_POINTS = 400  # lines of a training log that are kept: more than a plot has pixels
CURVE_KEYS = (
    *("step", "eased", "loss", "kd", "ce", "hidden", "features", "distances", "angles"),
    *("gradient", "gradient_kd", "gradient_ce", "gradient_features"),
    *("lr", "tokens_per_s", "seconds"),
)


def curve(path: Path) -> list[dict[str, float]]:
    """Read a training log, thinned evenly to ``CURVE_POINTS`` lines; the last step is always kept."""
    if not path.is_file():
        return []
    with path.open() as file:
        lines = [{key: row[key] for key in CURVE_KEYS if key in row} for row in map(json.loads, file)]
    every = max(1, math.ceil(len(lines) / CURVE_POINTS))
    return [line for number, line in enumerate(lines) if number % every == 0 or number == len(lines) - 1]


def fallbacks(entries: Mapping[str, Entry | None]) -> dict[str, dict[str, Any]]:
    """Return what quantizing and tuning did to the tensors, by step: the type asked for, and which tensors have another."""
    found = {}
    for name, entry in entries.items():
        report = entry.facts.get("quantize") if entry else None
        if report:
            moved: dict[str, int] = {}
            for tensor in report.get("tensors", ()):
                if tensor["asked"] != tensor["got"]:
                    move = f"{tensor['asked']} to {tensor['got']}"
                    moved[move] = moved.get(move, 0) + 1
            fields = ("type", "bpw", "asked_bpw", "size", "warning", "imatrix_entries", "rounding")
            kept = {key: report.get(key) for key in fields}
            found[name] = {**kept, "moved": moved, "tensors": len(report.get("tensors", ()))}
        elif entry and "tune" in entry.facts:
            tune = entry.facts["tune"]
            found[name] = {"type": "", "bpw": None, "asked_bpw": None, "warning": None, "moved": {}, "tune": tune}
            found[name]["tensors"] = tune["norms"] + tune.get("matrices", 0)
    return found


def caches(entries: Mapping[str, Entry | None]) -> list[CacheLine]:
    """Return what the KV caches of targets cost, from the entries of ``kv-cache`` by target."""
    found = []
    for target, entry in entries.items():
        if entry:
            facts = entry.facts["kv_cache"]
            line = CacheLine(
                target=target,
                types=told((facts["k"], facts["v"])),
                peak_rss=facts["peak_rss"],
                context=facts.get("context"),
                **{name: Figure.read(facts.get(name)) for name in ("kld", "rounding", "top1")},
            )
            found.append(line)
    return found


def hops(entries: Mapping[str, Entry | None]) -> dict[str, dict[str, Any]]:
    """Return what each change of format was checked by: the scalar figures of its report."""
    found = {}
    for name, entry in entries.items():
        report = (entry.facts.get("hop") or entry.facts.get("merge")) if entry else None
        if isinstance(report, Mapping):
            found[name] = {key: value for key, value in report.items() if isinstance(value, int | float | str)}
    return found


def speed(facts: Mapping[str, Any]) -> Speed | None:
    """Read what a step measured of one file; None where it measured nothing."""
    found = facts.get("measurement")
    if not found:
        return None
    ttft, request, settings = found.get("ttft_ms") or {}, found.get("request_ms") or {}, found.get("settings", {})
    return Speed(
        pp=_median(found["pp"]),
        tg=_median(found["tg"]),
        ratio=Figure.read((facts.get("ratio") or {}).get("tg")),
        ttft_p50_ms=ttft.get("p50"),
        ttft_p95_ms=ttft.get("p95"),
        ttft_p99_ms=ttft.get("p99"),
        request_p50_ms=request.get("p50"),
        request_p95_ms=request.get("p95"),
        request_p99_ms=request.get("p99"),
        requests=int(ttft.get("n", 0)),
        peak_rss=found.get("peak_rss"),
        bandwidth_share=found.get("bandwidth_share"),
        threads=settings.get("threads"),
        context=settings.get("context"),
        host=dict(found.get("host", {})),
        runner={key: str(value) for key, value in found.get("runner", {}).items()},
        load_before=found.get("load_before"),
        load_after=found.get("load_after"),
        load_of_others=found.get("load_of_others"),
        noise=tuple(found.get("noise", ())) + tuple((facts.get("ratio") or {}).get("noise", ())),
    )


def _median(samples: Mapping[str, Any]) -> Figure:
    low, high = samples.get("interval") or (None, None)
    return Figure(value=samples["median"], low=low, high=high, n=samples["n"], method="median")


def stances(facts: Mapping[str, Any]) -> tuple[dict[str, dict[str, Figure]], dict[str, dict[str, Figure]]]:
    """Return how often answers to a suite help, refuse and ask back, by what is right and by tag; nothing where that was not
    judged.
    """
    found = facts.get("stances") or {"wanted": {}, "tags": {}}

    def read(shares: Mapping[str, Any]) -> dict[str, Figure]:
        return {name: figure for name, share in shares.items() if (figure := Figure.read(share))}

    tags = {tag: read({**shares, "right": facts["by_tag"].get(tag)}) for tag, shares in found["tags"].items()}
    return {name: read(shares) for name, shares in found["wanted"].items()}, tags
