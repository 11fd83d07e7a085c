"""From a recipe's path to a plan: read, resolve and pin the models, find the targets, expand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from edgedistill.chat_template import named_template
from edgedistill.errors import GateMissed, RecipeError, UsageError
from edgedistill.expand import expand
from edgedistill.inputs import Inputs, read_inputs
from edgedistill.lock import read_lock, write_lock
from edgedistill.model_facts import Task
from edgedistill.models import HubFile, Resolved, fetch_rows, kept, resolve
from edgedistill.plan import Plan, Step
from edgedistill.rates import Rates
from edgedistill.recipe import Recipe, load_recipe
from edgedistill.recipe_base import Tabled
from edgedistill.recipe_teacher import Teacher
from edgedistill.runner import Verdict, assess
from edgedistill.served import KIND as SERVED_KIND
from edgedistill.served import Server, resolve_launched, resolve_served, scored_tokens, server_of
from edgedistill.store import Entry, Store
from edgedistill.target import Target, find_target
from edgedistill.toml_source import with_line

if TYPE_CHECKING:
    from edgedistill.runner import Outcome


@dataclass(frozen=True, kw_only=True)
class Session:
    """A recipe, ready to be shown or built."""

    recipe: Recipe
    path: Path
    store: Store
    inputs: Inputs
    plan: Plan


def recipe_path(given: Path) -> Path:
    """Accept a recipe file or a folder that holds ``recipe.toml``; raises UsageError with how to make one."""
    path = given / "recipe.toml" if given.is_dir() else given
    if not path.is_file():
        raise UsageError(f"{given}: no recipe there", "make one: edgedistill init quickstart")
    return path


def prepare(
    given: Path,
    *,
    targets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    store: Store | None = None,
    ship_anyway: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Session:
    """Read a recipe and make its plan. Brings the models here on the first call, unless the store has them, and pins them in
    ``NAME.lock``.
    """
    path = recipe_path(given)
    try:
        return _prepared(path, targets, overrides or {}, store or Store(), ship_anyway, note)
    except RecipeError as error:
        raise with_line(error, path, overrides or {}) from error.__cause__


def _prepared(
    path: Path,
    targets: Sequence[str],
    overrides: dict[str, Any],
    store: Store,
    ship_anyway: bool,
    note: Callable[[str], None],
) -> Session:
    recipe = load_recipe(path, overrides)
    every = dict.fromkeys((*recipe.targets, *(name for link in recipe.chain for name in link.targets)))
    unknown = [name for name in targets if name not in every]
    if unknown:
        raise UsageError(f"target {unknown[0]!r} is not in the recipe", f"targets of {path}: {', '.join(every)}")

    def chosen(names: Sequence[str], key: str) -> list[Target]:
        return [_target(recipe, name, path, key) for name in names if not targets or name in targets]

    own = chosen(recipe.targets, "targets")
    of_links = [chosen(link.targets, f"chain.{at}.targets") for at, link in enumerate(recipe.chain)]
    (teacher, *others), student = _models(recipe, path, store, note)
    inputs = read_inputs(
        recipe,
        path,
        teacher,
        student,
        own,
        others=others,
        link_targets=of_links,
        ship_anyway=ship_anyway,
        graders=_graders(recipe, path, store, note),
        judge=_judge(recipe, path, student, store, note),
        data=_hub_files(recipe, path, store, note),
    )
    session = Session(recipe=recipe, path=path, store=store, inputs=inputs, plan=expand(inputs))
    if not recipe.compare:
        return session
    from edgedistill.compare import with_arms

    return with_arms(session, overrides, note)


def _target(recipe: Recipe, name: str, path: Path, key: str) -> Target:
    """Find a target that ``key`` names, and apply the recipe's ``[quantize.NAME]``."""
    try:
        target = find_target(name, path.parent)
    except RecipeError:
        raise
    except UsageError as error:
        raise RecipeError(error.message, error.hint, file=path, key=key) from None
    override = recipe.quantize.get(name)
    if override is None:
        return target
    try:
        return target.with_types(override.model_dump(exclude_none=True))
    except UsageError as error:
        raise RecipeError(error.message, error.hint, file=path, key=f"quantize.{name}") from None


