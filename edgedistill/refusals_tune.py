"""What is refused of ``[tune]``."""

from __future__ import annotations

from edgedistill.errors import RecipeError
from edgedistill.inputs import FEWEST, Inputs, all_targets, student_facts
from edgedistill.target import AUTO


def refuse_tuning(inputs: Inputs) -> list[str]:
    """Refuse to tune what cannot be dequantized, what has no blocks to tune, and too few rows; warn where the text was taught."""
    tune = inputs.recipe.tune
    if tune is None:
        return []
    told: tuple[str, str] | None = None
    for target in all_targets(inputs):
        if target.name in tune.targets and target.runtime.format != "gguf":
            told = (
                f"{target.name} is an ONNX target: {tune.parts} are tuned in GGUF files",
                "take it out of tune.targets",
            )
    if inputs.student.facts.architecture != "llama":
        family = inputs.student.facts.architecture
        told = (f"{tune.parts} are tuned in files of the llama family, and the student is {family}", "leave [tune] out")
    if told is None and tune.parts == "weights":
        told = _untunable(inputs)
    if told is not None:
        raise RecipeError(*told, key="tune.targets", file=inputs.path)
    if len(inputs.tuning) < FEWEST:
        raise RecipeError(
            f"{len(inputs.tuning)} rows are too few to tune {tune.parts} on: one in five is held out",
            f"give at least {FEWEST}",
            key="tune.rows" if tune.rows else "tune.files",
            file=inputs.path,
        )
    taught = {row.id for row in (*inputs.prompts, *inputs.gold, *inputs.healing)}
    seen = sum(row.id in taught for row in inputs.tuning)
    if not seen:
        return []
    return [
        f"{seen} of {len(inputs.tuning)} rows of [tune] are taught before: what rounding did shows little on them (tune.skip)"
    ]


def _untunable(inputs: Inputs) -> tuple[str, str] | None:
    """Say which target's file has no matrix whose blocks can be trained, and what to do; None where all have one."""
    from edgedistill.formats.gguf.types import FINELY_ROUNDED, plan_tensors, tensor_shapes

    tune = inputs.recipe.tune
    assert tune is not None
    shapes = tensor_shapes(student_facts(inputs).config())
    for target in all_targets(inputs):
        types = target.quantize
        if target.name not in tune.targets or types.type == AUTO:
            continue
        tensors = plan_tensors(
            shapes,
            types.type,
            imatrix=types.imatrix,
            output_type=types.output_type,
            embedding_type=types.embedding_type,
        )
        if not any(one.got in FINELY_ROUNDED and len(one.shape) == 2 for one in tensors):
            return (
                f'no matrix of {target.name} in {types.type} has blocks that parts = "weights" can train: these are '
                + ", ".join(FINELY_ROUNDED),
                f'set tune.parts = "norms", or quantize.{target.name}.type to one of these',
            )
    return None
