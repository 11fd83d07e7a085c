"""Gates: a pure function from what was measured to what may ship.

A line is *green*, *missed* or *unproved*. A limit on speed, memory or time to first token that was measured on a
machine which is not the target says nothing of the target: it is shown, and never green (DESIGN.md, "Devices and
proof"). The size of a file is the same everywhere and always counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedistill.target import format_size

SPEEDS = ("speedup", "pp512", "tg128", "ttft_p95_ms")
SIZES = ("shrink", "file_size", "peak_rss")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One gate: what it is called, the bound, what was found, and "green", "missed" or "unproved"."""

    name: str
    bound: float
    found: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    at_least: bool = True
    status: str = "green"
    why: str = ""

    def text(self) -> str:
        """Write the line for an error message or a log."""
        found = "not measured" if self.found is None else f"{self.found:.4g}"
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        sample = "" if self.n is None else f", n = {self.n}"
        sign = ">=" if self.at_least else "<="
        return f"{self.name} {found}{interval}{sample}, wanted {sign} {self.bound:.4g}"


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All lines of one target."""

    lines: tuple[Line, ...]

    @property
    def missed(self) -> list[Line]:
        """Lines that keep the artifact from shipping."""
        return [line for line in self.lines if line.status == "missed"]

    @property
    def unproved(self) -> list[Line]:
        """Lines that this machine cannot decide."""
        return [line for line in self.lines if line.status == "unproved"]

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain dictionaries."""
        return [asdict(line) for line in self.lines]


def check_gates(
    *,
    gates: Mapping[str, Any],
    limits: Mapping[str, Any],
    size: int,
    reference_size: int | None,
    evaluation: Path,
    measurement: Mapping[str, Any],
    teacher: Path,
    student: Path | None,
    unproved: str,
    kv_cache: Mapping[str, Any] | None = None,
) -> GateReport:
    """Compare measurements with gates and limits.

    ``evaluation``, ``teacher`` and ``student`` are folders that ``evaluate`` wrote: their per-row answers make the
    paired intervals. ``unproved`` says why this machine is not the target ("" if it is). ``kv_cache`` is what the step of that name
    found, where the target's cache may be another one than f16."""
    from edgedistill.evals.statistics import paired_difference, retention
    from edgedistill.evals.suites import load_scores

    lines: list[Line] = []
    for suite, bound in gates.get("min_retention", {}).items():
        found = retention(load_scores(evaluation, suite), load_scores(teacher, suite))
        lines.append(
            Line(
                name=f"retention {suite}",
                bound=bound,
                found=found.value,
                low=found.low,
                high=found.high,
                n=found.n,
                status="green" if found.low >= bound else "missed",
                why="lower bound of the 95 % interval counts",
            )
        )
    for suite, bound in gates.get("max_drop", {}).items() if student else ():
        assert student is not None
        found = paired_difference(load_scores(student, suite), load_scores(evaluation, suite))
        lines.append(
            Line(
                name=f"drop {suite}",
                bound=bound,
                found=found.value,
                low=found.low,
                high=found.high,
                n=found.n,
                at_least=False,
                status="green" if found.value <= bound else "missed",
            )
        )
    if (bound := gates.get("min_shrink")) is not None and reference_size:
        shrink = reference_size / size
        lines.append(Line(name="shrink", bound=bound, found=shrink, status="green" if shrink >= bound else "missed"))
    beside = measurement.get("ratio", {})
    ratio = beside.get("tg", {})
    if (bound := gates.get("min_speedup")) is not None:
        found_ratio = ratio.get("value")
        status = "missed" if found_ratio is None or found_ratio < bound else "green"
        lines.append(
            Line(
                name="speedup",
                bound=bound,
                found=found_ratio,
                low=ratio.get("low"),
                high=ratio.get("high"),
                n=ratio.get("n"),
                status=status,
                why="decode against the teacher's f16, one session on this machine" + _noise(beside),
            )
        )
    if (bound := gates.get("max_kv_kld")) is not None and kv_cache:
        # The types may have come out as f16, which costs nothing and is not measured.
        kld = kv_cache.get("kld") or {"value": 0.0, "low": 0.0, "high": 0.0, "n": None}
        lines.append(
            Line(
                name="kv_kld",
                bound=bound,
                found=kld["value"],
                low=kld["low"],
                high=kld["high"],
                n=kld["n"],
                at_least=False,
                status="green" if kld["high"] <= bound else "missed",
                why="upper bound of the 95 % interval counts",
            )
        )
    lines += _limits(limits, size, measurement.get("measurement", {}), unproved)
    return GateReport(lines=tuple(lines))