def _models(recipe: Recipe, path: Path, store: Store, note: Callable[[str], None]) -> tuple[list[Resolved], Resolved]:
    """Resolve the teachers, the first one first, and the student."""
    lock = path.with_name(f"{recipe.name}.lock")
    pins = read_lock(lock)
    found: dict[str, Resolved] = {}
    of_student = recipe.teacher.model if recipe.student.model == "teacher" else recipe.student.model
    teachers = [(one, server_of(recipe, one)) for one in (recipe.teacher, *recipe.teachers)]
    here = [one.model for one, server in teachers if server is None or server.launch is not None]
    for source in dict.fromkeys((*here, of_student)):
        local = source.split(":", 1)[0] in (
            "path",
            "gguf",
        )  # your own files may change: that is a new build, not an error
        pin = None if local else pins.get(source) or kept(source, store.root, note)
        try:
            found[source] = resolve(source, store.root, base=path.parent, pin=pin, note=note)
        except UsageError as error:
            at = next((at for at, one in enumerate(recipe.teachers) if one.model == source), None)
            key = "student.model" if at is None else f"teachers.{at}.model"
            key = "teacher.model" if source == recipe.teacher.model else key
            raise RecipeError(error.message, error.hint, file=path, key=key) from None
    write_lock(lock, [model for model in found.values() if model.kind not in ("path", "gguf")])
    student = found[of_student]

    def resolved(teacher: Teacher, server: Server | None) -> Resolved:
        if server is None:
            return found[teacher.model]
        if server.launch is not None:
            return resolve_launched(server, found[teacher.model])
        return resolve_served(server, student, store.root, scored=scored_tokens(recipe, teacher))

    asked = [resolved(one, server) for one, server in teachers]
    keys = ("teacher", *(f"teachers.{at}" for at in range(len(recipe.teachers))))
    asked = [
        _shown(model, one.chat_template, key, model, path)
        for model, (one, _), key in zip(asked, teachers, keys, strict=True)
    ]
    if recipe.student.model == "teacher":
        return asked, replace(student, template=asked[0].template)
    student = _shown(student, recipe.student.chat_template, "student", asked[0], path)
    # One without weights here is known by the student's tokens, and its calls become text by the student's template.
    return [replace(one, template=student.template) if one.kind == SERVED_KIND else one for one in asked], student


def _shown(model: Resolved, name: str | None, table: str, teacher: Resolved, recipe: Path) -> Resolved:
    """Return a model with the chat template that its table of the recipe names, if any. Raises RecipeError."""
    if name is None:
        return model
    template = named_template(name, model, teacher, key=f"{table}.chat_template", recipe=recipe)
    return replace(model, template=template)


def _pinned(source: str, recipe: Recipe, path: Path, store: Store, note: Callable[[str], None], task: Task) -> Resolved:
    """Bring a model of a filter here, and pin it as the teacher is."""
    lock, local = path.with_name(f"{recipe.name}.lock"), source.startswith(("path:", "gguf:"))
    pin = None if local else read_lock(lock).get(source) or kept(source, store.root, note)
    model = resolve(source, store.root, base=path.parent, pin=pin, note=note, task=task)
    if not local:
        write_lock(lock, [model])
    return model


def _hub_files(recipe: Recipe, path: Path, store: Store, note: Callable[[str], None]) -> list[HubFile]:
    """Bring the files of rows that are of data sets of the hub here, each once, and pin them. Raises RecipeError."""
    lock, found = path.with_name(f"{recipe.name}.lock"), dict[str, HubFile]()
    for key, source in recipe_files(recipe):
        if not source.startswith("hf:") or source in found:
            continue
        try:
            found[source] = fetch_rows(source, store.root, pin=read_lock(lock, "data").get(source), note=note)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, file=path, key=key) from None
    if found:
        write_lock(lock, list(found.values()), "data")
    return list(found.values())


