"""The verbs on what a recipe learns from: ``data make`` writes rows of reasoning-gym's problems, ``data import`` turns files of
others into rows, ``data show`` prints what was kept, or rejected and why, and ``data export`` writes what was kept for others
(``data pairs``: cli.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

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
    from edgedistill.data.sources import write_lines
    from edgedistill.evals.reasoning import make_rows
    from edgedistill.toml_source import parse_override

    settings = dict(parse_override(text) for text in set_ or [])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(task, rows, seed, settings))
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_lines(output, text)
    typer.echo(f"{rows} rows", err=True)


@app.command("show")
def show(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml, or the folder that holds it")] = Path(),
    rejected: Annotated[bool, typer.Option(help="what the filters rejected, with the reason")] = False,
    why: Annotated[str | None, typer.Option(help="rejected: for this reason, or one that starts so: reference")] = None,
    step: Annotated[str, typer.Option(help="which step: filter, filter/round-1, augment/1-evol-instruct")] = "filter",
    rows: Annotated[int, typer.Option("-n", "--rows", min=0, help="so many rows; 0: all")] = 10,
    set_: Annotated[list[str] | None, typer.Option("--set", help="override a recipe key (repeatable)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSONL, whole texts")] = False,
) -> None:
    """Print answers that the filters kept, or rejected and why; of an augmenter the prompts, or what it dropped and why."""
    from edgedistill.errors import UsageError
    from edgedistill.session import prepare
    from edgedistill.tables import Sheet, print_table
    from edgedistill.toml_source import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    session = prepare(recipe, overrides=overrides, note=lambda text: typer.echo(text, err=True))
    found_step = session.plan.match(step)[0]
    entry = session.store.load(found_step.key)
    rejected, prompts = rejected or why is not None, found_step.stage.name == "augment"
    name = ("dropped" if prompts else "rejected") if rejected else ("prompts" if prompts else "kept")
    if entry is None or not (entry.path / f"{name}.jsonl").is_file():
        raise UsageError(f"{step}: nothing is there yet", f"edgedistill build {recipe} --until {step}")
    lines = [json.loads(line) for line in (entry.path / f"{name}.jsonl").open(encoding="utf-8")]
    found = [line for line in lines if why is None or line["why"].startswith(why)]
    shown = found[: rows or None]
    if as_json:
        typer.echo("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in shown), nl=False)
    else:
        column = "why" if rejected else "source"
        if name == "prompts":
            column, found = "made by", [_prompt(line) for line in found]
            shown = found[: rows or None]
        cells = [[line["id"], line[column], " ".join(line["text"].split())[:200]] for line in shown]
        counts: dict[str, int] = {}
        for line in found:
            counts[line[column]] = counts.get(line[column], 0) + 1
        notes = [f"{count} x {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])]
        print_table(Sheet(title="", columns=("id", column, "text"), rows=cells, notes=notes))
    typer.echo(f"{len(shown)} of {len(found)} rows", err=True)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV, TSV, Parquet, or a folder of datasets' save_to_disk")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the JSONL file; stdout when left out")] = None,
    template: Annotated[str | None, typer.Option(help="writes the prompt from the columns: {topic}")] = None,
    system: Annotated[str | None, typer.Option(help="system message of rows that have none")] = None,
    reference: Annotated[str | None, typer.Option(help="the column that holds the wanted answer")] = None,
    split: Annotated[str | None, typer.Option(help="take the rows of this split alone")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="take the rows with this tag (repeatable: any of them)")] = None,
    traces: Annotated[bool, typer.Option(help="keep conversations whole, for the style tool-trace")] = False,
) -> None:
    """Write the rows of a file in another container or form (Alpaca, ShareGPT, OpenAI's, …) as JSONL of ours."""
    from edgedistill.data.columns import Columns, template_problem
    from edgedistill.data.prompts import load_rows
    from edgedistill.data.sources import as_lines, write_records
    from edgedistill.errors import UsageError

    if template is not None and (problem := template_problem(template)):
        raise UsageError(f"--template: {problem}", "--template 'Explain {topic} to a child.'")
    if output is not None and output.suffix != ".jsonl":
        raise UsageError(f"{output}: rows are written as JSONL", f"-o {output.with_suffix('.jsonl')}")
    columns = Columns(template=template, system=system, reference=reference, split=split, tags=tuple(tag or ()))
    found = [row.to_json() for row in load_rows(file, traces=traces, columns=columns)]
    if output is None:
        typer.echo(as_lines(found), nl=False)
    else:
        write_records(output, found)
    references = sum("reference" in row for row in found)
    typer.echo(f"{len(found)} rows, {references} with a reference", err=True)


@app.command("export")
def export(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml, or the folder that holds it")] = Path(),
    as_: Annotated[
        Literal["jsonl", "alpaca", "sharegpt", "parquet"], typer.Option("--as", help="the form of the rows")
    ] = "jsonl",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the file; of the name's ending .json: one list. Else stdout")
    ] = None,
    step: Annotated[str, typer.Option(help="which step of filter: filter, filter/round-1")] = "filter",
    set_: Annotated[list[str] | None, typer.Option("--set", help="override a recipe key (repeatable)")] = None,
) -> None:
    """Write what the filters kept, for other trainers: the text that is learnt is the row's reference."""
    from edgedistill.data.forms import exported
    from edgedistill.data.kept import kept_rows
    from edgedistill.data.sources import as_lines, write_records
    from edgedistill.errors import UsageError
    from edgedistill.session import prepare
    from edgedistill.toml_source import parse_override

    parquet = output is not None and output.suffix == ".parquet"
    if as_ == "parquet" and not parquet:
        raise UsageError("--as parquet: a Parquet file is no text", "-o kept.parquet")
    overrides = dict(parse_override(text) for text in set_ or [])
    session = prepare(recipe, overrides=overrides, note=lambda text: typer.echo(text, err=True))
    entry = session.store.load(session.plan.match(step)[0].key)
    if entry is None or not (entry.path / "kept.jsonl").is_file():
        raise UsageError(f"{step}: nothing is filtered yet", f"edgedistill build {recipe} --until {step}")
    found = exported(kept_rows(entry.path), as_)
    if output is None:
        typer.echo(as_lines(found), nl=False)
    else:
        write_records(output, found)
    typer.echo(f"{len(found)} rows", err=True)


def _prompt(line: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an augmenter as it is shown: its last message, and its tags by which one sees who made it."""
    made = " ".join(line.get("tags", ())) if line.get("seed_id") else "files"
    return {"id": line["id"], "made by": made, "text": str(line["messages"][-1]["content"])}


@app.command("stats")
def stats(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml, or the folder that holds it")] = Path(),
    production: Annotated[
        Path | None,
        typer.Option(
            help="a sample of real traffic, as rows (520 different ones are enough): how far the prompts are from it"
        ),
    ] = None,
    step: Annotated[str, typer.Option(help="which step of filter: filter, filter/round-1")] = "filter",
    set_: Annotated[list[str] | None, typer.Option("--set", help="override a recipe key (repeatable)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="plain values")] = False,
) -> None:
    """Print what the rows cost and what they are: yields, tags, lengths, repeats, leakage, entropy."""
    from edgedistill.data_stats import collect_stats, stats_sheets
    from edgedistill.session import prepare
    from edgedistill.tables import print_table
    from edgedistill.toml_source import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    session = prepare(recipe, overrides=overrides, note=lambda text: typer.echo(text, err=True))
    found = collect_stats(session, step=step, production=production)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for sheet in stats_sheets(found):
        print_table(sheet)
