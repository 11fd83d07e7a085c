"""Everything that a plan is made of, read from disk."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.chat import read_chat
from edgedistill.data.corrections import WRONG
from edgedistill.data.prompts import Row, load_rows
from edgedistill.data.thinking import asking_why, two_tasks, with_block
from edgedistill.data.traces import Render, turns
from edgedistill.errors import RecipeError, UsageError
from edgedistill.models import ModelFacts, Resolved
from edgedistill.recipe import Adapt, Draft, Heal, Prompts, Recipe, Student, Temperature, Tune
from edgedistill.recipe_base import Shaped, Training
from edgedistill.recipe_distill import Distill
from edgedistill.served import Server
from edgedistill.target import Target
from edgedistill.training.shaping import choose_layers

TRACES = "tool-trace"  # the style whose rows are whole traces
FEWEST = 10  # general rows: one in five is held out, and an interval needs two


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a plan is made of, read from disk."""

    recipe: Recipe
    path: Path
    teacher: Resolved
    student: Resolved
    targets: tuple[Target, ...]
    prompts: tuple[Row, ...]
    gold: tuple[Row, ...]
    healing: tuple[Row, ...]
    tuning: tuple[Row, ...]
    drafting: tuple[Row, ...]
    tempering: tuple[Row, ...]
    suites: Mapping[str, tuple[Row, ...]]
    general: tuple[Row, ...] = ()
    link_targets: tuple[tuple[Target, ...], ...] = ()
    """Those of each link of the chain, in its order."""
    ship_anyway: bool = False

    @property
    def server(self) -> Server | None:
        """The teacher's, where its weights are not here."""
        return self.teacher.server


class _Files:
    """JSONL files beside a recipe, each parsed once however many keys name it; ``traces`` where a row is a whole trace."""

    def __init__(self, recipe_path: Path, *, traces: bool = False) -> None:
        self.recipe_path, self.traces = recipe_path, traces
        self._read: dict[tuple[Path, bool], list[Row]] = {}

    def rows(self, file: Path, key: str, *, reference: bool) -> list[Row]:
        path = self.recipe_path.parent / file
        if (path, reference) not in self._read:
            if not path.is_file():
                raise RecipeError(f"{path}: no such file", f"create it, or mend {key}", file=self.recipe_path, key=key)
            self._read[path, reference] = load_rows(path, need_reference=reference, traces=self.traces)
        return self._read[path, reference]


def _read_rows(
    source: _Files,
    files: Sequence[Path],
    limit: int | Sequence[int] | None,
    key: str,
    *,
    reference: bool,
    skip: int | Sequence[int] = 0,
) -> tuple[Row, ...]:
    """Read the rows of several JSONL files, the first ``limit`` of each after ``skip`` (one count for all files, or one for
    each); the key is named in errors.
    """
    rows: list[Row] = []
    limits = limit if isinstance(limit, Sequence) else [limit] * len(files)
    skips = skip if isinstance(skip, Sequence) else [skip] * len(files)
    for file, most, first in zip(files, limits, skips, strict=True):
        found = source.rows(file, key, reference=reference)
        if first >= len(found):
            name = f"{key.partition('.')[0]}.skip"
            raise RecipeError(
                f"{name} leaves out {first} rows, and {file} has {len(found)}",
                "skip fewer",
                file=source.recipe_path,
                key=name,
            )
        rows += found[first:][:most]
    _refuse_doubles(rows, key, source.recipe_path)
    return tuple(rows)


def _refuse_doubles(rows: Iterable[Row], key: str, recipe: Path) -> None:
    doubled = [name for name, group in itertools.groupby(sorted(row.id for row in rows)) if len(list(group)) > 1]
    if doubled:
        raise RecipeError(f"two rows have the id {doubled[0]!r}", "make ids unique", file=recipe, key=key)


