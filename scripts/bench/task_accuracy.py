"""What quantization costs in right answers: the quickstart's student at every setting, llama.cpp's and ours.

The student is the one that the quickstart builds (merged, full precision), from the user's store. llama.cpp's own quantizer
makes its types with the importance matrix of the calibration text; ours, at the same bytes, chooses the types of the matrices
and rounds with feedback, or rounds alone and keeps to one type. Every file answers both suites whole, greedily; differences are
paired by row. KLD from the f16 file is printed beside them, over the first rows of ``holdout``: a file may be closer and answer
no better.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table
from _kld import Reference, calibration
from _recipe import build, entry_of, few_rows, recipe_folder

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import EdgeDistillError
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.statistics import Estimate, paired_difference, proportion
from edgedistill.evals.suites import evaluate
from edgedistill.formats.gguf import sensitivity
from edgedistill.formats.gguf.allocate import overhead, solve
from edgedistill.formats.gguf.imatrix import collect
from edgedistill.formats.gguf.quantize import named_after, quantize
from edgedistill.formats.gguf.read import read_info

NAME = "task_accuracy"
SUITES = ("holdout", "ood")
TARGET = "phone-midrange"
STOCK = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q3_K_M")
SAME_BYTES = ("Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M")  # of these types: types of our choice, and rounding
ROUNDED = ("IQ4_NL", "Q4_0")  # kept to this type: rounding alone
WHOLE = "F16"
KLD_ROWS = 160


class Judge:
    """Answers every suite with a file, and measures how far it is from the full-precision one."""

    def __init__(self, whole: Path, folder: Path, quick: bool) -> None:
        self.rows: dict[str, list[Row]] = {
            name: load_rows(folder / "data" / f"{name}.jsonl", need_reference=True)[: 12 if quick else None]
            for name in SUITES
        }
        self.reference = Reference(whole, {"holdout": self.rows["holdout"][: 12 if quick else KLD_ROWS]})
        self.right: dict[str, list[float]] = {}  # by name of the setting: a row of each suite, in order
        self.kld: dict[str, float] = {}
        self.size: dict[str, int] = {}

    def look(self, name: str, path: Path) -> None:
        """Answer with one file."""
        started = time.monotonic()
        with GgufRunner(path) as runner:
            found = [
                row.score
                for suite in SUITES
                for row in evaluate(runner, self.rows[suite], "json-exact", max_new_tokens=40).rows
            ]
        self.right[name], self.size[name] = found, path.stat().st_size
        self.kld[name] = float(np.mean(self.reference.divergences(path)["holdout"]))
        say(f"{name}: {np.mean(found):.3f} right, {time.monotonic() - started:.0f} s")

    def difference(self, name: str, other: str) -> Estimate:
        """Return the paired difference of two settings over both suites."""
        return paired_difference(self.right[name], self.right[other])


def make_all(whole: Path, checkpoint: Path, calibrated: list[Row], judge: Judge, quick: bool) -> list[tuple[str, str]]:
    """Quantize every way and judge it; returns (ours, llama.cpp's of the same bytes)."""
    pairs: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        folder = Path(name)
        imatrix, file = folder / "imatrix.gguf", folder / "file.gguf"
        (folder / "table").mkdir()
        with GgufRunner(whole) as runner:
            rows, starts = calibration(runner, calibrated)
        collect(whole, rows, imatrix)
        tokens = 1024 if quick else sensitivity.TOKENS
        report = sensitivity.measure(whole, checkpoint, rows, starts, folder / "table", tokens=tokens)
        say(f"table of {report.costs} costs in {report.seconds:.0f} s")
        costs = json.loads((folder / "table" / "table.json").read_text())["costs"]
        beside = overhead(read_info(whole), costs)

        def look(setting: str) -> None:
            judge.look(setting, file)
            file.unlink()

        judge.look(WHOLE, whole)
        for type_ in ("Q8_0", "Q4_K_M") if quick else STOCK:
            quantize(whole, file, type_, imatrix=imatrix)
            look(type_)
        for type_ in ("Q4_K_M",) if quick else SAME_BYTES:
            chosen = solve(costs, judge.size[type_] - beside).types
            table_imatrix = folder / "table" / "imatrix.gguf"
            quantize(whole, file, named_after(chosen), imatrix=table_imatrix, types=chosen, feedback=rows)
            pairs.append((f"types and rounding, bytes of {type_}", type_))
            look(pairs[-1][0])
        for type_ in () if quick else ROUNDED:
            quantize(whole, file, type_, imatrix=imatrix, feedback=rows)
            pairs.append((f"{type_}, rounding", type_))
            look(pairs[-1][0])
    return pairs


def main() -> None:
    """Quantize, answer, compare, print."""
    given = parser(
        __doc__ or "", quick="a student of a few rows, two types and ours, 12 rows of each suite"
    ).parse_args()
    folder = recipe_folder(NAME, "quick" if given.quick else "full")
    # No file of the folder is another than the quickstart's: where that was built, nothing is built here.
    overrides = few_rows(folder, SUITES) if given.quick else {}
    try:
        session = build(folder, ["convert/student"], targets=[TARGET], overrides=overrides)
    except EdgeDistillError as error:
        could_not_measure(NAME, str(error))
    whole = entry_of(session, "convert/student").path / "model.gguf"
    checkpoint = entry_of(session, "merge").path / "model"
    judge = Judge(whole, folder, given.quick)
    calibrated = load_rows(folder / "data" / "train.jsonl", need_reference=True)[: 32 if given.quick else 128]
    pairs = make_all(whole, checkpoint, calibrated, judge, given.quick)
    peers = dict(pairs)
    lines = []
    for name, right in judge.right.items():
        one = proportion(int(sum(right)), len(right))
        lost = judge.difference(name, WHOLE)
        against = judge.difference(name, peers[name]) if name in peers else None
        lines.append(
            [
                name,
                f"{judge.size[name] / 2**20:.1f}",
                f"{judge.kld[name]:.4f}",
                f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]",
                "" if name == WHOLE else f"{lost.value:+.3f} [{lost.low:+.3f}, {lost.high:+.3f}]",
                "" if against is None else f"{against.value:+.3f} [{against.low:+.3f}, {against.high:+.3f}]",
            ]
        )
    n = len(judge.right[WHOLE])
    table(
        f"right answers over {' and '.join(SUITES)}, n = {n}; KLD in nats a token",
        ["setting", "MiB", "KLD", "right", f"difference to {WHOLE}", "to llama.cpp's of these bytes"],
        lines,
    )
    print(machine_line())
    differences = {ours: judge.difference(ours, peer) for ours, peer in pairs}
    ours, peer = pairs[0]
    finish(
        name=NAME,
        ours=round(float(np.mean(judge.right[ours])), 4),
        peer=round(float(np.mean(judge.right[peer])), 4),
        ratio=round(float(np.mean(judge.right[ours]) / max(1e-9, np.mean(judge.right[peer]))), 4),
        unit=f"right answers, bytes of {peer}",
        n=n,
        wanted="at the same bytes ours answers no worse than llama.cpp's: no interval of a difference lies below 0",
        holds=all(one.high >= 0 for one in differences.values()),
        differences={name: one.to_json() for name, one in differences.items()},
        settings={
            name: {"right": float(np.mean(right)), "bytes": judge.size[name], "kld": judge.kld[name]}
            for name, right in judge.right.items()
        },
        quick=given.quick,
    )


if __name__ == "__main__":
    main()
