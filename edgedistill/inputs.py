"""Everything that a plan is made of, read from disk."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedistill.chat import read_chat
from edgedistill.data.columns import ColumnError, Columns
from edgedistill.data.corrections import WRONG
from edgedistill.data.prompts import Row, picked, placed_rows
from edgedistill.data.sources import is_source
from edgedistill.data.thinking import asking_why, two_tasks, with_block
from edgedistill.data.traces import Render, turns
from edgedistill.data.verdicts import Verdict, read_verdicts
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import own_metric
from edgedistill.fingerprint import file_digest
from edgedistill.model_facts import ModelFacts
from edgedistill.models import HubFile, Resolved
from edgedistill.recipe import Adapt, Heal, Prompts, Recipe, Student, Suite, Temperature, Tune
from edgedistill.recipe_base import Shaped, Tabled, Training
from edgedistill.recipe_distill import Distill, Keep
from edgedistill.recipe_draft import Draft
from edgedistill.recipe_tune import OtherText
from edgedistill.served import Server
from edgedistill.target import Target
from edgedistill.training.shaping import choose_layers

TRACES = "tool-trace"  # the style whose rows are whole traces
_KEPT = 16 << 20  # bytes of a file whose rows the process keeps
FEWEST = 10  # general rows, and those of [tune]: one in five is held out, and an interval needs two


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
    others: tuple[Resolved, ...] = ()
    """The models of ``recipe.teachers``, in their order."""
    general: tuple[Row, ...] = ()
    tuning_general: tuple[Row, ...] = ()
    graders: Mapping[str, Resolved] = field(default_factory=dict)
    """The models of filters, by their sources, where they are neither teacher nor student."""
    judge: Resolved | None = None
    data: tuple[HubFile, ...] = ()
    """The files of rows that are of data sets of the hub."""
    link_targets: tuple[tuple[Target, ...], ...] = ()
    """Those of each link of the chain, in its order."""
    ship_anyway: bool = False

    @property
    def server(self) -> Server | None:
        """The teacher's, where its weights are not here."""
        return self.teacher.server


@dataclass(frozen=True)
class _Content:
    """A file by what is in it: the next plan of this process (a sweep makes many) need not parse the same bytes again."""

    digest: str
    suffix: str
    path: Path = field(compare=False)


@functools.lru_cache(maxsize=16)
def _parsed(content: _Content, traces: bool, columns: Columns) -> tuple[list[Row], dict[str, str]]:
    return placed_rows(content.path, traces=traces, columns=columns)


def _placed(path: Path, traces: bool, columns: Columns) -> tuple[list[Row], dict[str, str]]:
    """Return `placed_rows` of a file; rows of large ones are not kept, since most are not used."""
    try:
        content = _Content(file_digest(path), path.suffix, path) if 0 < path.stat().st_size <= _KEPT else None
    except OSError:  # a folder, or what the reader has a message for
        content = None
    return _parsed(content, traces, columns) if content else placed_rows(path, traces=traces, columns=columns)


class _Files:
    """Files of rows beside a recipe, each parsed once however many keys name it; ``traces`` where a row is a whole trace."""

    def __init__(self, recipe_path: Path, *, traces: bool = False, fetched: Mapping[str, Path] | None = None) -> None:
        self.recipe_path, self.traces, self.fetched = recipe_path, traces, fetched or {}
        self._read: dict[tuple[Path, bool, Columns], tuple[list[Row], dict[str, str]]] = {}

    def rows(self, file: Path, key: str, columns: Columns, *, reference: bool, tests: bool = False) -> list[Row]:
        path, made = self.fetched.get(str(file)) or self.recipe_path.parent / file, columns.made()
        try:
            if (path, reference, made) not in self._read:
                self._check(path, file, key)
                self._read[path, reference, made] = _placed(path, self.traces, made)
            return picked(*self._read[path, reference, made], path, columns, need_reference=reference, need_tests=tests)
        except ColumnError as error:
            table = key.removesuffix("files")
            raise RecipeError(error.message, error.hint, file=self.recipe_path, key=table + error.key) from None

    def _check(self, path: Path, file: Path, key: str) -> None:
        if is_source(path) or path.is_dir():  # of another folder, its reader says what to name in it
            return
        told = (f"{path}: no such file", f"create it, or mend {key}")
        raise RecipeError(*told, file=self.recipe_path, key=key)


