"""The verb ``review``: people judge a sample of what the filters kept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)


@app.command()
def review(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml, or the folder that holds it")] = Path(),
    sample: Annotated[int, typer.Option(min=1, help="so many answers; more go on where fewer ended")] = 50,
    by_tag: Annotated[bool, typer.Option("--by-tag", help="as many of each tag")] = False,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="of the page, on 127.0.0.1; 0: a free one (from afar: ssh -L PORT:127.0.0.1:PORT)"
        ),
    ] = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")] = True,
    by: Annotated[str | None, typer.Option(help="who judges; your login when left out")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="override a recipe key: seed=1 (repeatable)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON to stdout")] = False,
) -> None:
    """Accept, reject or edit a sample of the kept answers on a local page; says how many of the others are wrong."""
    from edgedistill.recipe import load_recipe
    from edgedistill.review import Server, open_review
    from edgedistill.session import recipe_path
    from edgedistill.toml_source import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])

    def note(text: str) -> None:
        typer.echo(text, err=True)

    found = open_review(recipe, count=sample, by=by, by_tag=by_tag, overrides=overrides, note=note)
    with Server(found, port) as server:
        note(
            f"review: {server.url}\n{found.done} of {len(found.items)} judged; verdicts go to {found.file}; Ctrl-C ends"
        )
        if open_ and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            note("")
    summary = found.to_json()
    if as_json:
        typer.echo(json.dumps(summary, indent=1, sort_keys=True))
        return
    from edgedistill.data.verdicts import told

    counts = ", ".join(f"{summary[name]} {name}" for name in ("accepted", "rejected", "edited"))
    typer.echo(f"{found.done} of {len(found.items)} of the sample judged; in all {counts}\n{told(summary)}")
    if summary["judged"] and found.done < len(found.items):
        typer.echo("what the sample has left unjudged is taken to be like what was judged: judge it, too, to be sure")
    if summary["stale"]:
        typer.echo(f"{summary['stale']} verdicts are on answers that are no longer there: they count for nothing")
    path = recipe_path(recipe)
    if summary["judged"] and not any(one.kind == "review" for one in load_recipe(path, overrides).filter):
        typer.echo(f'to go by it, add to {path}:\n\n[[filter]]\nkind = "review"\nfile = "{found.file.name}"')
