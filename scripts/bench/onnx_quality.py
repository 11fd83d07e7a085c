"""Our 4 bits of ONNX against those of onnxruntime-genai's builder: same model, same runtime, same bytes.

The model is SmolLM2-135M, its weights moved within their cells (what a package ships came from 4-bit blocks), once for each seed.
The builder makes int4 (blocks of 32, to nearest) and its mixed type (k_quant_mixed). Ours rounds the same int4 with feedback
(``formats/onnx/rounding.py``), and chooses the kinds of the matrices for a folder of int4's bytes and one of mixed's. Every
folder is loaded in onnxruntime-genai, run, and compared with transformers as a build does it. Compared is the KLD from the float32
checkpoint on the answers of rows that were not calibrated on: in the domain, out of it, and ordinary chat; rows are the sample,
each with all seeds. Decode speed is taken in turns, folder after folder, all in memory.

Not here: GPTQ's or AWQ's own exporters for ONNX, which need a CUDA device or another transformers.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from _common import cache_folder, finish, machine_line, parser, say, table
from _kld import Reference, calibration, dither, ratio
from _recipe import base_gguf

from edgedistill.data.prompts import Row, load_rows
from edgedistill.devices.engine_onnx import OnnxEngine
from edgedistill.devices.host import fingerprint
from edgedistill.evals.runners.onnx import OnnxRunner
from edgedistill.evals.runners.transformers import TransformersRunner
from edgedistill.formats.gguf.allocate import solve
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.sensitivity import TOKENS
from edgedistill.formats.onnx.build import build
from edgedistill.formats.onnx.check import compare
from edgedistill.formats.onnx.rounding import round_folder, task_rows
from edgedistill.formats.onnx.sensitivity import measure
from edgedistill.formats.onnx.types import KINDS
from edgedistill.quantize_model import sample_rows

SETS = {"in domain": "dev", "out of domain": "dev-ood", "ordinary chat": "general"}
PEER = {
    "int4, rounding": "int4",
    "types of int4's bytes": "int4",
    "types of mixed's bytes": "mixed",
}  # ours: of whose bytes
NEW = 64  # tokens of a sample of speed
MOST, SLOWEST = 0.5, 0.95  # what is wanted: of the peer's KLD, and of its speed
Found = dict[tuple[str, str], list[np.ndarray]]  # (arm, set): KLD of each row, by seed


def reference_runner(path: Path) -> TransformersRunner:
    """Open a checkpoint in float32."""
    return TransformersRunner(path, dtype="float32")


def size_of(path: Path) -> int:
    """Return the bytes of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def folders(
    checkpoint: Path, work: Path, text: tuple[list[list[int]], list[int]], tokens: int
) -> tuple[dict[str, Path], list[str]]:
    """Build every arm; return the folders, and what each of ours became."""
    made: dict[str, Path] = {}
    told: list[str] = []
    rows = task_rows(checkpoint, *text, tokens)

    def rounded(arm: str, kinds: Mapping[str, str] | str) -> None:
        given = KINDS[kinds] if isinstance(kinds, str) else {name: KINDS[kind] for name, kind in kinds.items()}
        made[arm] = work / arm.replace(" ", "-")
        shutil.copytree(made["int4"], made[arm])
        report = round_folder(made[arm], checkpoint, rows, given)
        counts = ", ".join(f"{count} x {kind}" for kind, count in report.kinds.items())
        told.append(f"{arm}: {counts}; predicted KLD {report.predicted:.3g}; {report.seconds:.0f} s")
        say(told[-1])

    for peer in ("int4", "mixed"):
        made[peer] = work / peer
        build(checkpoint, made[peer], peer)
    rounded("int4, rounding", "int4/32")
    (work / "table").mkdir()
    report = measure(made["int4"], checkpoint, rows, work / "table")
    say(f"table of {report.costs} costs in {report.seconds:.0f} s, gradients on {report.tokens} tokens")
    found = json.loads((work / "table" / "table.json").read_text())
    for arm, peer in PEER.items():
        if arm not in made:
            rounded(arm, solve(found["costs"], size_of(made[peer]) - found["beside"]).types)
    return made, told


def speeds(made: Mapping[str, Path], rounds: int) -> dict[str, list[float]]:
    """Return decode speeds in tokens/s, one of each folder in turn; the first round warms up."""
    threads = fingerprint().cores
    engines = {arm: OnnxEngine(path, threads) for arm, path in made.items()}
    found: dict[str, list[float]] = {arm: [] for arm in made}
    for at in range(rounds + 1):
        for arm, engine in engines.items():
            seconds = engine.generate(NEW)
            if at:
                found[arm].append(NEW / seconds)
    return found