def recipe_files(section: BaseModel, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, file) for each file of rows that a recipe names, in whatever table."""
    for name in type(section).model_fields:
        value, place = getattr(section, name), f"{key}.{name}".lstrip(".")
        if name == "files" and isinstance(section, Tabled):
            yield from ((place, str(file)) for file in value)
        elif isinstance(value, BaseModel):
            yield from recipe_files(value, place)
        elif isinstance(value, dict):
            for part, one in value.items():
                if isinstance(one, BaseModel):
                    yield from recipe_files(one, f"{place}.{part}")


def _graders(recipe: Recipe, path: Path, store: Store, note: Callable[[str], None]) -> dict[str, Resolved]:
    """Bring the models of filters here that are neither teacher nor student. Raises RecipeError."""
    found: dict[str, Resolved] = {}
    for at, one in enumerate(recipe.filter):
        if one.model is None or (one.kind == "perplexity" and one.model in ("student", "teacher")):
            continue
        try:
            task: Task = {"reward": "classification", "duplicates": "embedding"}.get(one.kind, "text")  # type: ignore[assignment]
            found[one.model] = _pinned(one.model, recipe, path, store, note, task)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, file=path, key=f"filter.{at}.model") from None
    return found


def _judge(recipe: Recipe, path: Path, student: Resolved, store: Store, note: Callable[[str], None]) -> Resolved | None:
    """Bring the judge here, or find out what its server can do; None where the teacher judges. Raises RecipeError."""
    if recipe.judge is None:
        return None
    server = server_of(recipe, recipe.judge)
    try:
        if server is not None and server.launch is None:
            return resolve_served(server, student, store.root, scored=0)
        model = _pinned(recipe.judge.model, recipe, path, store, note, "text")
    except UsageError as error:
        message, hint = (
            text.replace("the teacher's", "the judge's").replace("teacher.", "judge.")
            for text in (error.message, error.hint)
        )
        raise RecipeError(message, hint, file=path, key="judge") from None
    return model if server is None else resolve_launched(server, model)


def rows_of(session: Session, force: Sequence[str] = ()) -> list[tuple[Step, Verdict, float]]:
    """Return every step with its verdict and the seconds it is estimated to take (0 if cached)."""
    rates = Rates(session.store.root)
    verdicts = assess(session.plan, session.store, force=force)
    return [
        (step, verdicts[step.key], 0.0 if verdicts[step.key].status == "cached" else rates.seconds(step.work))
        for step in session.plan.steps
    ]


def publish(session: Session, outcome: Outcome, note: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Hard-link every finished package to ``dist/<recipe>/<target>/`` beside the recipe. Where there is none, what an earlier
    build left there stays, and ``note`` is told so. Raises UsageError where a folder cannot be written.
    """
    published, failed = [], {session.plan.match(name)[0].key: error for name, error in outcome.failed.items()}
    for target, key in session.plan.packages.items():
        folder = session.path.parent / "dist" / session.recipe.name / target
        entry = session.store.load(key) if key not in failed else None
        if entry is None or session.store.inputs_match(entry):  # of an earlier build, whose inputs have changed since
            if (folder / "manifest.json").is_file():
                why = "missed a gate" if isinstance(failed.get(key), GateMissed) else "packaged nothing for this target"
                note(f"{folder} is of an earlier build: this one {why}, and left it as it was")
            continue
        try:
            _link_package(entry, folder)
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot be written ({error.strerror}); the package is in {entry.path}",
                f"make room there, then: edgedistill build {session.path}   # runs nothing anew",
            ) from None
        published.append(folder)
    return published


def _link_package(entry: Entry, folder: Path) -> None:
    """Give a folder the files of an entry, and no others."""
    import os

    for name, record in entry.files.items():
        source, goal = entry.path / name, folder / name
        if goal.exists():
            stat = goal.stat()
            if os.path.samestat(stat, source.stat()) or (stat.st_size, stat.st_mtime_ns) == (
                record.size,
                record.mtime_ns,
            ):
                continue
            goal.unlink()
        goal.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, goal)
        except OSError:  # another disk
            shutil.copy2(source, goal)
    for stale in [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in entry.files]:
        stale.unlink()
