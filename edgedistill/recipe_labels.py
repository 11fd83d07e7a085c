"""``[labels]``: answers out of a closed set, and how a prompt's target is a distribution over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgedistill.data.label_answers import (
    ask_ranking,
    ask_scores,
    ranking_schema,
    rotated,
    scores_schema,
    shortest,
)
from edgedistill.data.labels import label_key
from edgedistill.recipe_base import Count, Positive, Section
from edgedistill.toml_source import key_error

if TYPE_CHECKING:
    from edgedistill.recipe import Recipe
    from edgedistill.recipe_teacher import Asked

Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]
ANY_LABEL = ("format", "refusals", "pii", "language", "decontaminate")
"""Filters that judge an answer without looking at which label it is, or how often it is given."""
CHARACTERS = 4
"""Characters of such answers that a token has at most, or hardly more: in fewer tokens none of them fits."""


class Labels(Section):
    """A closed set of answers. What the student learns of a prompt is a distribution over them: ``by`` "samples" it is the shares
    of the teacher's answers (``generate.samples``), so that a teacher without logits gives soft targets, too; by "majority" the
    most frequent answer alone. By "scores" the teacher is asked to score every label from 0 to 10, by "ranking" to order them: one
    answer says something of all labels, and several, each asked with the labels in another place, are averaged: at temperature 0,
    too, up to one for each place. By "logits" nothing is asked: a teacher whose weights are here has a probability for each label.
    Each label is a row with its share as its weight, which makes the loss the cross-entropy of the distribution over whole answers.
    Suites with metric = "label" are scored by these names.
    """

    OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "samples": ("smoothing",),
        "majority": (),
        "scores": ("scale", "least", "guided"),
        "ranking": ("decay", "first", "least", "guided"),
        "logits": ("least",),
    }
    """What each way may be told."""

    names: Annotated[tuple[Name, ...], Field(min_length=2)]
    by: Literal["samples", "majority", "scores", "ranking", "logits"] = "samples"
    smoothing: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="samples: added to the count of every label, against shares of 0 from few samples (1: Laplace, 0.5: Jeffreys); "
        "every prompt then has a row for every label",
    )
    scale: Positive = Field(
        default=2.0,
        description="scores: so many points more are e = 2.7 times the share, which is exp(score / scale) over the sum of all",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="ranking: the share of a label is that of the one before it times this"
    )
    first: Count | None = Field(
        default=None, description="ranking: so many labels are ordered, the others have no share; all when left out"
    )
    least: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01,
        description="scores, ranking, logits: a label with less than this times the largest share has none: each is a row to learn",
    )
    guided: bool | None = Field(
        default=None,
        description="scores, ranking: the teacher can write nothing but such JSON. When left out, one that llama.cpp or vLLM runs "
        "cannot; true asks another server for it, too",
    )

    @model_validator(mode="after")
    def _apart(self) -> Labels:
        seen: dict[str, str] = {}
        for name in self.names:
            if (other := seen.setdefault(label_key(name), name)) != name or self.names.count(name) > 1:
                raise key_error("names", f"{other!r} and {name!r} are the same but for case, punctuation and spacing")
        for name in dict.fromkeys(name for names in self.OWN.values() for name in names):
            if name not in self.OWN[self.by] and getattr(self, name) != type(self).model_fields[name].default:
                whose = " or ".join(f'"{by}"' for by, names in self.OWN.items() if name in names)
                raise key_error(name, f"this is for by = {whose}")
        if (self.first or 0) > len(self.names):
            raise key_error("first", f"there are {len(self.names)} labels: leave it out to order all of them")
        return self

    @property
    def ask(self) -> str:
        """What the teacher is asked at the end of each prompt; "" where its answer is a label."""
        return self._ask(self.names)

    def _ask(self, names: Sequence[str]) -> str:
        if self.by == "scores":
            return ask_scores(names)
        return ask_ranking(names, self.first or 0) if self.by == "ranking" else ""

    @property
    def rule(self) -> dict[str, Any]:
        """How shares are made of what the teacher says, as the filter's key holds it."""
        own = [name for name in self.OWN[self.by] if name != "guided"]
        return {"by": self.by, "smoothing": self.smoothing, **self.model_dump(include={*own}, exclude_none=True)}

    def guides(self, one: Asked) -> bool:
        """Tell whether a teacher can write nothing but what it is asked for."""
        able = one.backend == "llama_cpp" or one.vllm is not None
        return bool(self.ask) and (able if self.guided is None else self.guided)

    def ways(self, one: Asked, samples: int) -> list[tuple[str, str]]:
        """Return what a teacher is asked in place of a label, and the JSON Schema of its answers ("": it writes freely), for its
        samples in turn: in each the labels stand a place on, and scores are written in the order in which they are asked for.
        """
        orders = [rotated(self.names, places) for places in range(min(samples, len(self.names)))]
        if not self.guides(one):
            return [(self._ask(names), "") for names in orders]
        return [(self._ask(names), json.dumps(self._schema(names))) for names in orders]

    def _schema(self, names: Sequence[str]) -> dict[str, Any]:
        return scores_schema(names) if self.by == "scores" else ranking_schema(self.names, self.first or 0)


