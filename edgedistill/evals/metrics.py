"""Metrics: how one answer is scored against one reference.

A text metric maps (answer, reference) to a Score between 0 and 1; one that ``needs_problem`` is given ``Row.problem``, too: the
problem of reasoning-gym, and the row's tests. A likelihood metric (perplexity) scores the
reference's tokens under the model and needs no answer; ``evals.likelihood`` computes it. ``python:FILE:FUNCTION`` is a function of
the user's (``evals/own_metric.py``). No torch, no numpy: ``plan`` looks names up.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgedistill.data.labels import label_key
from edgedistill.data.thinking import split
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals import mathematics, own_metric
from edgedistill.evals.stance import NONE, stance_of

LABEL = "label"
"""The metric of suites whose references are of ``[labels]``."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Hold the score of one answer: ``value`` in 0..1, ``details`` what the tables need (plain JSON values)."""

    value: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Describe one metric; ``function`` is that of kind "text". ``reads_reference``: what an empty answer scores against a
    reference tells whether the metric can read that. ``compares``: it tells of any two answers whether they say the same.
    """

    name: str
    kind: Literal["text", "likelihood"]
    summary: str
    higher_is_better: bool = True
    function: Callable[..., Score] | None = None
    needs_problem: bool = False
    waits: bool = False  # for other processes: several answers are scored at a time
    reads_reference: bool = True
    compares: bool = True

    def __call__(self, answer: str, reference: str, problem: Mapping[str, Any] | None = None) -> Score:
        """Score one answer. Raises UsageError for a likelihood metric, which has no answer to score, and without a problem
        where one is needed.
        """
        if self.function is None:
            raise UsageError(f"{self.name} scores likelihoods, not answers", "Use it as a suite's metric.")
        if self.needs_problem:
            return self.function(answer, reference, problem)
        return self.function(answer, reference)

    def score_all(self, cases: Iterable[tuple[str, tuple[str, str, Mapping[str, Any] | None]]]) -> list[Score]:
        """Score (row's id, (answer, reference, problem)), in their order."""

        def one(case: tuple[str, tuple[str, str, Mapping[str, Any] | None]]) -> Score:
            with judging(case[0]):
                return self(*case[1])

        if not self.waits:
            return [one(case) for case in cases]
        from edgedistill.evals.execution import at_once

        return list(at_once(one, cases))


class _Invalid(ValueError):
    """What Python's JSON parser lets through and JSON does not allow."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _Invalid("a key stands twice")  # parsers differ on which one wins: no app can rely on it
    return out


def _constant(name: str) -> Any:
    raise _Invalid(f"{name} is not JSON")


def parse_json(text: str) -> tuple[bool, Any]:
    """Parse strict JSON (spaces around it allowed): (True, value), or (False, None).

    NaN, Infinity and repeated keys are refused. Text before or after the value is refused too: an app would have to
    guess.
    """
    try:
        return True, json.loads(text.strip(), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError):
        return False, None


def same_json(a: Any, b: Any) -> bool:
    """Compare two JSON values with their types: 1, 1.0, "1" and true all differ. Key order does not matter."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_json(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def json_exact(answer: str, reference: str) -> Score:
    """Score 1 if the answer is the reference's JSON value, with equal name, arguments and types.

    Details: ``valid_json``; ``function``, the name that the reference calls; ``called``, the name that the answer
    calls. Raises UsageError if the reference itself is not JSON.
    """
    good, wanted = parse_json(reference)
    if not good:
        raise UsageError(
            f"json-exact: the reference is not JSON: {reference[:80]!r}", "Correct the row, or choose metric = 'exact'."
        )
    valid, value = parse_json(answer)
    details = {"valid_json": valid, "function": _name(wanted), "called": _name(value) if valid else None}
    return Score(value=float(valid and same_json(value, wanted)), details=details)


def exact(answer: str, reference: str) -> Score:
    """Score 1 if the answer is the reference, spaces at both ends aside."""
    return Score(value=float(answer.strip() == reference.strip()))


def contains(answer: str, reference: str) -> Score:
    """Score 1 if the reference stands somewhere in the answer, whatever the case and the spacing."""
    wanted = " ".join(reference.casefold().split())
    return Score(value=float(wanted in " ".join(answer.casefold().split())))


_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters")  # Hermes, Qwen and OpenAI say the one, Llama the other


def read_calls(text: str) -> list[dict[str, Any]] | None:
    """Return the calls that an assistant's turn makes, as name and arguments; [] where it makes none, None where it begins one
    that cannot be read.

    Read are ``<tool_call>`` blocks (Hermes, Qwen), whatever stands around them, and a turn that is JSON as a whole: one call,
    or a list of them. Any other text is an answer.
    """
    blocks = _BLOCK.findall(text)
    if not blocks and not text.lstrip().startswith(("{", "[")):
        return []
    found: list[dict[str, Any]] = []
    for block in blocks or [text]:
        good, value = parse_json(block)
        calls = value if isinstance(value, list) else [value]
        for call in calls:
            key = next((key for key in _ARGUMENTS if isinstance(call, dict) and key in call), None)
            if _name(call) is not None:
                found.append({"name": call["name"], "arguments": call[key] if key else {}})
            elif blocks:
                return None
            else:  # JSON that is no call, or text that only begins like it
                return [] if good else None
    return found


def tool_calls(answer: str, reference: str) -> Score:
    """Score 1 if the answer makes the calls of the reference: equal names and arguments with their types, in the same order.

    Where the reference makes no call the answer must make none: its wording is not judged. Details: ``valid_json``, whether
    the calls can be read; ``function``, the first that the reference calls; ``called``, the first that the answer calls. Raises
    UsageError for a reference with a call that cannot be read.
    """
    wanted, made = read_calls(reference), read_calls(answer)
    if wanted is None:
        raise UsageError(
            f"tool-calls: a call of the reference cannot be read: {reference[:80]!r}",
            'Write {"name": "...", "arguments": {...}}, alone or in <tool_call> blocks.',
        )
    details = {
        "valid_json": made is not None,
        "function": wanted[0]["name"] if wanted else None,
        "called": made[0]["name"] if made else None,
    }
    return Score(value=float(made is not None and same_json(made, wanted)), details=details)


def reasoning_gym(answer: str, reference: str, problem: Mapping[str, Any] | None) -> Score:
    """Score 1 if the verifier of the problem finds the answer right. Details: ``credit``, what it gives, 0 to 1. Raises
    UsageError for a row without a problem.
    """
    from edgedistill.evals.reasoning import credit

    if problem is None:
        raise UsageError(
            "reasoning-gym: the row holds no problem of the library", "Make rows with: edgedistill data make TASK"
        )
    given = credit(answer, problem)
    return Score(value=float(given == 1.0), details={"credit": given})


def execution(answer: str, reference: str, problem: Mapping[str, Any] | None) -> Score:
    """Score 1 if the answer's code runs in the sandbox and passes the row's tests. Details: ``why`` not, in a word or two. Raises
    UsageError for a row without tests.
    """
    from edgedistill.evals.execution import verdict

    tests = (problem or {}).get("tests")
    if tests is None:
        raise UsageError("execution: the row has no tests", 'Add "tests": "assert add(2, 3) == 5" to the row.')
    why = verdict(answer, tests)
    return Score(value=float(not why), details={"why": why} if why else {})


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans(
    "", "", string.punctuation + "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u00bf\u00a1\u00ab\u00bb"
)


def normalised_text(text: str) -> str:
    """Return a text without what SQuAD's evaluation leaves out (Rajpurkar et al. 2016, arXiv:1606.05250): case, punctuation,
    English articles, and spaces beyond one between words. Typographic punctuation counts as punctuation.
    """
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_NO_PUNCTUATION)).split())


