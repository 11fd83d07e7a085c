"""Which answers are kept: the recipe's ``[[filter]]`` tables, applied in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from edgedistill.data.filters import COPIED_WORDS, SHARE, SIMILARITY
from edgedistill.data.thinking import LEAST_WORDS
from edgedistill.recipe_base import Count, Section
from edgedistill.toml_source import key_error


class Filter(Section):
    """Keep answers that pass. One by one: ``reference`` compares with the row's, ``thinking`` counts the words beside the answer,
    ``format`` looks at its form, ``refusals`` and ``pii`` drop what refuses and what tells of a person. Among the answers to one
    prompt: ``agreement`` keeps what most of them say, ``best`` a few that differ. Among all: ``duplicates`` drops what is nearly a
    row before, ``decontaminate`` what repeats a suite. Where no answer passed, ``otherwise`` trains on the reference (``gold``: no
    prompt is lost), or on ``hedge``: a student that is shown where its teacher fails learns to say so (R-Tuning,
    arXiv:2311.09677).
    """

    OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "reference": ("corrections", "analysis"),
        "thinking": ("min_words", "max_words"),
        "best": ("keep", "by"),
        "format": ("min_chars", "max_chars", "pattern", "json_schema"),
        "refusals": (),
        "pii": (),
        "agreement": ("share",),
        "duplicates": ("similarity",),
        "decontaminate": ("words",),
    }
    """What each kind of filter may be told, beside ``otherwise``."""
    LATER = ("hedge", *(name for names in OWN.values() for name in names))

    kind: Literal[
        "reference", "thinking", "best", "format", "refusals", "pii", "agreement", "duplicates", "decontaminate"
    ]
    metric: Literal["json-exact", "exact", "contains", "tool-calls", "reasoning-gym"] = Field(
        default="json-exact", description="reference, agreement: by which two answers are the same"
    )
    otherwise: Literal["drop", "gold", "hedge"] = "drop"
    hedge: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description='otherwise = "hedge": what the student says instead of an answer, word for word'
    )
    min_words: Annotated[int, Field(ge=0)] = Field(
        default=LEAST_WORDS, description="thinking: fewer words are no thought"
    )
    max_words: Count | None = Field(default=None, description="thinking: a budget for devices that write slowly")
    corrections: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="reference: so many wrong answers to each prompt become lessons: shown one, and that it is not right, the "
        "student learns to write what was kept",
    )
    analysis: bool = Field(
        default=False,
        description="corrections: the teacher itself is told that it was wrong; what it says of it is learnt where its new "
        "answer is right",
    )
    keep: Count = Field(default=1, description="best: so many answers to each prompt")
    by: Literal["likelihood", "shortest", "drawn"] = Field(
        default="likelihood", description="best: of the whole text; drawn: the first ones, a fair draw"
    )
    min_chars: Annotated[int, Field(ge=0)] = Field(default=0, description="format: fewer characters are no answer")
    max_chars: Count | None = Field(default=None, description="format: more are too long for the device")
    pattern: str | None = Field(default=None, description="format: a regular expression that is found in every answer")
    json_schema: Path | None = Field(default=None, description="format: a JSON Schema that every answer is valid under")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=SHARE, description="agreement: of the answers asked of a prompt, which have to say the same"
    )
    similarity: Annotated[float, Field(ge=0.3, le=1)] = Field(
        default=SIMILARITY, description="duplicates: share of words, in threes, that two rows have in common"
    )
    words: Annotated[int, Field(ge=3)] = Field(
        default=COPIED_WORDS, description="decontaminate: so many words in a row that a suite has, too, are copied"
    )

    @model_validator(mode="after")
    def _fits(self) -> Filter:
        owner = {name: kind for kind, names in self.OWN.items() for name in names}
        for name, kind in owner.items():
            if kind != self.kind and getattr(self, name) != type(self).model_fields[name].default:
                raise key_error(name, f'this is for kind = "{kind}"')
        if (self.otherwise == "hedge") != (self.hedge is not None):
            raise ValueError('hedge is what is said where otherwise = "hedge": set both')
        if self.analysis and not self.corrections:
            raise ValueError("analysis is how corrections are written: set corrections, too")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words = {self.max_words} is under min_words = {self.min_words}: nothing would pass")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is under min_chars = {self.min_chars}: nothing would pass")
        if self.kind == "format" and all(
            getattr(self, name) == type(self).model_fields[name].default for name in self.OWN["format"]
        ):
            raise key_error("kind", "a format of what? set min_chars, max_chars, pattern or json_schema")
        if self.kind == "agreement" and self.metric in ("contains", "reasoning-gym"):
            raise key_error(
                "metric", f"{self.metric} does not tell whether two answers say the same: exact or json-exact do"
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise key_error("pattern", f"no regular expression: {error}") from None
        return self