def read_inputs(
    recipe: Recipe,
    path: Path,
    teacher: Resolved,
    student: Resolved,
    targets: Iterable[Target],
    *,
    link_targets: Iterable[Iterable[Target]] = (),
    ship_anyway: bool = False,
) -> Inputs:
    """Read the data files of a recipe."""
    style = recipe.generate.style
    source = _Files(path, traces=style == TRACES)
    judged = any(f.kind == "reference" and f.missing == "reject" for f in recipe.filter)
    need = judged or recipe.baselines.gold_sft or bool(recipe.round)

    def read(
        section: Prompts | Adapt | Heal | Temperature | Tune | Draft | None,
        name: str,
        *,
        reference: bool = True,
    ) -> tuple[Row, ...]:
        if section is None:
            return ()
        skip = getattr(section, "skip", 0)
        rows = _read_rows(source, section.files, section.rows, f"{name}.files", reference=reference, skip=skip)
        if style == TRACES:
            return by_turn(rows, f"{name}.files")
        if style == "rationale" and name in ("heal", "temperature", "tune"):  # of a student that answers at once
            return two_tasks(rows)
        return with_block(rows, style)

    @functools.cache
    def render() -> Render:
        return read_chat(teacher).render

    def by_turn(rows: Iterable[Row], key: str) -> tuple[Row, ...]:
        try:
            found = turns(rows, render)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, file=path, key=key) from None
        _refuse_doubles(found, key, path)
        return found

    def suite_rows(name: str, files: Sequence[Path]) -> tuple[Row, ...]:
        rows = _read_rows(source, files, None, f"suites.{name}.files", reference=True)
        if style == TRACES:
            return by_turn(rows, f"suites.{name}.files")
        return with_block(rows, "answer" if style == "rationale" else style)

    return Inputs(
        recipe=recipe,
        path=path,
        teacher=teacher,
        student=student,
        targets=tuple(targets),
        prompts=read(recipe.prompts, "prompts", reference=need),
        gold=read(recipe.adapt, "adapt"),
        healing=read(recipe.heal, "heal"),
        tuning=read(recipe.tune, "tune"),
        drafting=read(recipe.draft, "draft", reference=False),
        tempering=read(recipe.temperature, "temperature"),
        suites={name: suite_rows(name, suite.files) for name, suite in recipe.suites.items()},
        general=_general(_Files(path), recipe),
        link_targets=tuple(map(tuple, link_targets)),
        ship_anyway=ship_anyway,
    )


def _general(source: _Files, recipe: Recipe) -> tuple[Row, ...]:
    """Read the rows of ``distill.keep``: as they are, for they are no task and have no style of answering."""
    keep = recipe.distill.keep
    if keep is None:
        return ()
    rows = _read_rows(source, keep.files, keep.rows, "distill.keep.files", reference=True)
    if len(rows) < FEWEST:
        raise RecipeError(
            f"{len(rows)} general rows are too few to keep anything by",
            f"give at least {FEWEST}, of many kinds",
            key="distill.keep.rows" if keep.rows else "distill.keep.files",
            file=source.recipe_path,
        )
    return rows


def read_schema(inputs: Inputs, file: Path, key: str) -> dict[str, Any]:
    """Read a JSON Schema that the recipe names. Raises RecipeError where it is none."""
    from edgedistill.data.filters import schema_validator

    path = inputs.path.parent / file
    told = ("", "")
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(schema, dict):
            schema_validator(schema)
            return schema
        told = (f"{path}: a schema is an object", "https://json-schema.org/learn has examples")
    except OSError as error:
        told = (f"{path}: {error.strerror}", "write the JSON Schema there, or leave the key out")
    except ValueError as error:
        told = (f"{path}: no JSON: {error}", "a schema is one JSON object")
    except UsageError as error:
        told = (f"{path}: {error.message}", error.hint)
    raise RecipeError(*told, key=key, file=inputs.path)


def along_chain(
    inputs: Inputs, check: Callable[[Inputs, str], None] = lambda link, section: None
) -> tuple[Inputs, ...]:
    """Return the inputs of every link of the chain and of the last student, each as if the model before it were its teacher, and
    what it is cut out of, with the targets and gates that it ships by. Without a chain: the inputs themselves. ``check`` sees
    each, and the table of the recipe that it stands in, before the next is made from it.
    """
    if not inputs.recipe.chain:
        check(inputs, "student")
        return (inputs,)
    found: list[Inputs] = []
    facts = inputs.student.facts
    recipe, shapes = inputs.recipe, []
    for link in recipe.chain:
        shapes.append(Student(model="teacher", **{name: getattr(link, name) for name in Shaped.model_fields}))
    gates = [link.gates or recipe.gates for link in recipe.chain]
    targets = inputs.link_targets or ((),) * len(shapes)
    for student, own, ships in zip(
        (*shapes, recipe.student), (*gates, recipe.gates), (*targets, inputs.targets), strict=True
    ):
        one = replace(
            inputs,
            recipe=recipe.model_copy(update={"student": student, "chain": (), "gates": own}),
            targets=ships,
            link_targets=(),
            teacher=replace(inputs.teacher, facts=facts),
            student=replace(inputs.student, facts=facts),
        )
        check(one, f"chain.{len(found)}" if len(found) < len(shapes) else "student")
        found.append(one)
        facts = student_facts(one)
    return tuple(found)


