"""The shared tail of every benchmark: where it caches, what it prints, and how it ends.

A benchmark prints its tables and the machine's line, and as its last line one JSON object with name, ours, peer,
ratio, unit, n, wanted and holds. It exits 0 whichever way the comparison falls, and with `CANNOT_MEASURE` only when
it could not measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgedistill.devices.host import fingerprint, load_average
from edgedistill.target import format_size

CANNOT_MEASURE = 3


def parser(description: str, *, quick: str) -> argparse.ArgumentParser:
    """Make an argument parser with the flag that all benchmarks have: --quick, a run that proves nothing."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--quick", action="store_true", help=f"smoke run: {quick}; proves nothing")
    return made


def cache_folder(name: str) -> Path:
    """Return (and make) the folder in the user's cache that this benchmark keeps what it built or fetched in."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "edgedistill-bench" / name  # beside the store, which is root / "edgedistill"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: first column to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = [
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def machine_line(**versions: str) -> str:
    """Describe the machine and the versions that a number stands for, in one line."""
    host = fingerprint()
    average = load_average()
    load = "unknown" if average is None else f"{average:.2f}"
    parts = [
        f"{host.cpu}, {host.cores} cores, {format_size(host.memory_bytes)}, {host.system} {host.arch}",
        f"Python {sys.version.split()[0]}",
        *(f"{name} {version}" for name, version in versions.items()),
        f"load average {load}",
    ]
    return "machine: " + "; ".join(parts)


def finish(
    *, name: str, ours: Any, peer: Any, ratio: Any, unit: str, n: int, wanted: str, holds: bool, **more: Any
) -> NoReturn:
    """Print the verdict and the one JSON line, and exit 0."""
    print(f"\nwanted: {wanted}: {'holds' if holds else 'DOES NOT HOLD'}")
    last = {
        "name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "n": n,
        "wanted": wanted, "holds": holds, **more, "host": fingerprint().to_json(),
    }  # fmt: skip
    print(json.dumps(last))
    sys.exit(0)


def could_not_measure(name: str, reason: str, **more: Any) -> NoReturn:
    """Say why there is no number, in words and as the one JSON line, and exit with `CANNOT_MEASURE`."""
    print(f"\ncould not measure: {reason}")
    print(json.dumps({"name": name, "could_not_measure": reason, **more, "host": fingerprint().to_json()}))
    sys.exit(CANNOT_MEASURE)
