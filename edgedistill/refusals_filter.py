"""What can be refused of metrics and filters before anything runs: libraries, files and models that are not there."""

from __future__ import annotations

from collections.abc import Iterator

from edgedistill.data.language import LANGUAGES
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import mathematics
from edgedistill.evals.metrics import METRICS
from edgedistill.inputs import Inputs, keyed_metric


def refuse_metrics(inputs: Inputs) -> None:
    """Refuse math-verify without the library, functions of the user's that are not there, and references without a number."""
    for key, metric, rows in _metrics(inputs):
        keyed_metric(inputs, metric, key)
        if metric == "math-verify" and not mathematics.installed():
            raise RecipeError("math-verify is not installed", mathematics.INSTALL, key=key, file=inputs.path)
        for row in rows if metric == "numeric" else ():
            try:
                METRICS[metric]("", split(row.reference or "").answer)
            except UsageError as error:
                raise RecipeError(f"row {row.id!r}: {error.message}", error.hint, key=key, file=inputs.path) from None


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


def _metrics(inputs: Inputs) -> Iterator[tuple[str, str, tuple[Row, ...]]]:
    """Yield each metric that is used, with its key and the rows whose references it reads."""
    for name, suite in inputs.recipe.suites.items():
        yield f"suites.{name}.metric", suite.metric, inputs.suites[name]
    for at, one in enumerate(inputs.recipe.filter):
        if one.kind in ("reference", "agreement"):
            yield f"filter.{at}.metric", one.metric, inputs.prompts if one.kind == "reference" else ()
