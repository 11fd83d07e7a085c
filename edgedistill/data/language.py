"""Which language a text is in: py3langid (BSD-3-Clause), a naive Bayes classifier of 140 languages whose model is in its wheel."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection
from typing import Any

from edgedistill.evals.metrics import parse_json

LEAST_LETTERS = 16
"""Fewer letters tell too little; of scripts whose letters are words or syllables, a third of them do."""
DENSE = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
LEAST_SHARE = 0.75
"""Share of letters among what is not space, under which a text is mostly code, figures or data."""
UNLIKELY = 0.1
"""Probability of all wanted languages together, under which a text is in none of them."""
NO_LANGUAGE = "zxx"  # ISO 639: no linguistic content
LANGUAGES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga "
    "gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij "
    "ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so "
    "sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu"
).split()
"""What py3langid 0.4 tells apart, as ISO 639 codes; ``plan`` knows them without it."""
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


def _prose(text: str) -> str:
    """Return what of a text is written in a language; "" where that is too little."""
    if text.lstrip().startswith(("{", "[")) and parse_json(text)[0]:
        return ""
    prose = ASIDE.sub(" ", FENCED.sub(" ", text)).strip()
    letters = [one for one in prose if unicodedata.category(one)[0] in "LM"]  # vowel signs of Indic scripts are marks
    dense = sum(bool(DENSE.match(one)) for one in letters)
    solid = sum(not one.isspace() for one in prose)
    return prose if len(letters) + 2 * dense >= LEAST_LETTERS and len(letters) >= LEAST_SHARE * solid else ""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # with probabilities, which its module functions do not give
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
