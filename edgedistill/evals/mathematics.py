"""Numbers in answers, and mathematics: whether two texts end in the same value.

``numeric`` reads plain text, by rules below. ``math-verify`` compares expressions: an optional dependency (``pip install
'edgedistill[reasoning]'``, Apache-2.0, https://github.com/huggingface/Math-Verify) that is imported only here. It reads LaTeX by a
parser of its own, and plain expressions by sympy's, which runs them through Python's ``eval``: a model's answer must never be run,
so only its LaTeX is read, and a plain number is compared here.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

from edgedistill.errors import UsageError

INSTALL = "pip install 'edgedistill[reasoning]'"
TOLERANCE = 1e-6
SECONDS = 3
"""The longest that math-verify may think of one answer: a model may write 9^{9^{9^9}}."""
LONGEST = 100_000  # characters of an answer that are looked at, from its end
NUMBER = re.compile(
    r"""
    (?<![\w./])                                             # not inside a word, a longer number or a date
    (?P<sign>[-+\u2212]?)\s?(?:[$€£¥₹]\s?)?
    (?P<whole>\d{1,3}(?:[,\u00a0\u202f_'\u2019]\d{3})+(?!\d)|\d+(?=\D|$))?  # 1,234,567, or digits alone
    (?P<part>\.\d+)?
    (?P<power>[eE][-+]?\d{1,3}(?!\w))?
    (?:\s?/\s?(?P<under>\d+(?:\.\d+)?)(?!\s?/))?            # 3/4, and no date
    \s?(?P<percent>%|\\%|percent\b|per\ cent\b)?
    """,
    re.VERBOSE,
)
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


class Number(NamedTuple):
    """A number as a text says it; of "12.5 %" ``value`` is 0.125."""

    value: float
    percent: bool


def last_number(text: str) -> Number | None:
    """Return the last number in a text; None where there is none.

    Thousands may be parted by a comma, an apostrophe or a narrow space: "1,234.5" is 1234.5. "3/4" and "\\frac{3}{4}" are 0.75. A
    minus counts where it stands at the number and after no other one: "5 - 3" ends in 3.
    """
    found = list(numbers_in(text))
    return found[-1] if found else None


def numbers_in(text: str) -> Iterator[Number]:
    """Yield the numbers of a text, as ``last_number`` reads them."""
    text = FRACTION.sub(r"\1/\2", text[-LONGEST:].replace("{,}", ","))
    for match in NUMBER.finditer(text):
        value = _value(match) if match["whole"] or match["part"] else None
        if value is None:
            continue
        before = text[: match.start()].rstrip()
        if match["sign"] in ("-", "\u2212") and not (before and (before[-1].isdigit() or before[-1] in ")%")):
            value = -value
        yield Number(value, bool(match["percent"]))


def _value(match: re.Match[str]) -> float | None:
    whole = re.sub(r"\D", "", match["whole"] or "0")
    try:
        value = float(whole + (match["part"] or "") + (match["power"] or ""))
        value = value / float(match["under"]) if match["under"] else value
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    value = value / 100 if match["percent"] else value
    return value if math.isfinite(value) else None


def same_number(a: Number, b: Number) -> bool:
    """Tell whether two numbers are the same: whole ones exactly, others within a millionth. Where one of them alone is a
    percentage, the other may be its share or its bare number: "50 %" is 0.5 and 50.
    """
    if _same(a.value, b.value):
        return True
    return a.percent != b.percent and _same(a.value * (100 if a.percent else 1), b.value * (100 if b.percent else 1))


def _same(a: float, b: float) -> bool:
    if a.is_integer() and b.is_integer():
        return a == b
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=0.0)


def installed() -> bool:
    """Tell whether math-verify is there, without importing it."""
    return find_spec("math_verify") is not None


def same_mathematics(answer: str, reference: str) -> bool:
    """Tell whether an answer's last boxed or marked-up expression is what the reference says, or, where it has none, its last
    number. Raises UsageError for a reference that is no mathematics, and where the library is missing.
    """
    wanted = _reference(reference)
    verify = _library()[1]
    given = _parsed(answer[-LONGEST:])
    if given:
        return bool(verify(list(wanted), given, timeout_seconds=_seconds()))
    own, other = last_number(answer), last_number(reference)
    # "x = 3" ends in a number and is none: only a reference that is one is compared as one
    return own is not None and other is not None and _is_number(reference) and same_number(own, other)


def _is_number(text: str) -> bool:
    """Tell whether a text is a number and nothing more."""
    found = NUMBER.fullmatch(text.strip().strip("$").strip())
    return found is not None and bool(found["whole"] or found["part"])


@functools.lru_cache(maxsize=4096)
def _reference(text: str) -> tuple[Any, ...]:
    # "$" of its own is the money's only where no second one closes it
    found = _parsed(text) or _parsed(f"${text.strip().strip('$')}$")
    if not found or all(isinstance(one, str) for one in found):
        raise UsageError(
            f"math-verify: the reference is no mathematics that it reads: {text[:80]!r}",
            r"write it as LaTeX (\frac{1}{2}, $x^2$) or a number, or choose another metric",
        )
    return tuple(found)


def _parsed(text: str) -> list[Any]:
    parse, _, latex = _library()
    return parse(text, extraction_config=latex, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """Return the time limit; it is kept by a signal, which only the main thread can take."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None


@functools.cache
def _library() -> tuple[Any, Any, Any]:
    try:
        from math_verify import (  # pyright: ignore[reportMissingImports] (an extra)
            LatexExtractionConfig,
            parse,
            verify,
        )
    except ImportError as error:
        raise UsageError(f"math-verify cannot be imported ({error})", INSTALL) from None
    for name in ("parser", "grader", "utils"):  # they tell of each answer that cannot be read
        logging.getLogger(f"math_verify.{name}").setLevel(logging.CRITICAL)
    return parse, verify, [LatexExtractionConfig()]
