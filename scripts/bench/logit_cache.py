"""The cache of soft targets on disk: bytes a token, and how fast it is written and read, beside dense and top-K.

The targets are those of SmolLM2-135M-Instruct on the answers of the quickstart's rows. Ours are 12 random draws (RS-KD) in
Parquet; beside them more draws, the best K with the tail as one bucket (the same file format), and the whole
distribution in bf16 (a safetensors file a row, one tensor [tokens, vocabulary], which is what a script without a cache format
writes). Each form is written and read back whole, in turn; reading ends at what the loss takes, and dense rows are brought into
memory, not mapped. Files lie in the page cache, so a slow disk would favour the small ones more.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import finish, machine_line, parser, table
from _recipe import build, entry_of, recipe_folder, targets_header
from safetensors.torch import load_file, save_file

from edgedistill.data.prompts import load_rows
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.data import Example, encode_example
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.targets import Kind, SparseTargets, TargetsHeader, TargetsWriter, read_targets

FORMS: dict[str, tuple[Kind, int]] = {
    "12 draws": ("sampled", 12),
    "4 draws": ("sampled", 4),
    "50 draws": ("sampled", 50),
    "top 16 + tail": ("top-k", 16),
    "top 50 + tail": ("top-k", 50),
}
DENSE = "dense, bf16"
MOST_BYTES = 48.0


def dense_rows(teacher: TransformersTeacher, examples: list[Example]) -> list[torch.Tensor]:
    """Return the logits of every example's completion, bf16 [tokens, vocabulary]."""
    head = teacher.model.get_output_embeddings().weight[: teacher.vocab_size]
    found = []
    with torch.inference_mode(), packed_mode(teacher.model) as packed:
        for example in examples:
            states = completion_states(teacher.model, make_batch([example], packed=packed))
            found.append((states @ head.T).to(torch.bfloat16))
    return found


def save_sparse(path: Path, header: TargetsHeader, examples: list[Example], targets: list[SparseTargets]) -> None:
    """Write one file in our format."""
    with TargetsWriter(path, header) as writer:
        for example, one in zip(examples, targets, strict=True):
            writer.write(example, one)


def save_dense(folder: Path, rows: list[torch.Tensor]) -> None:
    """Write one file a row."""
    folder.mkdir()
    for at, row in enumerate(rows):
        save_file({"logits": row}, folder / f"{at:05d}.safetensors")


def read_dense(folder: Path) -> list[torch.Tensor]:
    """Read every row into memory."""
    return [load_file(path)["logits"].clone() for path in sorted(folder.iterdir())]


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(one.stat().st_size for one in path.iterdir()) if path.is_dir() else path.stat().st_size


def main() -> None:
    """Score once, then write and read every form in turn."""
    given = parser(__doc__ or "", quick="32 rows, one round").parse_args()
    rounds, wanted_rows = (1, 32) if given.quick else (5, 256)
    session = build(recipe_folder("logit_cache", "recipe"), ["base/teacher"])
    model = entry_of(session, "base/teacher").path / "model"
    rows = load_rows(session.path.parent / "data" / "train.jsonl", need_reference=True)
    teacher = TransformersTeacher(model)
    examples = [
        encode_example(teacher.tokenizer, list(row.messages), row.reference or "", id=row.id)
        for row in rows[:wanted_rows]
    ]
    tokens = sum(len(one.completion_ids) for one in examples)
    dense = dense_rows(teacher, examples)
    writers: dict[str, Callable[[Path], None]] = {DENSE: lambda path: save_dense(path, dense)}
    readers: dict[str, Callable[[Path], Any]] = {DENSE: read_dense}
    for name, (kind, n) in FORMS.items():
        found: list[SparseTargets | None] = [None] * len(examples)
        for at, one in teacher.score(examples, kind=kind, n=n, temperature=1.0, seed=0):
            found[at] = one
        targets = [one for one in found if one is not None]
        header = targets_header(teacher, kind, n)
        writers[name] = lambda path, header=header, targets=targets: save_sparse(path, header, examples, targets)
        readers[name] = lambda path: read_targets([path], examples)
    seconds: dict[str, dict[str, list[float]]] = {name: {"write": [], "read": []} for name in writers}
    size: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name in list(writers) if turn % 2 == 0 else list(writers)[::-1]:
                path = Path(folder) / "targets"
                for what, work in (("write", writers[name]), ("read", readers[name])):
                    started = time.perf_counter()
                    work(path)
                    seconds[name][what].append(time.perf_counter() - started)
                size[name] = size_of(path)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    rates = {name: {what: tokens / median(some) for what, some in one.items()} for name, one in seconds.items()}
    each = {name: size[name] / tokens for name in writers}
    table(
        f"soft targets of {len(examples)} rows, {tokens} tokens, vocabulary {teacher.vocab_size} (medians of {rounds})",
        ["form", "bytes/token", "of dense", "write, tokens/s", "read, tokens/s"],
        [
            [
                name,
                f"{each[name]:,.1f}",
                f"1/{each[DENSE] / each[name]:,.0f}",
                f"{rates[name]['write']:,.0f}",
                f"{rates[name]['read']:,.0f}",
            ]
            for name in (*FORMS, DENSE)
        ],
    )
    print(f"\n{machine_line()}")
    ours = next(iter(FORMS))
    finish(
        name="logit_cache",
        ours=round(each[ours], 2),
        peer=round(each[DENSE], 2),
        ratio=each[ours] / each[DENSE],
        unit="bytes/token",
        n=tokens,
        wanted=f"12 draws under {MOST_BYTES:g} bytes a token, written and read faster than dense",
        holds=each[ours] < MOST_BYTES and all(rates[ours][what] > rates[DENSE][what] for what in ("write", "read")),
        bytes_per_token=each,
        tokens_per_s=rates,
        quick=given.quick,
    )


if __name__ == "__main__":
    main()
