"""``[labels]``: answers out of a closed set, and how a prompt's target is a distribution over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from edgedistill.data.labels import label_key
from edgedistill.recipe_base import Section
from edgedistill.toml_source import key_error

if TYPE_CHECKING:
    from edgedistill.recipe import Recipe

Name = Annotated[str, Field(min_length=1, pattern=r"^\S(.*\S)?$")]
ANY_LABEL = ("format", "refusals", "pii", "language", "decontaminate")
"""Filters that judge an answer without looking at which label it is, or how often it is given."""


class Labels(Section):
    """A closed set of answers. What the student learns of a prompt is a distribution over them: ``by`` "samples" it is the shares
    of the teacher's answers (``generate.samples``), so that a teacher without logits gives soft targets, too; by "majority" the
    most frequent answer alone. Each label is a row with its share as its weight, which makes the loss the cross-entropy of the
    distribution over whole answers. Suites with metric = "label" are scored by these names.
    """

    names: Annotated[tuple[Name, ...], Field(min_length=2)]
    by: Literal["samples", "majority"] = "samples"
    smoothing: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="samples: added to the count of every label, against shares of 0 from few samples (1: Laplace, 0.5: Jeffreys); "
        "every prompt then has a row for every label",
    )

    @model_validator(mode="after")
    def _apart(self) -> Labels:
        seen: dict[str, str] = {}
        for name in self.names:
            if (other := seen.setdefault(label_key(name), name)) != name or self.names.count(name) > 1:
                raise key_error("names", f"{other!r} and {name!r} are the same but for case, punctuation and spacing")
        if self.by == "majority" and self.smoothing:
            raise key_error("smoothing", 'the most frequent label has no shares to smooth: set by = "samples"')
        return self


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
