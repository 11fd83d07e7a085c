"""What can be refused of new prompts, and of what the teacher alone is told, before anything is asked."""

from __future__ import annotations

from edgedistill.data.new_prompts import last_said
from edgedistill.errors import RecipeError
from edgedistill.inputs import Inputs


def guides(inputs: Inputs) -> bool:
    """Tell whether there are prompts of which the teacher is told what the student is not."""
    return any(row.guidance for row in inputs.prompts) or any(
        one.kind == "red-team" for one in inputs.recipe.prompts.augment
    )


def refuse_prompts(inputs: Inputs) -> list[str]:
    """Raise RecipeError for augmenters that have nothing to work on, and for guidance where the teacher reads what the student
    reads; return warnings.
    """
    recipe, told = inputs.recipe, None
    augment = recipe.prompts.augment
    if augment and not any(last_said(row).strip() for row in inputs.prompts):
        told = ("no row ends with a user's words: there is no prompt to write anew", "leave it out", "prompts.augment")
    if guides(inputs):
        why = "some prompts have guidance that the teacher alone is given, and beside the student it would read without"
        features = recipe.distill.features
        if recipe.generate.style == "tool-trace":
            told = ("guidance is for single answers, and rows are traces", "take it out of the rows", "generate.style")
        elif recipe.score.kind == "dense" and recipe.distill.loss.kd > 0:
            told = (why, 'set score.kind = "sampled": its distributions are taken with the guidance', "score.kind")
        elif recipe.distill.on_policy:
            told = (why, "set distill.on_policy = 0", "distill.on_policy")
        elif features is not None and features.on:
            told = (why, "leave distill.features out", "distill.features")
    if told is not None:
        raise RecipeError(told[0], told[1], key=told[2], file=inputs.path)
    if not augment:
        return []
    found = []
    judging = {"reference", "best"}
    if all(one.kind in judging for one in recipe.filter):
        found.append(
            "no [[filter]] judges the answers to augmented prompts, which have no references: add agreement, format or refusals"
        )
    if recipe.student.vocabulary is not None:
        found.append(
            "student.vocabulary keeps the tokens of prompts.files: words of augmented prompts may be spelt in pieces, and rows "
            "whose text is cut otherwise than the teacher cuts it have no distributions"
        )
    if recipe.round:
        found.append("rounds put the rows of prompts.files alone: augmented prompts have no references to be right by")
    return found