def refuse_labels(recipe: Recipe) -> None:
    """Refuse a suite of labels without labels, and what a distribution over labels rules out."""
    labels = recipe.labels
    if labels is None:
        for name, suite in recipe.suites.items():
            if suite.metric == "label":
                raise key_error(f"suites.{name}.metric", 'which labels are there? add [labels] names = ["…", "…"]')
        return
    if labels.by == "samples" and recipe.generate.samples == 1 and not recipe.teachers:
        raise key_error(
            "labels.by",
            "one sample of each prompt is no distribution: raise generate.samples and generate.temperature, or set "
            'by = "majority"',
        )
    if labels.ask:
        _refuse_asking(recipe, labels)
    if labels.by == "logits":
        _refuse_logits(recipe)
    for at, one in enumerate(recipe.filter):
        if one.kind not in ANY_LABEL:
            raise key_error(
                f"filter.{at}.kind",
                f"{one.kind} chooses among the labels that a prompt is given, and their shares would no longer be the teacher's: "
                f"leave it out ({', '.join(ANY_LABEL)} may stay)",
            )
        if one.otherwise == "hedge":
            raise key_error(
                f"filter.{at}.otherwise", 'a hedge is no label: take "gold", or make it one of labels.names'
            )
    wrong: dict[str, str | bool] = {
        "generate.style": recipe.generate.style != "answer" and 'a label is a whole answer: set style = "answer"',
        "round": bool(recipe.round) and "a round keeps single answers, not their shares: leave it out",
        "distill.on_policy": recipe.distill.on_policy > 0 and "what the student writes has no share: set it to 0",
        "distill.curriculum": recipe.distill.curriculum != "none"
        and "it orders single rows, and a prompt has a row for each of its labels: leave it out",
        "heal.curriculum": recipe.heal is not None
        and recipe.heal.curriculum != "none"
        and "it orders single rows, and a prompt has a row for each of its labels: leave it out",
    }
    for key, why in wrong.items():
        if why:
            raise key_error(key, str(why))


def refuse_samples(recipe: Recipe) -> None:
    """Refuse samples that are all the same: at temperature 0 they differ only as long as each is asked in another way."""
    generate, labels = recipe.generate, recipe.labels
    if generate.samples == 1 or generate.temperature > 0:
        return
    if labels is None or not labels.ask:
        raise key_error("generate.samples", "at temperature 0 all of them are the same: set generate.temperature")
    if generate.samples > (count := len(labels.names)):
        raise key_error(
            "generate.samples",
            f"at temperature 0 they begin again after one for each place of {count} labels: set it to {count}, or set "
            "generate.temperature",
        )


def _refuse_asking(recipe: Recipe, labels: Labels) -> None:
    """Refuse what leaves no room for scores or an order, or would be said to the teacher twice."""
    generate, answer = recipe.generate, shortest(labels.names, labels.by, labels.first or 0)
    if generate.json_schema is not None:
        raise key_error("generate.json_schema", f'labels.by = "{labels.by}" has one of its own: leave it out')
    if generate.max_new_tokens < len(answer) / CHARACTERS:
        raise key_error(
            "generate.max_new_tokens",
            f'an answer of {len(answer)} characters (labels.by = "{labels.by}") does not fit: set it to {len(answer) // 2 + 8}',
        )
    for at, one in enumerate((recipe.teacher, *recipe.teachers)):
        place = f"teachers.{at - 1}" if at else "teacher"
        if labels.guides(one) and "response_format" in one.body:
            raise key_error(
                f"{place}.body", "the labels set response_format: leave it out, or set labels.guided to false"
            )
        if labels.guided and one.backend == "transformers" and one.vllm is None:
            raise key_error(
                "labels.guided",
                f"transformers writes freely, and runs {one.model}: leave the key out, or take vLLM or llama.cpp",
            )


def _refuse_logits(recipe: Recipe) -> None:
    """Refuse teachers that show no probability of a given answer, and what asks for answers where none are written."""
    wrong: dict[str, str | bool] = {
        "generate.samples": recipe.generate.samples > 1 and "probabilities are taken once: set it to 1",
        "generate.temperature": recipe.generate.temperature > 0
        and "probabilities are those at temperature 1: set it to 0",
        "generate.json_schema": recipe.generate.json_schema is not None and "nothing is written: leave it out",
    }
    for at, one in enumerate((recipe.teacher, *recipe.teachers)):
        place = f"teachers.{at - 1}" if at else "teacher"
        wrong[f"{place}.backend"] = one.backend == "openai" and (
            'a server gives no probabilities of whole answers: set labels.by = "scores", "ranking" or "samples"'
        )
    for at, one in enumerate(recipe.teachers):
        wrong[f"teachers.{at}.role"] = one.role == "recovery" and "each prompt has its probabilities, and nothing fails"
    for at, one in enumerate(recipe.filter):
        wrong[f"filter.{at}.kind"] = (
            one.kind != "decontaminate" and "it judges what is written, and nothing is: leave it out"
        )
    for key, why in wrong.items():
        if why:
            raise key_error(key, f'labels.by = "logits": {why}')