def _read_rows(
    source: _Files,
    section: Tabled,
    limit: int | Sequence[int] | None,
    key: str,
    *,
    reference: bool,
    tests: bool = False,
    skip: int | Sequence[int] = 0,
) -> tuple[Row, ...]:
    """Read the rows of a table's files, the first ``limit`` of each after ``skip`` (one count for all files, or one for
    each); the key is named in errors.
    """
    rows: list[Row] = []
    limits = limit if isinstance(limit, Sequence) else [limit] * len(section.files)
    skips = skip if isinstance(skip, Sequence) else [skip] * len(section.files)
    for file, most, first in zip(section.files, limits, skips, strict=True):
        found = source.rows(file, key, section.columns, reference=reference, tests=tests)
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
    others: Iterable[Resolved] = (),
    link_targets: Iterable[Iterable[Target]] = (),
    ship_anyway: bool = False,
    graders: Mapping[str, Resolved] | None = None,
    judge: Resolved | None = None,
    data: Iterable[HubFile] = (),
) -> Inputs:
    """Read the data files of a recipe. ``data`` are those of the hub that it names."""
    style, data = recipe.generate.style, tuple(data)
    fetched = {one.source: one.path for one in data}
    source = _Files(path, traces=style == TRACES, fetched=fetched)
    judged = any((f.kind == "reference" and f.missing == "reject") or f.against for f in recipe.filter)
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
        tests = name == "prompts" and any(f.kind == "execution" for f in recipe.filter)
        rows = _read_rows(source, section, section.rows, f"{name}.files", reference=reference, tests=tests, skip=skip)
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

    def suite_rows(name: str, suite: Suite) -> tuple[Row, ...]:
        tests = suite.metric == "execution"
        rows = _read_rows(source, suite, None, f"suites.{name}.files", reference=True, tests=tests)
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
        suites={name: suite_rows(name, suite) for name, suite in recipe.suites.items()},
        others=tuple(others),
        general=_general(_Files(path, fetched=fetched), recipe.distill.keep, "distill.keep"),
        tuning_general=_general(_Files(path, fetched=fetched), recipe.tune and recipe.tune.general, "tune.general"),
        link_targets=tuple(map(tuple, link_targets)),
        ship_anyway=ship_anyway,
        graders=graders or {},
        judge=judge,
        data=data,
    )


def _general(source: _Files, section: Keep | OtherText | None, name: str) -> tuple[Row, ...]:
    """Read rows of other text, which ``name`` is the key of: as they are, for they are no task and have no style of answering."""
    if section is None:
        return ()
    rows = _read_rows(source, section, section.rows, f"{name}.files", reference=True)
    if len(rows) < FEWEST:
        raise RecipeError(
            f"{len(rows)} general rows are too few to keep anything by",
            f"give at least {FEWEST}, of many kinds",
            key=f"{name}.rows" if section.rows else f"{name}.files",
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


def keyed_metric(inputs: Inputs, name: str, key: str) -> str:
    """Return a metric's name as a step's key holds it: that of a function of the user's with a digest. Raises RecipeError."""
    if not name.startswith(own_metric.PREFIX):
        return name
    try:
        return own_metric.keyed_name(name, inputs.path.parent)
    except UsageError as error:
        raise RecipeError(error.message, error.hint, key=key, file=inputs.path) from None


def read_reviews(inputs: Inputs) -> dict[Path, dict[str, Verdict]]:
    """Read the files of verdicts that the recipe's filters name, as it names them. Raises RecipeError where one cannot be read."""
    found = {}
    for at, one in enumerate(inputs.recipe.filter):
        if one.file is None:
            continue
        path = inputs.path.parent / one.file
        try:
            if not path.is_file():
                raise UsageError(f"{path}: no such file", f"edgedistill review {inputs.path}")
            found[one.file] = read_verdicts(path)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, key=f"filter.{at}.file", file=inputs.path) from None
    return found


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


def files_of_rows(inputs: Inputs) -> dict[str, tuple[Row, ...]]:
    """Return all rows that a model is shown, by the key of the recipe that names their files."""
    sections = {
        "prompts": inputs.prompts,
        "adapt": inputs.gold,
        "heal": inputs.healing,
        "tune": inputs.tuning,
        "temperature": inputs.tempering,
        "draft": inputs.drafting,
        "distill.keep": inputs.general,
        "tune.general": inputs.tuning_general,
        **{f"suites.{name}": rows for name, rows in inputs.suites.items()},
    }
    return {f"{name}.files": rows for name, rows in sections.items()}


def placed(inputs: Inputs, key: str, row: Row) -> str:
    """Return a row's name with the place that it was read from, for errors: ``data/ood.jsonl:7: row 'o-7'``. ``key`` is one of
    ``files_of_rows``. The files are read once more: rows do not carry their places along for a plan that goes well.
    """
    section: Any = inputs.recipe
    table = key.removesuffix(".files")
    for name in table.split(".", 1) if table.startswith("suites.") else table.split("."):
        section = section[name] if isinstance(section, Mapping) else getattr(section, name)
    # One turn of a trace, and one of two tasks that a row became, stand where that row stands.
    names = (row.id, row.trace, row.id.removesuffix("+why"))
    traces = inputs.recipe.generate.style == TRACES and table not in ("distill.keep", "tune.general")
    fetched = {one.source: one.path for one in inputs.data}
    for file in section.files:
        path = fetched.get(str(file)) or inputs.path.parent / file
        _, spots = _placed(path, traces, section.columns.made())
        if spot := next((spots[name] for name in names if name in spots), ""):
            return f"{path}:{spot}: row {row.id!r}"
    return f"row {row.id!r}"


def sources(inputs: Inputs) -> list[dict[str, Any]]:
    """Return where models and data of the hub come from, each with its role, revision and digest, a model with its licence."""
    models = [
        ("teacher", inputs.teacher),
        *((f"teacher {spec.name}", one) for spec, one in zip(inputs.recipe.teachers, inputs.others, strict=True)),
        ("student", inputs.student),
        *([("judge", inputs.judge)] if inputs.judge else []),
        *(("filter", one) for one in inputs.graders.values()),
    ]
    found: list[dict[str, Any]] = [
        {
            "role": role,
            "source": model.source,
            "revision": model.revision,
            "digest": model.digest,
            "licence": model.facts.licence,
            "quantized_from": model.facts.quantized_from,
        }
        for role, model in models
    ]
    return found + [
        {"role": "data", "source": one.source, "revision": one.revision, "digest": one.digest} for one in inputs.data
    ]


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
