"""Rounding with feedback against llama.cpp's own rounding: same file, same importance matrix, same bytes.

Both quantize the quickstart's merged student (with --quick: the base model) by the same calibration text; ours then chooses the
codes anew (``formats/gguf/rounding.py``). Compared is the KL divergence from the f16 file on the answers of rows that were
neither taught nor calibrated on: the dev sets, in the domain and out of it, and ordinary chat. Rows are the sample; the
interval of the ratio is a bootstrap over them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from _common import finish, machine_line, parser, say, table
from _kld import calibration, divergences, ratio
from _recipe import base_gguf, build, entry_of, recipe_folder

from edgedistill.data.prompts import load_rows
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.imatrix import collect
from edgedistill.formats.gguf.quantize import quantize

TYPES = ("IQ4_NL", "Q4_0", "Q5_0")
SETS = {"in domain": "dev", "out of domain": "dev-ood", "ordinary chat": "general"}


def bring(quick: bool) -> tuple[Path, Path]:
    """Return the f16 file of the quickstart's student, built, or of its base model, and the folder of the recipe's rows."""
    if quick:
        return base_gguf("rounding")
    session = build(recipe_folder("rounding", "recipe"), ["convert/student"])
    return entry_of(session, "convert/student").path / "model.gguf", session.path.parent / "data"


def main() -> None:
    """Quantize both ways, compare, print."""
    options = parser(__doc__ or "", quick="the base model, IQ4_NL, 16 rows to calibrate, 8 of each set to compare")
    given = options.parse_args()
    source, data = bring(given.quick)
    calibrated = load_rows(data / "train.jsonl")[: 16 if given.quick else 128]
    rows = {name: load_rows(data / f"{file}.jsonl")[: 8 if given.quick else 96] for name, file in SETS.items()}
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    lines, counts = [], {}
    means: tuple[float, float] = (float("nan"), float("nan"))  # of the first type, in the domain
    with tempfile.TemporaryDirectory() as folder:
        imatrix = Path(folder) / "imatrix.gguf"
        with GgufRunner(source) as runner:
            text, _ = calibration(runner, calibrated)
        collect(source, text, imatrix)
        for type_ in TYPES[:1] if given.quick else TYPES:
            paths = {name: Path(folder) / f"{type_}-{name}.gguf" for name in ("peer", "ours")}
            started = time.monotonic()
            plain = quantize(source, paths["peer"], type_, imatrix=imatrix)
            between = time.monotonic()
            fine = quantize(source, paths["ours"], type_, imatrix=imatrix, feedback=text)
            seconds = between - started, time.monotonic() - between
            assert plain.size == fine.size
            say(f"{type_}: {seconds[0]:.1f} s to nearest, {seconds[1]:.1f} s with feedback")
            found[type_] = {}
            for name, some in rows.items():
                peer, ours = (divergences(paths[arm], source, some) for arm in ("peer", "ours"))
                found[type_][name] = value, low, high = ratio(ours, peer)
                counts[name] = len(ours)
                if (type_, name) == (TYPES[0], "in domain"):
                    means = float(ours.mean()), float(peer.mean())
                lines.append(
                    [
                        type_,
                        name,
                        str(len(ours)),
                        f"{peer.mean():.5f}",
                        f"{ours.mean():.5f}",
                        f"{value:.2f} [{low:.2f}, {high:.2f}]",
                    ]
                )
    table("KLD from the f16 file, nats a token", ["type", "text", "rows", "llama.cpp", "with feedback", "ratio"], lines)
    print(machine_line())
    first = found[TYPES[0]]
    mean_ours, mean_peer = means
    finish(
        name="rounding",
        ours=round(mean_ours, 6),
        peer=round(mean_peer, 6),
        ratio=round(first["in domain"][0], 4),
        unit="KLD in domain, nats a token, IQ4_NL, same bytes",
        n=counts["in domain"],
        wanted="at most 0.6 in and out of the domain",
        holds=all(first[name][0] <= 0.6 for name in ("in domain", "out of domain")),
        ratios={type_: {name: [round(x, 4) for x in one] for name, one in of.items()} for type_, of in found.items()},
    )


if __name__ == "__main__":
    main()
