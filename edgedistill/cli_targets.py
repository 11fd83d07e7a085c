"""The verbs ``targets …``: the profiles there are, one for this machine, and what types cost on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Hardware profiles.")
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


@app.command("list")
def targets_list(as_json: JsonOption = False) -> None:
    """List the profiles: the packaged ones, and those of ./targets, which go before them."""
    from edgedistill.tables import print_table, targets_table
    from edgedistill.target import list_targets

    found = list_targets(Path(), lambda error: typer.echo(f"left out: {error}", err=True))
    if as_json:
        _print_json([{"name": target.name, **target.model_dump(mode="json")} for target in found])
    else:
        print_table(targets_table(found))


@app.command("show")
def targets_show(name: str, as_json: JsonOption = False) -> None:
    """Print one profile."""
    from edgedistill.target import find_target, to_toml

    target = find_target(name, Path())
    if as_json:
        _print_json({"name": target.name, **target.model_dump(mode="json")})
    else:
        typer.echo(target.path.read_text() if target.path else to_toml(target), nl=False)


@app.command("check")
def targets_check(path: Path) -> None:
    """Check a profile of your own."""
    from edgedistill.target import check_target

    target = check_target(path)
    typer.echo(f"{path}: fine ({target.summary})")


@app.command("detect")
def targets_detect(as_json: JsonOption = False) -> None:
    """Print a profile of this machine's class, to be saved under targets/."""
    from edgedistill.target import detect, to_toml

    target = detect()
    if as_json:
        _print_json(target.model_dump(mode="json"))
    else:
        typer.echo(to_toml(target), nl=False)


@app.command("kernels")
def targets_kernels(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the JSON file; runtime.kernels of a profile names it")
    ],
    threads: Annotated[int, typer.Option(min=0, help="threads, as the profile has them; 0: all cores")] = 0,
    types: Annotated[
        str | None, typer.Option(help="these types alone: Q4_0,Q5_K,… (default: all that auto knows)")
    ] = None,
    rounds: Annotated[int, typer.Option("-r", "--rounds", min=2, help="rounds, each in processes of its own")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure what each type's kernels cost on this machine, so that type "auto" keeps to speeds (some minutes)."""
    from edgedistill.devices.kernels import kernels_rows, measure_kernels
    from edgedistill.errors import UsageError
    from edgedistill.formats.gguf.types import PALETTE
    from edgedistill.tables import Sheet, print_table

    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder", f"mkdir -p {output.parent}")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder, and a file is to be written", f"-o {output / 'kernels.json'}")
    names = [name for name in (types or "").split(",") if name] or PALETTE

    def progress(done: int, total: int, told: str) -> None:
        typer.echo(f"{done + 1}/{total} {told}", err=True)

    kernels = measure_kernels(names, threads=threads or None, rounds=rounds, progress=progress)
    output.write_text(json.dumps(kernels.to_json(), indent=1) + "\n")
    typer.echo(
        f"written: {output}" + (" (noisy: measure again when nothing else runs)" if kernels.noise else ""), err=True
    )
    if as_json:
        _print_json(kernels.to_json())
        return
    rows, notes = kernels_rows(kernels)
    columns = ("type", "bpw", "pp512 ps/weight", "spread", "tg128 ps/weight", "spread")
    print_table(Sheet(title="", columns=columns, rows=rows, right=frozenset(range(1, 6)), notes=notes))
