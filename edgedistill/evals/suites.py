"""Evaluate a runner on a suite, keep every answer, and compare two evaluations row by row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from edgedistill.data.prompts import Row, rows_digest
from edgedistill.data.thinking import LEAST_WORDS
from edgedistill.errors import UsageError
from edgedistill.evals import likelihood, stance, statistics
from edgedistill.evals.labels import DIGITS, label_figures, label_probabilities
from edgedistill.evals.metrics import Metric, find_metric
from edgedistill.evals.parts import answer_in_parts
from edgedistill.evals.runners.base import Progress, Runner
from edgedistill.evals.statistics import Estimate

ANSWERS, RESULT = "answers.jsonl", "result.json"
WHOLE_TRACES = "whole traces"  # in the table of tags; n is the number of traces


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """Hold one row's answer and score. For a likelihood: no text, ``score`` is the nll's sum, ``tokens`` its count."""

    id: str
    text: str
    reference: str
    score: float
    valid: bool | None
    tags: tuple[str, ...]
    tokens: int
    finish: str
    seconds: float = field(default=0.0, compare=False)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict without the time: the same answers are the same bytes."""
        return {**{key: value for key, value in self.__dict__.items() if key != "seconds"}, "tags": list(self.tags)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RowResult:
        """Read what ``to_json`` wrote."""
        return cls(**{**data, "tags": tuple(data["tags"])})


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """Hold the evaluation of one model on one suite: the score with its interval, tables, and every answer."""

    metric: str
    score: Estimate
    valid_json: Estimate | None
    by_tag: dict[str, Estimate]
    by_function: dict[str, Estimate]
    tokens: int
    seconds: float
    max_new_tokens: int
    cut: int  # answers that hit max_new_tokens or the context
    grammar: str | None  # digest of the GBNF text
    runner: dict[str, Any]
    suite: str  # digest of the rows
    rows: tuple[RowResult, ...]
    thinking: dict[str, Any] | None = None  # of answers that may think first: see _thinking
    labels: dict[str, Any] | None = None  # of a suite of labels: see labels.label_figures
    stances: dict[str, Any] | None = None  # of metric "stance": see evals/stance.py

    @property
    def n(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def summary(self) -> dict[str, Any]:
        """Return a plain dict without the rows."""
        out: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k != "rows"}
        for name in ("thinking", "labels", "stances"):
            if out[name] is None:
                del out[name]
        out["n"] = self.n
        out["score"] = self.score.to_json()
        out["valid_json"] = self.valid_json.to_json() if self.valid_json else None
        for table in ("by_tag", "by_function"):
            out[table] = {name: estimate.to_json() for name, estimate in getattr(self, table).items()}
        return out

    def save_answers(self, path: Path) -> None:
        """Write the rows as JSONL, one a line."""
        with path.open("w", encoding="utf-8") as file:
            for row in self.rows:
                # ASCII: an answer may hold half of a surrogate pair, or characters that some readers split lines at.
                file.write(json.dumps(row.to_json()) + "\n")

    def save(self, folder: Path) -> None:
        """Write ``answers.jsonl`` and ``result.json`` (the summary) into an existing folder."""
        self.save_answers(folder / ANSWERS)
        (folder / RESULT).write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SuiteResult:
        """Read what ``save`` wrote. Raises UsageError where it is missing or damaged."""
        try:
            data = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            rows = tuple(load_answers(folder / ANSWERS))
            if data.pop("n") != len(rows):
                raise ValueError("rows are missing")
            data["score"] = Estimate.from_json(data["score"])
            data["valid_json"] = Estimate.from_json(data["valid_json"]) if data["valid_json"] else None
            for table in ("by_tag", "by_function"):
                data[table] = {name: Estimate.from_json(entry) for name, entry in data[table].items()}
            return cls(**data, rows=rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder}: not a readable evaluation: {error}", "Evaluate again.") from None


def load_answers(path: Path) -> list[RowResult]:
    """Read what ``save_answers`` wrote. Raises UsageError where it is missing or damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            return [RowResult.from_json(json.loads(line)) for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not readable as answers: {error}", "Evaluate again.") from None


def load_scores(folder: Path, suite: str) -> list[float]:
    """Return the per-row scores in ``folder/answers/<suite>.jsonl``, in the order of the row ids: two lists pair up."""
    rows = load_answers(folder / "answers" / f"{suite}.jsonl")
    return [row.score for row in sorted(rows, key=lambda row: row.id)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold a paired comparison of a with b on one suite.

    ``difference`` is a - b (perplexity: of nll per token). ``retention`` is a / b, None for a likelihood or where b
    scores 0.
    """

    metric: str
    n: int
    a: Estimate
    b: Estimate
    difference: Estimate
    retention: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "metric": self.metric,
            "n": self.n,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "difference": self.difference.to_json(),
            "retention": self.retention.to_json() if self.retention else None,
        }


