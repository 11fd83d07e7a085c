"""The verbs that trade with other trainers and runtimes: ``export`` to them, ``merge`` what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def export(
    recipe: Annotated[
        Path,
        typer.Argument(help="recipe.toml, or the folder that holds it; gguf-lora: or the folder of a PEFT adapter"),
    ] = Path(),
    to: Annotated[
        str, typer.Option(help="axolotl, unsloth or ms-swift; gguf-lora: the adapter for llama.cpp")
    ] = "axolotl",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a recipe key: distill.lr=1e-4 (repeatable)")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="folder; ./NAME-TOOL when left out; gguf-lora: ./NAME-lora.gguf"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="gguf-lora of an adapter: HF folder or source (hf:, path:) that it was trained on"),
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="gguf-lora: JSONL rows to compare llama.cpp and PEFT on")] = None,
) -> None:
    """Write the student, the kept rows and a configuration for another trainer; or an adapter as a GGUF LoRA file."""
    from edgedistill.errors import UsageError
    from edgedistill.export import export as write
    from edgedistill.lora_file import ADAPTER, TO, export_lora, of_recipe
    from edgedistill.session import prepare
    from edgedistill.toml_source import parse_override

    def note(text: str) -> None:
        typer.echo(text, err=True)

    if to != TO and (base is not None or rows is not None):
        raise UsageError("--base and --rows are for --to gguf-lora", "leave them out")
    if to == TO and (recipe / ADAPTER).is_file():
        if set_:
            raise UsageError(f"--set is for a recipe, and {recipe} is an adapter", "leave it out")
        if base is None:
            raise UsageError(
                f"{recipe} is an adapter, and its base is not named", "--base MODEL: what it was trained on"
            )
        file = output or Path(f"{recipe.resolve().name}-lora.gguf")
        for line in export_lora(base, recipe, file, rows=rows, note=note):
            typer.echo(line)
        return
    overrides = dict(parse_override(text) for text in set_ or [])
    session = prepare(recipe, overrides=overrides, note=note)
    if to == TO:
        model, adapter = of_recipe(session, base)
        file = output or Path(f"{session.recipe.name}-lora.gguf")
        for line in export_lora(str(model), adapter, file, name=session.recipe.name, rows=rows, note=note):
            typer.echo(line)
        return
    for path in write(session, to, output or Path(f"{session.recipe.name}-{to}")):
        typer.echo(path)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="HF folder or source (hf:, path:) that the adapter was trained on")],
    adapter: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the merged model")] = Path("merged"),
    rows: Annotated[Path | None, typer.Option(help="JSONL rows to compare the two on")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON to stdout")] = False,
) -> None:
    """Merge an adapter that was trained elsewhere; compared with model + adapter before it is handed over."""
    from edgedistill.merge_adapter import merge_adapter

    report = merge_adapter(model, adapter, output, rows=rows, note=lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, sort_keys=True))
    else:
        typer.echo(
            f"{output}: largest logit difference to model + adapter {report.max_logit_difference:.2g} on {report.positions} "
            f"positions ({report.tolerance:g} allowed), first choices agree {report.top1_agreement:.1%}\n"
            f"next: edgedistill quantize {output} -t TARGET"
        )
