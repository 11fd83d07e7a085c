"""Which answers are kept: the recipe's ``[[filter]]`` tables, applied in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from edgedistill.data.filters import COPIED_WORDS, SHARE, SIMILARITY
from edgedistill.data.judging import LEAST_SCORE, VERDICT_TOKENS
from edgedistill.data.near import MEANING
from edgedistill.data.thinking import LEAST_WORDS
from edgedistill.evals.execution import MEMORY_MIB, TIMEOUT_S
from edgedistill.evals.metrics import METRICS
from edgedistill.pooling import Pooling
from edgedistill.recipe_base import Count, Positive, Section
from edgedistill.recipe_metric import AnswerMetric
from edgedistill.toml_source import key_error


class Filter(Section):
    """Keep answers that pass. One by one: ``reference`` compares with the row's, ``thinking`` counts the words beside the answer,
    ``format`` looks at its form, ``language`` at the language it is in, ``execution`` runs its code with the row's tests,
    ``refusals`` and ``pii`` drop what refuses (but not where ``red-team`` asks for it) and what tells of a person. By a model, in a
    step of its own whose grades another threshold reads again: ``perplexity`` under one, the score of a ``reward`` model, or
    what a ``judge`` says of it by a rubric. Among the answers to one prompt: ``agreement`` keeps what most of them say,
    ``best`` a few that differ. Among all: ``duplicates`` drops what is nearly a row before, by its words or, with a ``model``
    that makes vectors, its meaning; ``decontaminate`` what repeats a suite. ``review`` goes by what people said of them
    (``edgedistill review``): what they rejected is dropped, what they edited is taught as edited. Where no answer passed,
    ``otherwise`` trains on the reference (``gold``: no prompt is lost), or on
    ``hedge``: a student that is shown where its teacher fails learns to say so (R-Tuning, arXiv:2311.09677).
    """

    OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "reference": ("corrections", "analysis", "missing"),
        "thinking": ("min_words", "max_words", "supports"),
        "best": ("keep", "by"),
        "format": ("min_chars", "max_chars", "pattern", "json_schema"),
        "execution": ("timeout", "memory"),
        "refusals": (),
        "pii": (),
        "agreement": ("share",),
        "duplicates": ("similarity", "model", "pooling"),
        "decontaminate": ("words",),
        "language": ("languages",),
        "perplexity": ("model", "min", "max"),
        "reward": ("model", "min", "keep", "label"),
        "judge": ("rubric", "min", "against", "max_new_tokens"),
        "review": ("file",),
    }
    """What each kind of filter may be told, beside ``otherwise``."""
    LATER = ("hedge", *(name for names in OWN.values() for name in names))
    GRADED: ClassVar[tuple[str, ...]] = ("perplexity", "reward", "judge")
    """Kinds that a model grades for, in a step of their own; duplicates may have one that makes vectors."""

    kind: Literal[
        "reference", "thinking", "best", "format", "execution", "refusals", "pii", "agreement", "duplicates", "decontaminate",
        "language", "perplexity", "reward", "judge", "review",
    ]  # fmt: skip
    metric: AnswerMetric = Field(
        default="json-exact",
        description='reference, agreement: by which two answers are the same; "python:FILE:FUNCTION" is your own',
    )
    otherwise: Literal["drop", "gold", "hedge"] = "drop"
    hedge: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description='otherwise = "hedge": what the student says instead of an answer, word for word'
    )
    min_words: Annotated[int, Field(ge=0)] = Field(
        default=LEAST_WORDS, description="thinking: fewer words are no thought"
    )
    max_words: Count | None = Field(default=None, description="thinking: a budget for devices that write slowly")
    supports: bool = Field(
        default=False,
        description="thinking: the block has to come to what is answered: a short answer, or the last number of one, stands in it",
    )
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
    missing: Literal["reject", "pass"] = Field(
        default="reject",
        description="reference: what happens to an answer whose row has no reference, as augmented prompts have none",
    )
    keep: Count = Field(
        default=1,
        description="best: so many answers to each prompt; reward: those of the highest score, all that reach min unless set",
    )
    by: Literal["likelihood", "shortest", "drawn"] = Field(
        default="likelihood", description="best: of the whole text; drawn: the first ones, a fair draw"
    )
    min_chars: Annotated[int, Field(ge=0)] = Field(default=0, description="format: fewer characters are no answer")
    max_chars: Count | None = Field(default=None, description="format: more are too long for the device")
    pattern: str | None = Field(default=None, description="format: a regular expression that is found in every answer")
    json_schema: Path | None = Field(default=None, description="format: a JSON Schema that every answer is valid under")
    timeout: Positive = Field(default=TIMEOUT_S, description="execution: seconds that code and tests may take together")
    memory: Annotated[int, Field(ge=64)] = Field(
        default=MEMORY_MIB, description="execution: MiB, of all processes of a program"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=SHARE, description="agreement: of the answers asked of a prompt, which have to say the same"
    )
    similarity: Annotated[float, Field(ge=0.3, le=1)] = Field(
        default=SIMILARITY,
        description="duplicates: share of words, in threes, that two rows have in common; with a model the cosine of their "
        f"vectors, {MEANING:g} unless set",
    )
    words: Annotated[int, Field(ge=3)] = Field(
        default=COPIED_WORDS, description="decontaminate: so many words in a row that a suite has, too, are copied"
    )
    languages: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = Field(
        default=(), description='language: in which answers may be, as ISO 639 has them: ["en", "de"]'
    )
    model: str | None = Field(
        default=None,
        description='perplexity: "student" (before it is taught; the default), "teacher" or a source of weights; reward: the '
        "source of a sequence classifier; duplicates: that of a text encoder, by whose vectors rows of one meaning are found",
    )
    min: float | None = Field(
        default=None,
        description="perplexity, reward: less does not pass; judge: a score of 1 to 5 that does, 4 unless set",
    )
    max: Positive | None = Field(default=None, description="perplexity: more does not pass")
    label: str | None = Field(
        default=None, description="reward: of a classifier with several labels, the one whose probability is the score"
    )
    pooling: Pooling | None = Field(
        default=None,
        description="duplicates: how the encoder's tokens become one vector, unless the checkpoint says it: mean, cls (the "
        "first) or last",
    )
    rubric: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="judge: what makes an answer good, in words, for the [judge], or the teacher where there is none",
    )
    against: Literal["reference"] | None = Field(
        default=None,
        description="judge: compare with the row's reference, once in each order, and keep what loses neither time",
    )
    max_new_tokens: Count = Field(default=VERDICT_TOKENS, description="judge: the longest verdict")
    file: Path | None = Field(default=None, description="review: the verdicts, as edgedistill review writes them")

    @model_validator(mode="after")
    def _fits(self) -> Filter:
        for name in dict.fromkeys(name for names in self.OWN.values() for name in names):
            kinds = [kind for kind, names in self.OWN.items() if name in names]
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise key_error(name, "this is for kind = " + " or ".join(f'"{kind}"' for kind in kinds))
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
        if self.kind == "review" and self.file is None:
            raise key_error("kind", 'set file = "NAME.review.jsonl", which edgedistill review writes')
        if self.kind == "agreement" and self.metric in METRICS and not METRICS[self.metric].compares:
            raise key_error(
                "metric", f"{self.metric} does not tell whether two answers say the same: exact or json-exact do"
            )
        self._graded()
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise key_error("pattern", f"no regular expression: {error}") from None
        return self

    def _graded(self) -> None:
        """Refuse filters by language or by a model that say too little, or what cannot be. Raises an error with the key."""
        if self.kind == "language" and not self.languages:
            raise key_error("kind", 'in which languages? languages = ["en"]')
        if self.kind == "perplexity":
            if self.min is None and self.max is None:
                raise key_error(
                    "kind", "of which perplexity? set max, or min (the step tells the quantiles: max = 1e9 keeps all)"
                )
            if self.min is not None and self.max is not None and self.max < self.min:
                raise ValueError(f"max = {self.max:g} is under min = {self.min:g}: nothing would pass")
        if self.kind == "duplicates" and self.pooling is not None and self.model is None:
            raise key_error("pooling", 'of which encoder? set model = "path:DIR", "hf:NAME" or "pypi:PACKAGE"')
        if self.kind == "reward":
            if self.model is None:
                raise key_error("model", "which classifier scores? path:DIR or hf:NAME")
            if self.min is None and not self.keeps_best:
                raise key_error("kind", "which score is enough? set min, or keep for the best to each prompt")
        if self.kind == "judge":
            if self.rubric is None:
                raise key_error("rubric", "by what is it judged? say in words what makes an answer good")
            if self.against is not None and self.min is not None:
                raise key_error("min", "what is compared with the reference has no score: leave min or against out")
            if self.min is not None and not 1 <= self.min <= 5:
                raise key_error("min", "scores go from 1 to 5")

    @property
    def asks_model(self) -> bool:
        """Tell whether a model looks at the answers in a step of its own."""
        return self.kind in self.GRADED or (self.kind == "duplicates" and self.model is not None)

    @property
    def keeps_best(self) -> bool:
        """Tell whether only the best answers to a prompt are kept by a reward model."""
        return self.kind == "reward" and "keep" in self.model_fields_set

    @property
    def passing(self) -> dict[str, float]:
        """Return the thresholds of a filter by a model: what its grades are compared with, in the filter's key alone."""
        if self.kind == "judge":
            return {} if self.against else {"min": LEAST_SCORE if self.min is None else self.min}
        if self.kind == "duplicates":
            return {"similarity": self.similarity if "similarity" in self.model_fields_set else MEANING}
        bounds: dict[str, float] = {
            name: value for name in ("min", "max") if (value := getattr(self, name)) is not None
        }
        return bounds | ({"keep": self.keep} if self.keeps_best else {})
