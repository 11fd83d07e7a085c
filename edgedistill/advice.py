"""What the field would expect of a recipe, before anything runs: printed by ``plan``, refuses nothing.

The figures are the literature's rules of thumb for narrow and general tasks, not measurements of this task: the report has those.
"""

from __future__ import annotations

from edgedistill.inputs import Inputs, student_facts
from edgedistill.refusals import GAP
from edgedistill.target import AUTO, format_size


def advise(inputs: Inputs) -> list[str]:
    """Say what score to expect of a student of this size, where quantizing the teacher alone might do, and what no suite tells."""
    return [*_expected(inputs), *_quantizing_alone(inputs), *_forgetting(inputs)]


def _expected(inputs: Inputs) -> list[str]:
    teacher, student = inputs.teacher.facts, student_facts(inputs)
    gap = teacher.params() / student.params()
    if gap < 1.05:
        return []
    if (teacher.architecture, teacher.tokenizer) != (inputs.student.facts.architecture, inputs.student.facts.tokenizer):
        share = "70 to 85 % (another family)"
    elif gap <= GAP:
        share = "85 to 95 % (same family)"
    else:
        share = "60 to 80 % at a tenth of the size, the hardest questions worst"
    return [
        f"the student has {student.params() / 1e6:.0f} million parameters, 1/{gap:.1f} of the teacher's: on a narrow task "
        f"students of that kind usually keep {share} of the teacher's score; gates.min_retention is where to say what is enough"
    ]


def _quantizing_alone(inputs: Inputs) -> list[str]:
    from edgedistill.formats.gguf.types import estimate_file_size

    fits = []
    if inputs.server is not None:
        return []
    for target in inputs.targets:
        limit, quantize = target.limits.file_size, target.quantize
        if target.runtime.format != "gguf" or limit is None or quantize.type == AUTO:
            continue
        options = {"embedding_type": quantize.embedding_type, "output_type": quantize.output_type}
        size = estimate_file_size(
            inputs.teacher.facts.config(), None, quantize.type, imatrix=quantize.imatrix, **options
        )
        if size <= limit:
            fits.append(f"{target.name} ({quantize.type}, about {format_size(size)} of {format_size(limit)})")
    if not fits or inputs.recipe.baselines.quantized_teacher:
        return []
    return [
        f"the teacher itself fits {', '.join(fits)}: where it is fast enough there, quantizing it alone may do; "
        "baselines.quantized_teacher shows it beside the student"
    ]


def _forgetting(inputs: Inputs) -> list[str]:
    if any(suite.metric == "perplexity" for suite in inputs.recipe.suites.values()):
        return []
    return ['no suite has metric = "perplexity": nothing will tell what the student forgets of ordinary text']
