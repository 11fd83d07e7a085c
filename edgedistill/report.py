"""What a build found, read from its entries: models with scores and intervals, speeds, losses, gates, and what they
tell.

``collect`` reads only what exists and is up to date: a partial build gives a partial report, which says what is
missing. It runs nothing and needs no torch. ``tables.py`` prints it, ``report_html.py`` writes the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    from edgedistill.session import Session


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, its 95 % interval and how many samples it is from, as far as they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    method: str = ""

    @classmethod
    def read(cls, data: Any) -> Figure | None:
        """Read an estimate's JSON (or an Estimate); None if there is none."""
        if data is None:
            return None
        if not isinstance(data, Mapping):
            data = data.to_json()
        low, high = (
            None if v is None or not math.isfinite(v) else float(v) for v in (data.get("low"), data.get("high"))
        )
        return cls(value=float(data["value"]), low=low, high=high, n=data.get("n"), method=str(data.get("method", "")))

    def text(self, digits: int = 3, *, n: bool = False) -> str:
        """Write ``0.953 [0.930, 0.969]``, with ``, n = 400`` if asked for."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.value:.{digits}f}{interval}" + (f", n = {self.n}" if n and self.n is not None else "")


@dataclass(frozen=True, kw_only=True)
class SuiteLine:
    """One model on one suite: a score, or a perplexity. ``errors`` counts wrong answers, ``shared`` those that are the
    teacher's.
    """

    metric: str
    score: Figure | None = None
    perplexity: Figure | None = None
    against_base: Figure | None = None  # perplexity over the base model's; unpaired, so the interval is the widest one
    retention: Figure | None = None
    valid: Figure | None = None
    grammar: Figure | None = None
    grammar_gain: Figure | None = None
    functions: dict[str, Figure] = field(default_factory=dict)
    cut: int = 0
    errors: int | None = None
    shared: int | None = None
    engine: str = ""
    hedged: Figure | None = None  # share of rows, where the recipe teaches a hedge
    answered: Figure | None = None  # score of the other rows
    labels: dict[str, Figure] = field(default_factory=dict)
    """Of a suite of labels: ``macro_f1``, and of the labels' probabilities ``error`` (ECE), ``gap``, ``brier`` and ``nll``."""
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)  # precision, recall, f1 and n
    unnamed: int = 0  # answers that are no label
    thinking: dict[str, float] | None = None  # n, share with a block, share of empty ones, median words (evals.suites)
    stances: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """Of metric "stance": what is right (help, refuse, ask) -> what answers do -> their share (evals.stance)."""
    tags: dict[str, dict[str, Figure]] = field(default_factory=dict)
    """The same by tag of the rows, and under "right" the score of these rows."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one artifact does on one machine: tokens/s are medians; ``ratio`` is decode against the teacher's f16 in one
    session.
    """

    pp: Figure
    tg: Figure
    ratio: Figure | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    ttft_p99_ms: float | None
    request_p50_ms: float | None  # to the end of an answer
    request_p95_ms: float | None
    request_p99_ms: float | None
    requests: int
    peak_rss: int | None
    bandwidth_share: float | None
    threads: int | None
    context: int | None
    host: dict[str, Any]
    runner: dict[str, str]
    load_before: float | None  # load averages
    load_after: float | None
    load_of_others: float | None  # cores that other processes kept busy meanwhile
    noise: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One line of the report. ``kind``: teacher, baseline, student or artifact; ``size`` is bytes of the file that
    would ship.
    """

    id: str
    label: str
    kind: str
    type: str
    size: int | None
    shrink: float | None
    suites: dict[str, SuiteLine]
    divergence: dict[str, dict[str, Figure]]
    speed: Speed | None
    calibration: dict[str, Figure] = field(default_factory=dict)
    """On the references of the first scored suite: ``error`` (ECE), ``gap`` (confidence less accuracy), ``nll`` (nats a token)."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one stage cost or brought: ``after`` minus ``before`` on the same rows, so below 0 is a loss."""

    what: str
    before: str
    after: str
    suite: str
    figure: Figure
    noticed: str  # "loss", "gain" or "" where the interval holds 0


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round asked and kept. ``prompts`` are those that were put (online: those that the student failed), ``good`` the
    share of them with an answer that passes the filters; ``right`` is the student's score on all prompts before an online round.
    """

    step: str
    kind: str  # self or online
    prompts: int
    good: Figure | None
    asked: int
    kept: int
    gold: int
    replayed: int
    right: Figure | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Whether what the recipe does helps: the score of its student minus that of another one, paired by row. ``other`` is the id
    of that model, ``keys`` what its arm sets otherwise; ``verdict``: helped, hurt or undecided, by the interval. With ``measure``
    "brier" it is by how much the Brier score of the labels' probabilities is lower: above 0 is better there, too.
    """

    name: str
    other: str
    keys: dict[str, Any]
    suite: str
    figure: Figure
    verdict: str
    measure: str = "score"


