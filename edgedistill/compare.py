"""``[compare]``: does the method help? The same recipe with some keys set otherwise, in the same build.

Each line of the table is an arm: the recipe once more with those keys, planned up to the evaluation of its student and joined to
the plan, where it shares every step that the keys do not touch. The report pairs the answers of the two students by row.
``sweep.py`` plans its combinations the same way and is for choosing values; an arm is for showing what a method is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgedistill.errors import RecipeError, UsageError
from edgedistill.fingerprint import Key
from edgedistill.plan import Plan, Step
from edgedistill.toml_lines import key_lines
from edgedistill.toml_source import read_text

if TYPE_CHECKING:
    from edgedistill.session import Session

STUDENT = "evaluate/student"
"""What an arm is built for: its merged student at full precision, scored on every suite."""


def step_of(name: str, arm: str) -> str:
    """Return what a step of an arm goes by: ``distill/1@one answer``."""
    return f"{name}@{arm}"


def flat(keys: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return dotted keys and their values: ``generate.samples = 1`` means the same as ``"generate.samples" = 1``, and leaves
    the rest of ``[generate]`` as it is. An empty table stands for itself.
    """
    found: dict[str, Any] = {}
    for key, value in keys.items():
        dotted = f"{above}.{key}" if above else key
        found |= flat(value, dotted) if isinstance(value, Mapping) and value else {dotted: value}
    return found


def with_arms(session: Session, overrides: Mapping[str, Any], note: Callable[[str], None]) -> Session:
    """Return the session with the steps of its recipe's arms behind its own; ``overrides`` are those of ``--set``.

    Raises RecipeError, with the arm's line, for keys that a recipe may not have, that change nothing of the student, or that
    change what it is scored on.
    """
    from edgedistill.session import prepare

    arms: dict[str, Plan] = {}
    warnings = list(session.plan.warnings)
    for name, keys in session.recipe.compare.items():
        changes = {**_upstream(session, overrides, flat(keys)), **flat(keys)}
        try:
            arm = prepare(
                session.path,
                targets=[target.name for target in session.inputs.targets],
                overrides={**changes, "compare": {}, "baselines": {}},
                store=session.store,
                note=note,
            )
            arms[name] = _checked(session, arm)
        except UsageError as error:
            text = f"{error.key}: {error.said}" if isinstance(error, RecipeError) and error.key else error.message
            raise RecipeError(
                text.removeprefix("--set "),
                error.hint,
                file=session.path,
                line=key_lines(read_text(session.path)).get(("compare", name)),
                key=f"compare.{name}",
            ) from None
        warnings += [f"{name}: {text}" for text in arm.plan.warnings if text not in session.plan.warnings]
    return replace(session, plan=replace(joined(session.plan, arms), warnings=warnings))


def _upstream(session: Session, overrides: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides of an arm of a chain whose links ship: without the tables of what comes after a student, which may name
    targets that the chain has and the arm has not. What ``keys`` set themselves stays.
    """
    if not any(link.targets for link in session.recipe.chain):
        return dict(overrides)
    after: dict[str, Any] = {"quantize": {}, "gates": {}, "tune": None}
    left = {name: empty for name, empty in after.items() if name not in {key.partition(".")[0] for key in keys}}
    return {key: value for key, value in overrides.items() if key.partition(".")[0] not in left} | left


def _checked(session: Session, arm: Session) -> Plan:
    """Return the arm's plan up to its student's evaluation. Raises UsageError where the two students cannot be compared."""
    if session.plan.match(STUDENT)[0].key == arm.plan.match(STUDENT)[0].key:
        raise UsageError(
            "these keys give the same student",
            "set keys of how it is taught or cut; types of targets are compared by `edgedistill sweep`",
        )
    mine, theirs = (
        {name: (suite.files, suite.metric) for name, suite in one.recipe.suites.items() if suite.metric != "perplexity"}
        for one in (session, arm)
    )
    if mine != theirs:
        raise UsageError("the two students would answer different rows, or be judged differently", "leave suites alone")
    if not mine:
        raise UsageError("no suite has a score to compare", "add one whose metric is not perplexity")
    return arm.plan.only(arm.plan.match(STUDENT))


def joined(plan: Plan, arms: Mapping[str, Plan]) -> Plan:
    """Return the plan with the steps of all arms that it has not, each under the names of the arms that need it."""
    own, more = plan.by_key, dict[Key, Step]()
    for name, arm in arms.items():
        for step in arm.steps:
            if step.key not in own:
                before = more[step.key].ids if step.key in more else ()
                more[step.key] = replace(step, ids=(*before, *(step_of(one, name) for one in step.ids)))
    return replace(plan, steps=[*plan.steps, *more.values()])
