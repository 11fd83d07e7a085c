"""What can be refused of metrics and filters before anything runs: libraries, files and models that are not there."""

from __future__ import annotations

from collections.abc import Iterator

from edgedistill.data.labels import read_label
from edgedistill.data.language import LANGUAGES
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import BLOCKS, split
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import mathematics
from edgedistill.evals.metrics import LABEL, METRICS
from edgedistill.inputs import Inputs, keyed_metric, placed
from edgedistill.model_facts import labels_of
from edgedistill.pooling import pooling_of

READ = {name for name, one in METRICS.items() if one.function and one.reads_reference and not one.needs_problem} - {
    LABEL,
    "math-verify",
}
"""Metrics that may refuse a reference, and whose reading costs next to nothing."""


def refuse_metrics(inputs: Inputs) -> None:
    """Refuse math-verify without the library, functions of the user's that are not there, and references that cannot be read. Those
    of math-verify are read by the step: importing what parses them takes longer than a plan.
    """
    thinks = inputs.recipe.generate.style in BLOCKS
    for key, metric, files, rows in _metrics(inputs):
        keyed_metric(inputs, metric, key)
        if metric == "math-verify" and not mathematics.installed():
            raise RecipeError("math-verify is not installed", mathematics.INSTALL, key=key, file=inputs.path)
        for row in rows if metric == LABEL else ():
            if inputs.recipe.labels is None or read_label(row.reference or "", inputs.recipe.labels.names) is None:
                raise RecipeError(
                    f"{placed(inputs, files, row)}: the reference {row.reference!r} is none of labels.names",
                    "add it there, or correct the row",
                    key=key,
                    file=inputs.path,
                )
        for row in rows if metric in READ else ():
            if row.reference is None:  # the filter says what becomes of such a row
                continue
            try:
                METRICS[metric]("", split(row.reference).answer if thinks else row.reference)
            except UsageError as error:
                where = placed(inputs, files, row)
                raise RecipeError(f"{where}: {error.message}", error.hint, key=key, file=inputs.path) from None


def warn_of_labels(inputs: Inputs) -> list[str]:
    """Warn where the teacher is taught to answer with a label alone, and then asked for more."""
    labels, known = inputs.recipe.labels, [row.reference for row in inputs.gold if row.reference]
    if labels is None or not labels.ask or not known or any(read_label(one, labels.names) is None for one in known):
        return []
    return [
        f'adapt.files teaches the teacher to answer with a label, and labels.by = "{labels.by}" asks it for more: expect few '
        'answers that can be read; "samples" and "logits" ask for nothing else, or leave [adapt] out'
    ]


def refuse_languages(inputs: Inputs) -> None:
    """Refuse languages that are not told apart."""
    for at, one in enumerate(inputs.recipe.filter):
        if missing := [code for code in one.languages if code not in LANGUAGES]:
            raise RecipeError(
                f"there is no language {missing[0]!r} among those that are told apart",
                f"known: {' '.join(LANGUAGES)}",
                key=f"filter.{at}.languages",
                file=inputs.path,
            )


def refuse_graders(inputs: Inputs) -> None:
    """Refuse filters by a model whose weights are not here, classifiers with other labels, and a judge that cannot be run."""
    from edgedistill.teachers.vllm import find_python

    recipe = inputs.recipe
    away = "stands behind a server" if recipe.teacher.backend == "openai" else "is a GGUF file that llama.cpp runs"
    for at, one in enumerate(recipe.filter):
        told: tuple[str, str] | None = None
        if one.kind == "perplexity" and one.model == "teacher" and recipe.teacher.backend != "transformers":
            told = (f"the teacher {away}: its weights are not here", 'take "student", or a source of weights')
        elif one.kind == "reward" and one.model and one.model in inputs.graders:
            labels = labels_of(inputs.graders[one.model].path)
            if len(labels) == 1 and one.label is not None:
                told = (f"{one.model} gives one score and has no labels", f"leave filter.{at}.label out")
            elif len(labels) > 1 and one.label not in labels:
                told = (f"{one.model} has several labels: {', '.join(labels)}", f"name one: filter.{at}.label")
        elif one.kind == "duplicates" and one.model is not None:
            try:
                pooling_of(inputs.graders[one.model].path, one.pooling)
            except UsageError as error:
                told = (error.message, error.hint or "")
        if told is not None:
            raise RecipeError(*told, key=f"filter.{at}.model", file=inputs.path)
    judge, model = recipe.judge, inputs.judge
    if judge is not None and judge.vllm is not None and find_python() is None:
        raise RecipeError(
            "vLLM is not installed", "edgedistill doctor --install vllm", key="judge.vllm", file=inputs.path
        )
    if judge is not None and model is not None and judge.backend == "llama_cpp" and not model.path.is_file():
        raise RecipeError(f"{model.path} is no GGUF file", "leave backend out", key="judge.backend", file=inputs.path)


def _metrics(inputs: Inputs) -> Iterator[tuple[str, str, str, tuple[Row, ...]]]:
    """Yield each metric that is used, with its key, and the rows whose references it reads, after the key of their files."""
    for name, suite in inputs.recipe.suites.items():
        yield f"suites.{name}.metric", suite.metric, f"suites.{name}.files", inputs.suites[name]
    for at, one in enumerate(inputs.recipe.filter):
        if one.kind in ("reference", "agreement"):
            yield f"filter.{at}.metric", one.metric, "prompts.files", inputs.prompts if one.kind == "reference" else ()
