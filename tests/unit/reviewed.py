"""A tiny recipe whose teacher has answered: the real plan and filter, and answers that were made up."""

from __future__ import annotations

import json
from pathlib import Path

from edgedistill.session import Session, prepare
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

RECIPE = """
schema  = 1
name    = "tiny"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[student]
model = "path:model"
[prompts]
files = ["rows.jsonl"]
[[filter]]
kind = "reference"
otherwise = "gold"
"""
BY_PEOPLE = '[[filter]]\nkind = "review"\nfile = "tiny.review.jsonl"\notherwise = "gold"\n'
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
ROWS = 12


def answer(number: int) -> str:
    return json.dumps({"name": "set_alarm", "arguments": {"hour": number}})


def make_answered(folder: Path, store: Path, rows: int = ROWS) -> Path:
    """Write a recipe, and a store in which its teacher has answered: right but for row 0; return the recipe."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
    lines = [
        {
            "id": f"row-{n:02d}",
            "messages": [
                {"role": "system", "content": "One call."},
                {"role": "user", "content": f"wake me at {n} {HOSTILE}"},
            ],
            "reference": answer(n),
            "tags": ["even" if n % 2 == 0 else "odd", HOSTILE],
        }
        for n in range(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    fill(prepare(path, store=Store(store)))
    return path


def fill(session: Session) -> None:
    """Make entries of all steps that the filter needs."""
    digests: dict[str, str] = {}
    wanted = session.plan.match("filter")[0]
    for step in session.plan.only([wanted]).steps:
        if step.key == wanted.key:
            continue
        out, _ = session.store.partial(step.key, {})
        (out / "made").write_text(step.id)
        if step.stage.name == "generate":
            lines = [
                {
                    "id": row.id,
                    "row": f"k{n}",
                    "sample": 0,
                    "text": row.reference if n else "{}",
                    "finish": "stop",
                    "logprob": -1.0,
                }
                for n, row in enumerate(session.inputs.prompts)
            ]
            (out / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        digests[step.key] = session.store.commit(
            step.key,
            stage=step.stage.name,
            inputs={key: digests[key] for key in step.stage.inputs()},
            fields={},
            facts={},
            seconds=1.0,
            versions={},
        ).digest
