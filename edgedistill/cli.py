"""The verbs: parse, call, print. Importing this module imports no torch, and nothing that a verb alone needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedistill import __version__
from edgedistill.cli_data import app as data_app
from edgedistill.cli_exchange import app as exchange_app
from edgedistill.cli_review import app as review_app
from edgedistill.cli_store import app as store_app
from edgedistill.cli_targets import app as targets_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Build small language models for a device: distil, merge, quantize, and verify before it ships.",
)
app.add_typer(targets_app, name="targets")
app.add_typer(store_app, name="store")
app.add_typer(data_app, name="data")
app.add_typer(exchange_app)
app.add_typer(review_app)

_verbose = False

RecipeArgument = Annotated[Path, typer.Argument(help="recipe.toml, or the folder that holds it")]
TargetOption = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="build for this target only (repeatable)")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override a recipe key: distill.lr=1e-4 (repeatable)")
]
ForceOption = Annotated[list[str] | None, typer.Option("--force", help="run this step again (repeatable)")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgedistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="show the traceback of an error")] = False,
) -> None:
    global _verbose
    _verbose = verbose


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _session(recipe: Path, targets: list[str] | None, sets: list[str] | None, *, ship_anyway: bool = False) -> Any:
    from edgedistill.session import prepare
    from edgedistill.toml_source import parse_override

    overrides = dict(parse_override(text) for text in sets or [])
    return prepare(recipe, targets=targets or (), overrides=overrides, ship_anyway=ship_anyway, note=_note)


# ── recipes ──


@data_app.command("pairs")
def data_pairs(
    recipe: RecipeArgument = Path(),
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the JSONL file; stdout when left out")] = None,
) -> None:
    """Write kept answers beside rejected ones, as TRL's preference trainers take them."""
    from edgedistill.data.pairs import preference_pairs
    from edgedistill.data.sources import write_lines
    from edgedistill.errors import UsageError

    session = _session(recipe, None, set_)
    entry = session.store.load(session.plan.match("filter")[0].key)
    if entry is None:
        raise UsageError("the answers are not filtered yet", f"edgedistill build {recipe} --until filter")
    pairs = preference_pairs(entry.path)
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in pairs)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_lines(output, text)
    _note(f"{len(pairs)} pairs")


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="packaged recipe")] = "quickstart",
    folder: Annotated[Path | None, typer.Argument(help="where to put it; ./NAME when left out")] = None,
) -> None:
    """Copy a packaged recipe into a folder of your own."""
    from edgedistill.recipes import copy_recipe

    goal = copy_recipe(name, folder or Path(name))
    typer.echo(f"{goal}\nnext: edgedistill plan {goal}, then edgedistill build {goal}")