@dataclass(frozen=True, kw_only=True)
class DraftLine:
    """What a draft model brings to one target: ratios are of speed with it over without, in one session."""

    target: str
    size: int
    tokens: int
    acceptance: Figure
    tokens_per_check: Figure
    answer: Figure
    decode: Figure
    verdict: str  # of whole answers: "helped", "hurt" or "undecided"
    refused: str  # why it does not ship, or ""
    unproved: str  # why speeds measured here say nothing of the target, or ""
    ties: int
    noise: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CacheLine:
    """The KV cache of one target, where it is not f16 anyway: its types, the peak memory with each that was tried, and how far it
    takes the file from an f16 cache at ``context`` tokens. Without ``kld`` it came out as f16.
    """

    target: str
    types: str
    peak_rss: dict[str, int]
    context: int | None = None
    kld: Figure | None = None
    rounding: Figure | None = None  # f16 without flash attention against f16 with it
    top1: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A symptom that the figures show: what is likely, what mends it, and the recipe key to change."""

    symptom: str
    figure: str
    likely: str
    remedy: str
    key: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that tables and page show."""

    recipe: str
    teacher: str
    student: str
    models: list[Model]
    gates: dict[str, list[dict[str, Any]]]
    shipped: dict[str, bool]
    differences: list[Difference]
    comparisons: list[Comparison]
    curves: dict[str, list[dict[str, float]]]
    learnt: (
        Figure | None
    )  # cross-entropy at the end of the last training, nats a token of text that is like the suites'
    training: dict[str, dict[str, Any]]
    yields: dict[str, Any]
    rounds: list[Round]
    fallbacks: dict[str, dict[str, Any]]
    hops: dict[str, dict[str, Any]]
    times: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    versions: dict[str, str]
    created: str
    missing: list[str]  # steps that are missing though their inputs are there
    waiting: int  # steps that cannot run before those
    warnings: list[str]
    drafts: list[DraftLine] = field(default_factory=list)
    caches: list[CacheLine] = field(default_factory=list)
    temper: dict[str, Any] = field(
        default_factory=dict
    )  # the fitted temperature, before and after (training/temperature.py)
    data: dict[str, Any] = field(default_factory=dict)
    """What was asked, what the filters left of it, whose prompts that is, what it cost (``data_stats.step_figures``)."""
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is not finite becomes null."""
        return _finite(asdict(self))

    @property
    def suites(self) -> list[str]:
        """Names of the suites with a score, in the order of the recipe."""
        return list(dict.fromkeys(name for m in self.models for name, line in m.suites.items() if line.score))

    @property
    def unproved(self) -> list[tuple[str, dict[str, Any]]]:
        """Limits that this machine cannot decide, with their target."""
        return [
            (target, line) for target, lines in self.gates.items() for line in lines if line["status"] == "unproved"
        ]

    @property
    def shipped_anyway(self) -> dict[str, list[str]]:
        """Targets that are packaged though they miss gates, with the names of these."""
        found = {
            target: [line["name"] for line in self.gates.get(target, ()) if line["status"] == "missed"]
            for target, shipped in self.shipped.items()
            if shipped
        }
        return {target: names for target, names in found.items() if names}

    def model(self, name: str) -> Model | None:
        """Return one model by id."""
        return next((model for model in self.models if model.id == name), None)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_html(data: ReportData, path: Path) -> None:
    """Write the report as one self-contained page. Raises UsageError."""
    from edgedistill.report_html import page

    text = page(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})", "give another file: -o FILE.html") from None


def collect(session: Session) -> ReportData:
    """Read a build's entries and what they tell. What does not exist is left out and named in ``missing``."""
    from edgedistill.report_findings import diagnose
    from edgedistill.report_read import read

    data = read(session)
    data.findings.extend(diagnose(data))
    return data


def gate_lines(session: Session) -> list[tuple[str, dict[str, Any]]]:
    """Return every gate of every target that can be decided, as (target, line)."""
    from edgedistill.report_read import read_gates

    return read_gates(session)