def normalised(answer: str, reference: str) -> Score:
    """Score 1 if the answer is the reference but for case, punctuation, articles and spacing. A text of nothing else (an article, a
    sign) is compared as it is.
    """
    one, other = normalised_text(answer), normalised_text(reference)
    return Score(value=float(one == other if other else answer.strip() == reference.strip()))


def label(answer: str, reference: str) -> Score:
    """Score 1 if the answer is the label that the reference is, but for case, punctuation and spacing."""
    return Score(value=float(label_key(answer) == label_key(reference)))


def numeric(answer: str, reference: str) -> Score:
    """Score 1 if the last number of the answer is the last one of the reference. Details: ``number``, the answer's. Raises
    UsageError for a reference without a number.
    """
    wanted, given = mathematics.last_number(reference), mathematics.last_number(answer)
    if wanted is None:
        raise UsageError(
            f"numeric: the reference has no number: {reference[:80]!r}", "Correct the row, or choose another metric."
        )
    right = given is not None and mathematics.same_number(given, wanted)
    return Score(value=float(right), details={"number": None if given is None else given.value})


def math_verify(answer: str, reference: str) -> Score:
    """Score 1 if the answer's mathematics is that of the reference. Raises UsageError for a reference that is none."""
    return Score(value=float(mathematics.same_mathematics(answer, reference)))


