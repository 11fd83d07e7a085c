"""What a teacher is asked in place of a label, to say more than one: a score for each, or their order; and how it is read.

The words are put at the end of the prompt, for the teacher alone: the student learns to answer the prompt as it is. Models prefer
places (Zheng et al. 2023, arXiv:2306.05685). So labels stand in them in the recipe's order for the first sample, and for each
further one a place on: as many samples as there are labels have each of them once in every place, and the preference averages out
of their mean. A single sample keeps it, and fewer samples than labels a part of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from edgedistill.data.labels import label_key, read_label
from edgedistill.data.thinking import split

MOST = 10
"""The best score."""
SCORES = """\
Do not answer with a label. Instead give every label a score of how well it fits as the answer, from 0 (wrong) to {most} \
(certainly right); several may be high. Write this JSON object with a number in the place of each N, and nothing else:
{form}"""
RANKING = """\
Do not answer with a label. Instead order all of these labels, the one that fits best as the answer first:
{form}
Write them as a JSON list in that order, and nothing else."""
FIRST = """\
Do not answer with a label. Instead choose the {first} of these labels that fit best as the answer, the best one first:
{form}
Write them as a JSON list in that order, and nothing else."""
_NUMBER = re.compile(r"^\s*\(?\d+[.):]\s+")
_SHOWN = 40  # characters of what is no label that a reason repeats


def rotated(names: Sequence[str], places: int) -> tuple[str, ...]:
    """Return the labels with the first ``places`` of them at the end: which sample of a prompt is asked so."""
    at = places % len(names)
    return (*names[at:], *names[:at])


def ask_scores(names: Sequence[str]) -> str:
    """Return what asks for a score for each label."""
    form = ", ".join(f"{_text(name)}: N" for name in names)
    return SCORES.format(most=MOST, form=f"{{{form}}}")


def ask_ranking(names: Sequence[str], first: int = 0) -> str:
    """Return what asks for the order of the labels, or for the best of them."""
    return (FIRST if first else RANKING).format(form=_text(list(names)), first=first)


def scores_schema(names: Sequence[str]) -> dict[str, Any]:
    """Return the JSON Schema of scores. Whole numbers, as a list: grammars know few bounds of numbers."""
    return {
        "type": "object",
        "properties": {name: {"enum": list(range(MOST + 1))} for name in names},
        "required": list(names),
        "additionalProperties": False,
    }


def ranking_schema(names: Sequence[str], first: int = 0) -> dict[str, Any]:
    """Return the JSON Schema of an order. That no label comes twice is left to the reader: grammars do not count."""
    count = first or len(names)
    return {"type": "array", "items": {"enum": list(names)}, "minItems": count, "maxItems": count}


def shortest(names: Sequence[str], by: str, first: int = 0) -> str:
    """Return a shortest answer by "scores" or "ranking": the least that has to fit into ``max_new_tokens``."""
    if by == "scores":
        return _text(dict.fromkeys(names, 0))
    return _text(sorted(names, key=len)[: first or len(names)])


def read_scores(text: str, names: Sequence[str], most: float = MOST) -> tuple[dict[str, float], str]:
    """Return the score of each label, from 0 to ``most``, and "", or {} and what is wrong."""
    found: dict[str, float] = {}
    value = _json(text)
    if not isinstance(value, _Pairs):
        return {}, "no JSON object of scores"
    for said, score in value.pairs:
        name = read_label(said, names)
        if name is None:
            return {}, f"no label: {said[:_SHOWN]}"
        if name in found:
            return {}, f"two scores for {name}"
        if isinstance(score, bool) or not isinstance(score, int | float):
            return {}, f"no number for {name}"
        if not 0 <= score <= most:  # NaN is none, too
            return {}, f"a score for {name} that is not from 0 to {most:g}"
        found[name] = float(score)
    if missing := [name for name in names if name not in found]:
        return {}, f"no score for {missing[0]}"
    return {name: found[name] for name in names}, ""


def read_ranking(text: str, names: Sequence[str], first: int = 0) -> tuple[tuple[str, ...], str]:
    """Return the labels in their order, the ``first`` of them (0: all), and "", or () and what is wrong. An order is a JSON list,
    or has one label a line (numbered or not), or ">" between them.
    """
    found: list[str] = []
    for said in _listed(text, names):
        name = read_label(said, names)
        if name is None:
            return (), f"no label: {said[:_SHOWN]}"
        if name in found:
            return (), f"{name} twice"
        found.append(name)
    wanted = first or len(names)
    if len(found) < wanted:
        return (), f"an order of {len(found)} of {wanted} labels" if found else "no order of labels"
    return tuple(found[:wanted]), ""


def _listed(text: str, names: Sequence[str]) -> list[str]:
    value = _json(text)
    if isinstance(value, list):
        return [str(one) if isinstance(one, str | int) else "{…}" for one in value]
    found: list[str] = []
    for line in split(text).answer.strip().splitlines():
        bare = line if read_label(line, names) else _NUMBER.sub("", line)  # "1." may be a label
        found += [bare] if read_label(bare, names) else bare.split(">")
    return [one.strip() for one in found if label_key(one)]


class _Pairs:
    """A JSON object with all of its pairs: ``json`` keeps the last of equal names."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        self.pairs = tuple(pairs)


def _json(text: str) -> Any:
    """Return the JSON that an answer is, without its block of thinking, in a fence or not; None where it is none."""
    text = split(text).answer.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