def main() -> None:
    """Build every way, compare, print."""
    options = parser(__doc__ or "", quick="one seed, 1,024 tokens of gradients, 8 rows of each set, 3 samples of speed")
    options.add_argument("--seeds", type=int, default=3, help="how many models")
    given = options.parse_args()
    seeds, tokens = (1, 1024) if given.quick else (given.seeds, TOKENS)
    base, data = base_gguf("rounding")
    calibrated = load_rows(data / "train.jsonl")[: 32 if given.quick else 128]
    sets: dict[str, list[Row]] = {
        name: load_rows(data / f"{file}.jsonl")[: 8 if given.quick else 48] for name, file in SETS.items()
    }
    prompts = [[dict(message) for message in row.messages] for row in sample_rows()]
    found: Found = {}
    sizes: dict[str, int] = {}
    rates: dict[str, list[float]] = {}
    told: list[str] = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(dir=cache_folder("onnx_quality")) as name:
            work, started = Path(name), time.monotonic()
            dither(base, work / "f16.gguf", seed)
            gguf_to_hf(work / "f16.gguf", work / "checkpoint")
            with reference_runner(work / "checkpoint") as runner:
                text = calibration(runner, calibrated)
            made, told = folders(work / "checkpoint", work, text, tokens)
            reference = Reference(work / "checkpoint", sets, reference_runner)
            for arm, path in made.items():
                hop = compare(work / "checkpoint", path, prompts)
                say(f"seed {seed}: {arm}: {size_of(path):,} bytes, KLD {hop.kld:.3g} on {hop.prompts} prompts")
                sizes[arm] = size_of(path)
                for where, klds in reference.divergences(path, OnnxRunner).items():
                    found.setdefault((arm, where), []).append(klds)
            for arm, some in speeds(made, 3 if given.quick else 7).items():
                rates.setdefault(arm, []).extend(some)
            say(f"seed {seed}: {time.monotonic() - started:.0f} s")
    lines, ratios = [], {}
    for (arm, where), klds in found.items():
        peer = PEER.get(arm)
        ours, cells = np.stack(klds), ["", ""]
        if peer:
            value, low, high = ratio(ours, np.stack(found[peer, where]))
            ratios[f"{arm}, {where}"] = [round(one, 4) for one in (value, low, high)]
            each = zip(klds, found[peer, where], strict=True)
            cells = [
                f"{value:.2f} [{low:.2f}, {high:.2f}]",
                " ".join(f"{one.mean() / other.mean():.2f}" for one, other in each),
            ]
        lines.append([arm, where, str(ours.shape[1]), f"{ours.mean():.5f}", peer or "", *cells])
    columns = ["arm", "text", "rows", "KLD", "against", "over it", "by seed"]
    table("KLD from the float32 checkpoint, nats a token", columns, lines)
    medians = {arm: statistics.median(some) for arm, some in rates.items()}
    faster = {arm: round(medians[arm] / medians[peer], 4) for arm, peer in PEER.items()}
    table(
        f"decode, {fingerprint().cores} threads, in turns",
        ["arm", "bytes", "tokens/s", "samples", "over its peer"],
        [
            [
                arm,
                f"{sizes[arm]:,}",
                f"{medians[arm]:.1f}",
                str(len(rates[arm])),
                f"{faster[arm]:.2f}" if arm in faster else "",
            ]
            for arm in rates
        ],
    )
    print("of the last seed: " + "; ".join(told))
    print(machine_line())
    worst = {arm: max(ratios[f"{arm}, {where}"][0] for where in SETS) for arm in PEER}
    wanted = {
        f"int4's bytes: at most {MOST} of its KLD on every text": worst["types of int4's bytes"] <= MOST,
        f"mixed's bytes: at most {MOST} of its KLD on every text": worst["types of mixed's bytes"] <= MOST,
        "int4 with rounding alone: less KLD than int4 on every text": worst["int4, rounding"] < 1,
        f"decode at least {SLOWEST} of the peer's": min(faster.values()) >= SLOWEST,
    }
    for what, holds in wanted.items():
        print(f"{what}: {'holds' if holds else 'does not hold'}")
    first = "types of int4's bytes", "in domain"
    finish(
        name="onnx_quality",
        ours=round(float(np.concatenate(found[first]).mean()), 6),
        peer=round(float(np.concatenate(found["int4", "in domain"]).mean()), 6),
        ratio=ratios[", ".join(first)][0],
        unit="KLD in domain, nats a token, bytes of the builder's int4",
        n=sum(map(len, found[first])),
        wanted="; ".join(wanted),
        holds=all(wanted.values()),
        ratios=ratios,
        decode={arm: round(value, 2) for arm, value in medians.items()},
        decode_ratios=faster,
        bytes=sizes,
        seeds=seeds,
    )


if __name__ == "__main__":
    main()
