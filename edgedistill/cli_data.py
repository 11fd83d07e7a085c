"""The verbs on what a recipe learns from: ``data make`` writes rows of reasoning-gym's problems (``data pairs``: cli.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a recipe learns from.")


@app.command("make")
def make(
    task: Annotated[str, typer.Argument(help="a task of reasoning-gym: chain_sum, products, word_sorting, …")],
    rows: Annotated[int, typer.Option(min=1, max=2**20, help="problems to make")] = 500,
    seed: Annotated[int, typer.Option(min=0, max=2047, help="of the problems: another one for each file")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of the task: max_terms=3 (repeatable)")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the JSONL file; stdout when left out")] = None,
) -> None:
    """Write problems of reasoning-gym as rows, each with what its verifier needs (metric "reasoning-gym")."""
    from edgedistill.evals.reasoning import make_rows
    from edgedistill.toml_source import parse_override

    settings = dict(parse_override(text) for text in set_ or [])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(task, rows, seed, settings))
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    typer.echo(f"{rows} rows", err=True)