@app.command()
def plan(
    recipe: RecipeArgument = Path(),
    target: TargetOption = None,
    set_: SetOption = None,
    force: ForceOption = None,
    until: Annotated[str | None, typer.Option(help="up to this step, stage or glob")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show each step: cached or to run, why, and what it will take. Runs nothing."""
    from edgedistill.advice import advise
    from edgedistill.tables import plan_json, plan_table, print_table

    session = _cut(_session(recipe, target, set_), until)
    from edgedistill.runner import check_disk
    from edgedistill.session import rows_of

    rows = rows_of(session, _force(session, force))
    check_disk([row[:2] for row in rows], session.store)
    for warning in session.plan.warnings:
        _note(f"warning: {warning}")
    for line in advise(session.inputs):
        _note(f"advice: {line}")
    _print_json(plan_json(session, rows)) if as_json else print_table(plan_table(session, rows))


def _cut(session: Any, until: str | None) -> Any:
    import dataclasses

    return session if until is None else dataclasses.replace(session, plan=session.plan.only(session.plan.match(until)))


def _force(session: Any, patterns: list[str] | None) -> list[str]:
    return [step.id for pattern in patterns or [] for step in session.plan.match(pattern)]


def _speeds(session: Any) -> list[str]:
    return sorted({step.stage.name for step in session.plan.steps} & {"measure", "speculate"})


@app.command()
def build(
    recipe: RecipeArgument = Path(),
    target: TargetOption = None,
    set_: SetOption = None,
    force: ForceOption = None,
    until: Annotated[str | None, typer.Option(help="stop after this step, stage or glob")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="the same as `plan`")] = False,
    remeasure: Annotated[bool, typer.Option(help="take every speed again")] = False,
    ship_anyway: Annotated[bool, typer.Option(help="package what missed a gate, and record it")] = False,
    require_proof: Annotated[bool, typer.Option(help="exit 4 if a limit of a target is unproved here")] = False,
    threads: Annotated[int, typer.Option(min=0, help="threads; 0: all cores")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Build what is not built yet, measure it, and write dist/<recipe>/<target>/."""
    if dry_run:
        plan(recipe, target, set_, force, until, as_json)
        return
    from edgedistill.runner import check_disk
    from edgedistill.session import publish, rows_of
    from edgedistill.tables import build_json, build_table, print_table
    from edgedistill.ui import TerminalReporter

    session = _cut(_session(recipe, target, set_, ship_anyway=ship_anyway), until)
    forced = _force(session, force) + (_force(session, _speeds(session)) if remeasure else [])
    check_disk([row[:2] for row in rows_of(session, forced)], session.store)
    for warning in session.plan.warnings:
        _note(f"warning: {warning}")
    from edgedistill.runner import Runner

    outcome = Runner(session.plan, session.store, TerminalReporter(), threads=threads).build(force=forced)
    folders = publish(session, outcome, _note)
    _note(f"{len(outcome.ran)} steps run, {len(outcome.cached)} cached, {outcome.seconds:.1f} s")
    _print_json(build_json(session, outcome, folders)) if as_json else print_table(
        build_table(session, outcome, folders)
    )
    unproved = require_proof and _unproved(session)
    raise typer.Exit(outcome.exit_code or (4 if unproved else 0))


def _unproved(session: Any) -> bool:
    from edgedistill.tables import gate_lines

    lines = [line for _, line in gate_lines(session) if line["status"] == "unproved"]
    for line in lines:
        _note(f"unproved: {line['name']}: {line['why']}")
    return bool(lines)


@app.command()
def sweep(
    recipe: RecipeArgument = Path(),
    over: Annotated[
        list[str] | None,
        typer.Option(help="a key and its values: distill.lora.rank=8,16,32 (repeatable); [sweep] when left out"),
    ] = None,
    target: TargetOption = None,
    set_: SetOption = None,
    threads: Annotated[int, typer.Option(min=0, help="threads; 0: all cores")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Build a recipe with several values of some keys, and say which are worth it."""
    from edgedistill.recipe import load_recipe
    from edgedistill.runner import check_disk, worst
    from edgedistill.session import recipe_path, rows_of
    from edgedistill.sweep import build as build_points
    from edgedistill.sweep import parse_all_over, plan_points, read, sheet
    from edgedistill.sweep_teachers import teachers_sheet
    from edgedistill.tables import print_table
    from edgedistill.toml_source import parse_override
    from edgedistill.ui import TerminalReporter

    overrides = dict(parse_override(text) for text in set_ or [])
    values = parse_all_over(over or []) or load_recipe(recipe_path(recipe), overrides).sweep
    points = plan_points(recipe, values, targets=target or (), overrides=overrides, note=_note)
    for warning in dict.fromkeys(text for point in points for text in point.session.plan.warnings):
        _note(f"warning: {warning}")
    for point in points:
        check_disk([row[:2] for row in rows_of(point.session)], point.session.store)
    outcomes = build_points(points, reporter=TerminalReporter, say=_note, threads=threads)
    lines = read(points)
    if as_json:
        _print_json([line.to_json() for line in lines])
    elif lines:
        print_table(sheet(lines))
        if (teachers := teachers_sheet(lines)) is not None:
            print_table(teachers)
    raise typer.Exit(worst(outcome.exit_code for outcome in outcomes))


@app.command()
def explain(
    step: Annotated[str, typer.Argument(help="step, stage or glob: distill/1, quantize/phone-midrange, convert/*")],
    recipe: RecipeArgument = Path(),
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a step is made from, whether it is cached and why, where its entry lies, and what it found."""
    from edgedistill.tables import explain_json, print_explain

    session = _session(recipe, None, set_)
    found = explain_json(session, session.plan.match(step))
    _print_json(found) if as_json else print_explain(found)


@app.command()
def report(
    recipe: RecipeArgument = Path(),
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the HTML page; dist/<recipe>/report.html when left out")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="write the training logs to this folder as event files too")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the build as a table and write one self-contained HTML page."""
    from edgedistill.report import collect, write_html
    from edgedistill.tables import print_table, report_tables

    session = _session(recipe, None, set_)
    if tensorboard is not None:
        from edgedistill.tensorboard import write_events

        count = len(write_events(session, tensorboard))
        _note(f"{count} training logs: tensorboard --logdir {tensorboard}")
    data = collect(session)
    page = output or session.path.parent / "dist" / session.recipe.name / "report.html"
    write_html(data, page)
    if as_json:
        _print_json(data.to_json())
    else:
        for table in report_tables(data):
            print_table(table)
    _note(f"page: {page}")


@app.command()
def schema(what: Annotated[str, typer.Argument(help="recipe or target")] = "recipe") -> None:
    """Print the JSON Schema of recipes or targets, for editors."""
    from edgedistill.errors import UsageError

    if what not in ("recipe", "target"):
        raise UsageError(f"no schema of {what!r}", "edgedistill schema recipe, or edgedistill schema target")
    from edgedistill.toml_source import schema as json_schema

    if what == "recipe":
        from edgedistill.recipe import Recipe as model
    else:
        from edgedistill.target import Target as model
    _print_json(json_schema(model))


# ── models that you have ──


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="HF folder, f16/bf16/f32 GGUF, or a source (hf:, path:, pypi:, gguf:)")],
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="profile (repeatable)")] = None,
    types: Annotated[str | None, typer.Option(help="types instead of targets: Q4_K_M,Q8_0,… or auto")] = None,
    size: Annotated[str | None, typer.Option(help="auto: most bytes of the file, such as '90 MiB'")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the files")] = Path("quantized"),
    calibration: Annotated[
        Path | None, typer.Option(help="rows (JSONL, JSON, CSV, Parquet) or plain text for the importance matrix")
    ] = None,
    general: Annotated[
        int,
        typer.Option(
            min=0, max=1000, help="GGUF: conversations beside it, or alone, that the model writes itself (64)"
        ),
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what auto chooses, and make no file")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model for targets or to types, without a recipe; checked before it is handed over. Exits 4 where a file is larger
    than its target's limit.
    """
    from edgedistill.errors import GateMissed
    from edgedistill.quantize_model import quantize_model
    from edgedistill.tables import print_table, quantize_table
    from edgedistill.ui import TerminalReporter

    names = [name for name in (types or "").split(",") if name]
    results = quantize_model(
        model, targets=target or [], types=names, out=output, calibration=calibration, general=general, size=size,
        reporter=TerminalReporter(raised=True), dry_run=dry_run,
    )  # fmt: skip
    _print_json([result.to_json() for result in results]) if as_json else print_table(quantize_table(results))
    if over := [result.over for result in results if result.over]:
        raise GateMissed(
            "; ".join(over), "take a smaller type or model: --types auto --size SIZE, or raise limits.file_size"
        )


@app.command()
def bench(
    artifact: Annotated[list[Path], typer.Argument(help="GGUF files, ONNX folders, or packages under dist/")],
    threads: Annotated[int, typer.Option(min=0, help="threads; 0: all cores")] = 0,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="samples of each figure")] = 5,
    context: Annotated[int, typer.Option(min=128, help="tokens of context")] = 2048,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="GGUF: type of the KV cache, q8_0 or q8_0,q4_0 (keys, values); a package's own, else f16"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure pp512, tg128, time to first token and memory on this machine."""
    from edgedistill.artifact import cache_of, model_of
    from edgedistill.devices.host import usable_cores
    from edgedistill.devices.local import measure
    from edgedistill.devices.protocol import Settings
    from edgedistill.devices.table import bench_table
    from edgedistill.tables import print_table

    caches = [cache_of(path, kv_cache) for path in artifact]
    options: dict[str, Any] = {"threads": threads or usable_cores(), "context": context, "reps": repetitions}
    found = [
        measure(model_of(path), Settings(**options, kv=kv), prompts=_chat(model_of(path)))
        for path, kv in zip(artifact, caches, strict=True)
    ]
    _print_json([m.to_json() for m in found]) if as_json else print_table(bench_table(found))


def _chat(model: Path) -> list[list[dict[str, str]]]:
    """Short chat requests for time to first token, where no suite brings the user's own; none for a model that takes none."""
    from edgedistill.artifact import has_chat_template

    if not has_chat_template(model):
        _note(f"{model}: no chat template, so no time to first token")
        return []
    asked = ["What is the capital of France?", "Write one sentence about the sea.", "How many days are in a leap year?"]
    return [[{"role": "user", "content": text}] for text in asked * 4]


# ── store, machine ──


@app.command()
def doctor(
    install: Annotated[str | None, typer.Option(help="vllm: make the environment that teacher.vllm needs")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, which engines and instruction sets work, and the command that mends what is missing."""
    if install is not None:
        _install(install)
        return
    from edgedistill.doctor import diagnose
    from edgedistill.store import default_root
    from edgedistill.tables import doctor_table, print_table

    checks = diagnose(default_root())
    if as_json:
        _print_json([vars(check) for check in checks])
    else:
        print_table(doctor_table(checks))
    raise typer.Exit(0 if all(check.ok is not False for check in checks) else 3)


def _install(part: str) -> None:
    from edgedistill.errors import UsageError
    from edgedistill.teachers import vllm

    if part != "vllm":
        raise UsageError(f"doctor installs no {part!r}", "edgedistill doctor --install vllm")
    typer.echo(vllm.install(vllm.home(), cuda=vllm.has_gpu(), note=_note))


def main() -> None:
    """Run the command line: errors become one message and an exit code; Ctrl-C loses nothing."""
    import errno
    import traceback

    from edgedistill.errors import EdgeDistillError

    try:
        app()
    except EdgeDistillError as error:
        from edgedistill.ui import show_error

        if _verbose:
            traceback.print_exc()
        show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on from here", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if _verbose:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            place = error.filename or "a file"
            hint = "df -h" if error.errno == errno.ENOSPC else f"ls -l {place}"
            typer.echo(f"error: {place}: {error.strerror}\n  try: {hint}", err=True)
            sys.exit(2)
        typer.echo(
            f"error: {type(error).__name__}: {error}\n  this is a bug; edgedistill -v shows the traceback", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