def evaluate(
    runner: Runner,
    rows: Sequence[Row],
    metric: Metric | str,
    *,
    max_new_tokens: int = 128,
    grammar: str | None = None,
    labels: Sequence[str] = (),
    sure: bool = True,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Answer the rows greedily and score the answers; or measure the references' perplexity, for a likelihood metric.

    ``grammar`` is GBNF text. With ``labels`` (the metric "label") their probabilities are taken, too, unless the runner cannot
    give any (``sure`` false), and what they are stands in the details of each row. Answers are kept beside ``kept`` as they come,
    and found there again (``parts.py``). Raises UsageError for rows without a reference
    and for references that the metric cannot read, before anything is decoded.
    """
    metric = find_metric(metric) if isinstance(metric, str) else metric
    if not rows:
        raise UsageError("a suite needs rows", "Name a file with rows that have references.")
    references = [_reference(row, metric) for row in rows]
    common: dict[str, Any] = {"metric": metric.name, "runner": runner.describe(), "suite": rows_digest(rows)}
    if metric.kind == "likelihood":
        if grammar is not None:
            raise UsageError(f"{metric.name} decodes nothing, so a grammar changes nothing", "Leave the grammar out.")
        return _likelihood(runner, rows, progress, common)

    answers = answer_in_parts(
        runner, rows, max_new_tokens=max_new_tokens, grammar=grammar, kept=kept, progress=progress
    )
    results = []
    probabilities = label_probabilities(runner, rows, labels, progress=progress) if labels and sure else None
    scores = metric.score_all(
        (row.id, (answer.text, reference, row.problem))
        for row, reference, answer in zip(rows, references, answers, strict=True)
    )
    more: list[dict[str, Any]] = [{} for _ in rows]
    if probabilities is not None:
        more = [{"probabilities": [round(one, DIGITS) for one in found]} for found in probabilities.tolist()]
    for row, reference, answer, score, further in zip(rows, references, answers, scores, more, strict=True):
        results.append(
            RowResult(
                id=row.id,
                text=answer.text,
                reference=reference,
                score=score.value,
                valid=score.details.get("valid_json"),
                tags=row.tags,
                tokens=answer.tokens,
                seconds=answer.seconds,
                finish=answer.finish,
                details={**{key: value for key, value in score.details.items() if key != "valid_json"}, **further},
            )
        )
    tags = {tag: [r.score for r in results if tag in r.tags] for tag in sorted({t for r in results for t in r.tags})}
    if whole := _whole_traces(rows, results):
        tags[WHOLE_TRACES] = whole
    functions: dict[str, list[float]] = {}
    for result in results:
        if isinstance(name := result.details.get("function"), str):
            functions.setdefault(name, []).append(result.score)
    valid = [float(r.valid) for r in results if r.valid is not None]
    return SuiteResult(
        **common,
        score=statistics.mean([r.score for r in results]),
        valid_json=statistics.mean(valid) if valid else None,
        by_tag={tag: statistics.mean(scores) for tag, scores in tags.items()},
        by_function={name: statistics.mean(scores) for name, scores in sorted(functions.items())},
        tokens=sum(r.tokens for r in results),
        seconds=sum(r.seconds for r in results),
        max_new_tokens=max_new_tokens,
        cut=sum(r.finish != "stop" for r in results),
        grammar=hashlib.sha256(grammar.encode()).hexdigest() if grammar is not None else None,
        rows=tuple(results),
        thinking=_thinking(results),
        labels=label_figures(labels, references, [answer.text for answer in answers], probabilities)
        if labels
        else None,
        stances=_stances(results),
    )


def _whole_traces(rows: Sequence[Row], results: Sequence[RowResult]) -> list[float]:
    """Return 1 for each trace of which every turn is right, after what was recorded before it, else the worst turn's score."""
    worst: dict[str, float] = {}
    for row, result in zip(rows, results, strict=True):
        if row.trace is not None:
            worst[row.trace] = min(result.score, worst.get(row.trace, 1.0))
    return list(worst.values())


def _thinking(results: Sequence[RowResult]) -> dict[str, Any] | None:
    """Return how much was thought: rows, the share with a block, the share of empty ones among these, median words."""
    words = [result.details["thinking_words"] for result in results if "thinking_words" in result.details]
    if not words:
        return None
    blocks = [one for one in words if one is not None]
    return {
        "n": len(words),
        "blocks": len(blocks) / len(words),
        "empty": sum(one < LEAST_WORDS for one in blocks) / len(blocks) if blocks else 0.0,
        "median_words": median(blocks) if blocks else 0,
    }


def _stances(results: Sequence[RowResult]) -> dict[str, Any] | None:
    """Return how often answers help, refuse and ask back, by what is right and by tag; None where that was not judged."""
    found = [(one.details["stance"], one.details["took"], one.tags) for one in results if "stance" in one.details]
    return stance.rates(found) if found else None


def _reference(row: Row, metric: Metric) -> str:
    if row.reference is None:
        raise UsageError(f"row {row.id!r} has no reference to score against", 'Add "reference": "..." to the row.')
    if metric.kind == "text" and metric.reads_reference:
        try:
            metric("", row.reference, row.problem)  # reads the reference: a wrong one must not cost a decoded suite
        except UsageError as error:
            raise UsageError(f"row {row.id!r}: {error.message}", error.hint) from None
    return row.reference


def _likelihood(runner: Runner, rows: Sequence[Row], progress: Progress | None, common: dict[str, Any]) -> SuiteResult:
    found = likelihood.perplexity(runner, rows, progress=progress)
    results = tuple(
        RowResult(
            id=row.id,
            text="",
            reference=row.reference or "",
            score=total,
            valid=None,
            tags=row.tags,
            tokens=count,
            seconds=0.0,
            finish="stop",
        )
        for row, total, count in zip(rows, found.sums, found.counts, strict=True)
    )
    tags = {}
    for tag in sorted({tag for row in rows for tag in row.tags}):
        part = [result for result in results if tag in result.tags]
        tags[tag] = likelihood.likelihood_of(
            [r.id for r in part], [r.score for r in part], [r.tokens for r in part]
        ).perplexity
    return SuiteResult(
        **common,
        score=found.perplexity,
        valid_json=None,
        by_tag=tags,
        by_function={},
        tokens=found.tokens,
        seconds=0.0,
        max_new_tokens=0,
        cut=0,
        grammar=None,
        rows=results,
    )


def compare(a: SuiteResult, b: SuiteResult) -> Comparison:
    """Compare two evaluations of one suite, paired by row id. Raises UsageError where suite or metric differ."""
    if a.metric != b.metric:
        raise UsageError(f"cannot compare {a.metric} with {b.metric}", "Evaluate both with one metric.")
    other = {row.id: row for row in b.rows}
    if a.suite != b.suite or other.keys() != {row.id for row in a.rows}:
        raise UsageError("cannot compare evaluations of different rows", "Evaluate both on one suite file.")
    x, y = list(a.rows), [other[row.id] for row in a.rows]
    if find_metric(a.metric).kind == "likelihood":
        if any(p.tokens != q.tokens for p, q in zip(x, y, strict=True)):
            raise UsageError(
                "cannot compare perplexities over different tokens",
                "The two models have different tokenizers: compare a metric of answers.",
            )
        difference, _ = statistics.clustered_mean(
            [p.score - q.score for p, q in zip(x, y, strict=True)], [p.tokens for p in x]
        )
        retention = None
    else:
        left, right = [p.score for p in x], [q.score for q in y]
        difference = statistics.paired_difference(left, right)
        retention = statistics.retention(left, right) if math.fsum(right) > 0 else None
    return Comparison(metric=a.metric, n=a.n, a=a.score, b=b.score, difference=difference, retention=retention)