def stance(answer: str, reference: str) -> Score:
    """Score 1 if the answer helps, refuses or asks back as the reference does (``evals/stance.py`` says what cannot be seen).
    Details: ``stance``, that of the reference; ``took``, that of the answer. Raises UsageError for a reference without a word.
    """
    wanted, took = stance_of(reference), stance_of(answer)
    if wanted == NONE:
        raise UsageError("stance: the reference has no word", "Write how one would help, refuse or ask back.")
    return Score(value=float(took == wanted), details={"stance": wanted, "took": took})


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="json-exact", kind="text", summary="equal JSON value, types included", function=json_exact),
        Metric(name="exact", kind="text", summary="equal text, outer spaces aside", function=exact),
        Metric(
            name="contains",
            kind="text",
            summary="the reference stands in the answer",
            function=contains,
            compares=False,
        ),
        Metric(
            name="normalised",
            kind="text",
            summary="equal text but for case, punctuation, articles and spacing",
            function=normalised,
        ),
        Metric(
            name=LABEL, kind="text", summary="the same one of [labels], with macro-F1 and calibration", function=label
        ),
        Metric(name="numeric", kind="text", summary="the same last number", function=numeric),
        Metric(
            name="math-verify",
            kind="text",
            summary="the same mathematics, by the library math-verify",
            function=math_verify,
        ),
        Metric(
            name="tool-calls", kind="text", summary="the same calls, or none where none are due", function=tool_calls
        ),
        Metric(
            name="stance",
            kind="text",
            summary="helps, refuses or asks back as the reference does",
            function=stance,
            compares=False,
        ),
        Metric(
            name="reasoning-gym",
            kind="text",
            summary="right by the verifier of the row's problem",
            function=reasoning_gym,
            needs_problem=True,
            compares=False,
        ),
        Metric(
            name="execution",
            kind="text",
            summary="the answer's code passes the row's tests, in a sandbox",
            function=execution,
            needs_problem=True,
            waits=True,
            reads_reference=False,
            compares=False,
        ),
        Metric(
            name="perplexity",
            kind="likelihood",
            summary="exp of the mean negative log-likelihood of the reference's tokens",
            higher_is_better=False,
        ),
    )
}


AFTER_THINKING = "think:"
"""Before a metric's name: the answer is what stands after the block of thinking, in answer and reference."""


def _after_thinking(metric: Metric) -> Metric:
    def score(answer: str, reference: str, *problem: Mapping[str, Any] | None) -> Score:
        thought = split(answer)
        found = metric(thought.answer, split(reference).answer, *problem)
        words = None if thought.thinking is None else thought.words
        return Score(value=found.value, details={**found.details, "thinking_words": words})

    return dataclasses.replace(metric, name=AFTER_THINKING + metric.name, function=score)


def find_metric(name: str, folder: Path = Path()) -> Metric:
    """Return the metric of that name, ``think:NAME`` for the text metric NAME after thinking; the file of a function of the user's
    lies in ``folder``. Raises UsageError with did-you-mean.
    """
    if name in METRICS:
        return METRICS[name]
    plain = name.removeprefix(AFTER_THINKING)
    inner = METRICS.get(plain) or (_own(plain, folder) if own_metric.NAME.fullmatch(plain) else None)
    if inner is not None and inner.kind == "text":
        return _after_thinking(inner) if plain != name else inner
    close = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise UsageError(f"unknown metric {name!r}", f"{hint}Metrics: {', '.join(METRICS)}, python:FILE:FUNCTION.")


def _own(name: str, folder: Path) -> Metric:
    def score(answer: str, reference: str) -> Score:
        return Score(value=own_metric.call(name, folder, answer, reference))

    return Metric(name=name, kind="text", summary="a function of one's own", function=score, reads_reference=False)


def shown_name(name: str) -> str:
    """Return a metric's name as people write it, without a digest."""
    return name.partition("@")[0] if name.startswith((own_metric.PREFIX, AFTER_THINKING + own_metric.PREFIX)) else name


@contextmanager
def judging(row_id: str) -> Iterator[None]:
    """Say of a function of the user's that fails on which row it did. Raises StepFailed."""
    try:
        yield
    except own_metric.MetricFailed as error:
        raise StepFailed(f"row {row_id!r}: {error.message}", error.hint) from error.__cause__
