"""What the generators of packaged recipes' data share: writing their files, or comparing them with the shipped ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def as_jsonl(files: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, bytes]:
    """Render the rows of each file: path relative to the recipe's folder -> bytes."""
    return {
        f"data/{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        for name, rows in files.items()
    }


def write_or_check(
    rendered: Callable[[], Mapping[str, bytes]], folder: Path, *, prog: str, argv: Sequence[str] | None = None
) -> int:
    """Write what ``rendered`` gives (path relative to the folder -> bytes), or with --check compare; return 1 where one differs."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}", description="Write the files, or with --check compare them."
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the files with what this program makes; write nothing"
    )
    parser.add_argument(
        "--out", type=Path, default=folder, help="the folder to write to or to check (default: this package)"
    )
    options = parser.parse_args(argv)
    different = []
    for name, content in rendered().items():
        path = options.out / name
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            different.append(name)
    for name in different:
        print(f"{options.out / name}: differs from what the generator makes", file=sys.stderr)
    return 1 if different else 0
