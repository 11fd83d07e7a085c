"""The verbs ``store …``: what the build store holds, whether it is whole, and what may go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The build store.")
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


@app.command("verify")
def store_verify(as_json: JsonOption = False) -> None:
    """Read every entry and compare digests; damaged ones are rebuilt by the next build."""
    from edgedistill.gc import verify_store
    from edgedistill.store import Store

    damaged = verify_store(Store())
    if as_json:
        _print_json(damaged)
    else:
        for line in damaged or ["every entry is whole"]:
            typer.echo(line)
    raise typer.Exit(3 if damaged else 0)


@app.command("list")
def store_list(as_json: JsonOption = False) -> None:
    """List the entries: stage, size, age."""
    from edgedistill.gc import list_store
    from edgedistill.store import Store
    from edgedistill.tables import print_table, store_table

    found = list_store(Store())
    _print_json(found) if as_json else print_table(store_table(found))


@app.command("gc")
def store_gc(
    keep: Annotated[list[Path] | None, typer.Option(help="recipe whose entries stay (repeatable)")] = None,
    everything: Annotated[bool, typer.Option("--all", help="delete every entry; what is built is built anew")] = False,
    rows: Annotated[bool, typer.Option(help="delete the teacher's answers too; they must be paid for again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go")] = False,
) -> None:
    """Delete entries that no kept recipe needs, and abandoned partial work. Answers stay unless --rows."""
    from edgedistill.errors import UsageError
    from edgedistill.gc import collect_garbage, needed
    from edgedistill.store import Store
    from edgedistill.sweep import sessions_of

    if bool(keep) == everything:
        raise UsageError(
            "store gc: name the recipes whose entries stay, or say that none shall",
            "edgedistill store gc --keep RECIPE (repeatable), or --all; with --dry-run it says what would go",
        )
    store = Store()
    keys = {key for path in keep or [] for one in sessions_of(path, store=store) for key in needed(one.plan)}
    removed, freed, answers = collect_garbage(store, keys, rows=rows, dry_run=dry_run)
    verb = "would free" if dry_run else "freed"
    typer.echo(f"{removed} entries, {verb} {freed / 2**20:.0f} MiB" + (f", {answers} answers" if rows else ""))