def _noise(measured: Mapping[str, Any]) -> str:
    return f"; a noisy one: {'; '.join(measured['noise'])}" if measured.get("noise") else ""


def miss_hint(missed: Iterable[Line], measurement: Mapping[str, Any]) -> str:
    """Return what to do about missed lines: a speed that a noisy machine gave is taken again first."""
    names = {line.name.split()[0] for line in missed}
    noisy = any(measurement.get(part, {}).get("noise") for part in ("measurement", "ratio"))
    first = (
        "the machine was noisy: edgedistill build --remeasure once it is quiet; else "
        if noisy and names & {*SPEEDS}
        else ""
    )
    remedies = {
        "train longer or take a larger type": names - {*SPEEDS, *SIZES, "kv_kld"},
        "take a student of fewer layers, or a type that is faster here (edgedistill targets kernels -o FILE.json)": names
        & {*SPEEDS},
        "take a smaller type or a smaller student": names & {*SIZES},
        "give the target's runtime.kv_cache more bits": names & {"kv_kld"},
    }
    told = ", ".join(remedy for remedy, of in remedies.items() if of)
    return f"{first}{told}; --ship-anyway packages it and records the miss"


def draft_refused(drafting: Mapping[str, Any], limits: Mapping[str, Any], size: int) -> str:
    """Say why a draft does not ship beside its model, "" if it does: it must bring something, and both must fit the target.

    ``drafting`` is what was measured, ``size`` the bytes of both files. Memory is judged by this machine, whatever the target is:
    a draft can always be left out.
    """
    answer = drafting["answer"]
    bounds = f"{answer['value']:.2f}x [{answer['low']:.2f}, {answer['high']:.2f}], n = {answer['n']}"
    if drafting["verdict"] == "hurt":
        return f"answers come later with it: {bounds}"
    if drafting["verdict"] == "undecided":
        return f"answers come no sooner with it, as far as can be told: {bounds}"
    found = {"file_size": ("files have", size), "peak_rss": ("process takes", drafting["peak_rss"])}
    for name, (what, value) in found.items():
        if (bound := limits.get(name)) is not None and value > bound:
            return f"with it the {what} {format_size(value)}, and limits.{name} is {format_size(bound)}"
    return ""


def _limits(limits: Mapping[str, Any], size: int, measured: Mapping[str, Any], unproved: str) -> list[Line]:
    """Check a target's limits; those that depend on the machine are unproved where the machine is not the target."""
    lines = []
    if (bound := limits.get("file_size")) is not None:
        lines.append(_line("file_size", bound, float(size), at_least=False, unproved=""))
    found = {
        "peak_rss": measured.get("peak_rss"),
        "pp512": (measured.get("pp") or {}).get("median"),
        "tg128": (measured.get("tg") or {}).get("median"),
        "ttft_p95_ms": (measured.get("ttft_ms") or {}).get("p95"),
    }
    for name, value in found.items():
        if (bound := limits.get(name)) is not None:
            lines.append(_line(name, bound, value, at_least=name in ("pp512", "tg128"), unproved=unproved))
    return lines


def _line(name: str, bound: float, found: float | None, *, at_least: bool, unproved: str) -> Line:
    ok = found is not None and (found >= bound if at_least else found <= bound)
    status = "unproved" if unproved else "green" if ok else "missed"
    return Line(name=name, bound=bound, found=found, at_least=at_least, status=status, why=unproved)
