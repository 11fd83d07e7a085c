"""The names of metrics in a recipe: those that there are, and ``python:FILE:FUNCTION``, a function of the user's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from edgedistill.evals.metrics import LABEL, METRICS
from edgedistill.evals.own_metric import PREFIX
from edgedistill.toml_source import did_you_mean

OWN = r"python:[^:@\n]+:[A-Za-z_]\w*"
"""A function of the user's: its file, relative to the recipe, and its name."""


def _among(names: tuple[str, ...]) -> Callable[[str], str]:

    def check(name: str) -> str:
        if name in names or re.fullmatch(OWN, name):
            return name
        if name.startswith(PREFIX):
            raise ValueError(
                f'{name!r} names no function: write "python:FILE:FUNCTION", such as "python:checks.py:same"'
            )
        listed = ", ".join(f'"{one}"' for one in names)
        raise ValueError(
            f'expected {listed} or "python:FILE:FUNCTION"; found "{name}" (a string){did_you_mean(name, names)}'
        )

    return check


def _schema(names: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(names), "type": "string"}, {"pattern": f"^{OWN}$", "type": "string"}]}


_ANSWERS = tuple(
    name for name, metric in METRICS.items() if metric.kind == "text" and not metric.waits and name != LABEL
)
AnswerMetric = Annotated[str, AfterValidator(_among(_ANSWERS)), WithJsonSchema(_schema(_ANSWERS))]
"""A metric of answers."""
SuiteMetric = Annotated[str, AfterValidator(_among(tuple(METRICS))), WithJsonSchema(_schema(tuple(METRICS)))]
"""A metric of answers or of likelihoods."""
