"""What can be refused of chat templates before anything runs: one that is missing, fails on the rows, or parts two models."""

from __future__ import annotations

from edgedistill.chat import read_chat
from edgedistill.chat_template import CHATML_TOKENS, TEACHER, check_rows, special_tokens
from edgedistill.errors import RecipeError, UsageError
from edgedistill.inputs import Inputs, files_of_rows
from edgedistill.models import Resolved
from edgedistill.pairing import tokens_differ
from edgedistill.served import KIND as SERVED_KIND

COMPARED = 16
"""Rows whose prompts two templates have to print alike, where the distributions of one model are used for another."""


def refuse_templates(inputs: Inputs) -> list[str]:
    """Refuse models without a chat template, and templates of the recipe's that its rows do not fit; return warnings."""
    recipe, warnings = inputs.recipe, []
    models = [("teacher", recipe.teacher.backend, inputs.teacher)]
    models += [
        (f"teachers.{at}", spec.backend, model)
        for at, (spec, model) in enumerate(zip(recipe.teachers, inputs.others, strict=True))
    ]
    if recipe.student.model != "teacher":
        models.append(("student", "transformers", inputs.student))
    for table, backend, model in models:
        if model.kind == SERVED_KIND:
            continue
        key = f"{table}.chat_template"
        if model.template is not None:
            warnings += check_rows(model, files_of_rows(inputs), key=key, recipe=inputs.path)
        elif model.facts.template is False:
            gguf = backend == "llama_cpp"
            raise RecipeError(
                f"{model.source} has no chat template: nothing says where an answer begins and ends",
                "take the GGUF file of an instruction-tuned model" if gguf else _remedy(inputs, model, table),
                key=f"{table}.model" if gguf else key,
                file=inputs.path,
            )
    _refuse_other_prompts(inputs)
    return warnings


def _remedy(inputs: Inputs, model: Resolved, table: str) -> str:
    """Return what to write for a model that has no template."""
    name = "chatml" if set(CHATML_TOKENS) <= special_tokens(model.path) else "plain"
    teacher = inputs.teacher
    told = teacher.facts.template and teacher.facts.tokenizer == model.facts.tokenizer and teacher.kind != SERVED_KIND
    if table == "student" and told and teacher.path != model.path:
        name = TEACHER
    return f'set {table}.chat_template = "{name}", or name a Jinja file'


def _refuse_other_prompts(inputs: Inputs) -> None:
    """Refuse stored distributions of a teacher that is shown other prompts than its student: they stand in no row of it."""
    recipe, teacher, student = inputs.recipe, inputs.teacher, inputs.student
    both = all(one.template is not None or one.facts.template for one in (teacher, student))
    if (
        not (both and recipe.stores_targets)
        or (recipe.teacher.backend, inputs.server) != ("transformers", None)
        or (teacher.digest, teacher.template) == (student.digest, student.template)
        or tokens_differ(teacher, student, inputs.prompts)
    ):
        return
    try:
        one, other = read_chat(teacher), read_chat(student)
        for row in inputs.prompts[:COMPARED]:
            if one.render(row.messages, row.tools) != other.render(row.messages, row.tools):
                raise RecipeError(
                    f"row {row.id!r}: {recipe.teacher.model} and {recipe.student.model} have chat templates that print it "
                    "differently: what the teacher gives after its prompt is of no use after the student's",
                    f'set student.chat_template = "{TEACHER}", or score.kind = "dense"',
                    key="student.chat_template",
                    file=inputs.path,
                )
    except RecipeError:
        raise
    except UsageError:  # of tools, or of a system message: refused by row and file further on
        return
