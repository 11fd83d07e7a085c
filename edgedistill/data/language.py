"""Which language a text is in: py3langid (BSD-3-Clause), a naive Bayes classifier of 140 languages whose model is in its wheel."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

from edgedistill.evals.metrics import parse_json

LEAST_LETTERS = 16
"""Fewer letters tell too little; of scripts whose letters are words or syllables, a third of them do."""
DENSE = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
LEAST_SHARE = 0.6
"""Share of letters among what is not space, under which a text is mostly code, figures or data."""
UNLIKELY = 0.1
"""Probability of all wanted languages together, under which a text is in none of them."""
NO_LANGUAGE = "zxx"  # ISO 639: no linguistic content
FENCED = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
ASIDE = re.compile(r"`[^`\n]*`|https?://\S+|\$\$.*?\$\$|\\\[.*?\\\]|<[^<>\n]{1,80}>|\b\S+@\S+\b", re.DOTALL)


def other_language(text: str, languages: Collection[str]) -> str:
    """Return the language that a text is in, if it is clearly in none of ``languages`` (ISO 639 codes), else "".

    Code, addresses and markup are left out first. A text of few letters, or mostly of code, figures or JSON, passes: there is too
    little to tell by.
    """
    prose = _prose(text)
    if not prose:
        return ""
    ranked = _identifier().rank(prose)
    best = ranked[0][0]
    likely = sum(share for language, share in ranked if language in languages)
    return "" if best in languages or best == NO_LANGUAGE or likely >= UNLIKELY else best


def unknown(languages: Collection[str]) -> list[str]:
    """Return those codes that the classifier does not know."""
    known = set(_identifier().labels) - {NO_LANGUAGE}
    return [one for one in languages if one not in known]


def known() -> list[str]:
    """Return the codes of all languages that are told apart, sorted."""
    return sorted(set(_identifier().labels) - {NO_LANGUAGE})


def _prose(text: str) -> str:
    """Return what of a text is written in a language; "" where that is too little."""
    if text.lstrip().startswith(("{", "[")) and parse_json(text)[0]:
        return ""
    prose = ASIDE.sub(" ", FENCED.sub(" ", text)).strip()
    letters = [one for one in prose if one.isalpha()]
    dense = sum(bool(DENSE.match(one)) for one in letters)
    solid = sum(not one.isspace() for one in prose)
    marks = sum(not one.isalnum() and not one.isspace() and one.isascii() for one in prose)
    # vowel signs of Indic and Arabic scripts are no letters to Python, so only ASCII signs and digits count against
    if (
        len(letters) + 2 * dense < LEAST_LETTERS
        or 1 - (marks + sum(one.isdigit() for one in prose)) / solid < LEAST_SHARE
    ):
        return ""
    return prose


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # with probabilities, which its module functions do not give
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