def all_targets(inputs: Inputs) -> tuple[Target, ...]:
    """Return the targets of the last student and of every link, each once."""
    every = (*inputs.targets, *(target for targets in inputs.link_targets for target in targets))
    return tuple({target.name: target for target in every}.values())


def student_facts(inputs: Inputs) -> ModelFacts:
    """Return the facts of the student after shaping."""
    inputs = along_chain(inputs)[-1]
    student, facts = inputs.recipe.student, inputs.student.facts
    return replace(
        facts,
        layers=len(chosen_layers(inputs)),
        hidden=student.hidden or facts.hidden,
        head_dim=facts.head,
        ffn=student.ffn or facts.ffn,
        vocab=student.vocabulary or facts.vocab,
    )


def draft_inputs(inputs: Inputs) -> Inputs:
    """Return the inputs as if the student were the teacher, and its draft the student."""
    draft, facts = inputs.recipe.draft, student_facts(inputs)
    assert draft is not None
    shape = {name: getattr(draft, name) for name in Shaped.model_fields}
    training = {name: getattr(draft, name) for name in (*Training.model_fields, "loss")}
    changes = {
        "student": Student(model="teacher", **shape),
        "chain": (),
        "distill": Distill(method="full", **training),
    }
    return replace(
        inputs,
        recipe=inputs.recipe.model_copy(update=changes),
        teacher=replace(inputs.teacher, facts=facts),
        student=replace(inputs.student, facts=facts),
    )


def taught_rows(inputs: Inputs) -> tuple[Row, ...]:
    """Return all rows that teach teacher or student, each once: their tokens stay in a trimmed vocabulary."""
    if inputs.recipe.student.vocabulary is None:
        return ()
    rows = list({id(row): row for row in (*inputs.healing, *inputs.gold, *inputs.prompts)}.values())
    first = inputs.prompts[0]
    if inputs.recipe.generate.style == "rationale":  # the request for one is text that the student reads
        rows.append(replace(first, id=f"{first.id}+why", messages=tuple(asking_why(first.messages))))
    if any(one.corrections for one in inputs.recipe.filter):  # so is the objection to a wrong answer
        objection = {"role": "user", "content": WRONG}
        rows.append(replace(first, id=f"{first.id}+fix", messages=(*first.messages, objection)))
    if hedge := inputs.recipe.hedge:  # and what is said instead of an answer
        rows.append(replace(first, id=f"{first.id}+hedge", reference=hedge))
    return tuple(rows)


def cut_rows(inputs: Inputs) -> tuple[Row, ...]:
    """Return the rows that tell which neurons, directions and layers the student needs: evenly spaced ones of those that heal it,
    else of those that the teacher is adapted on.
    """
    student = inputs.recipe.student
    if student.ffn is None and student.hidden is None and student.layers_by != "importance":
        return ()
    rows = inputs.healing or inputs.gold
    count = min(inputs.recipe.student.ffn_rows, len(rows))
    return tuple(rows[at * len(rows) // count] for at in range(count))


def chosen_layers(inputs: Inputs) -> tuple[int, ...]:
    """Return which layers of its model the student keeps."""
    layers = inputs.recipe.student.layers
    total = inputs.student.facts.layers
    return tuple(choose_layers(total, total if layers == "all" else layers))


def few_shots(gold: tuple[Row, ...], count: int) -> tuple[dict[str, str], ...]:
    """Choose training examples for the few-shot prompt: the first of each tag, in the order of the file."""
    if not count:
        return ()
    seen: dict[str, Row] = {}
    for row in gold:
        seen.setdefault(row.tags[0] if row.tags else row.id, row)
    return tuple(
        {"prompt": str(row.messages[-1]["content"]), "reference": row.reference or ""}
        for row in list(seen.values())[:count]
    )
