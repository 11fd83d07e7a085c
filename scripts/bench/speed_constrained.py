"""A type for every matrix within llama.cpp's own speeds: as fast as Q4_K_M in prefill and decoding, no larger, and nearer to f16.

The model is SmolLM2-135M, its weights moved within their cells (as in ``quality_per_byte``). What each type's kernels cost here is
measured first (``devices/kernels.py``). Limits are the bytes of llama.cpp's Q4_K_M and the pp512 and tg128 that it reaches here,
less --slack; the chosen file and one that is chosen by size alone are then measured against Q4_K_M, pair by pair, in turns.
Compared are KLD from the f16 file on rows that were not calibrated on, and speeds; a prediction stands beside each.

Not here: other machines, other thread counts, memory.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table
from _kld import Reference, calibration, dither, ratio
from _recipe import base_gguf

from edgedistill.data.prompts import load_rows
from edgedistill.devices.host import usable_cores
from edgedistill.devices.kernels import kernels_rows, measure_kernels
from edgedistill.devices.local import measure, measure_ratio
from edgedistill.devices.protocol import Settings
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf import sensitivity
from edgedistill.formats.gguf.allocate import overhead, solve
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.imatrix import collect
from edgedistill.formats.gguf.quantize import named_after, quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.speeds import TESTS, figures, predict, speed_limit
from edgedistill.formats.gguf.types import PALETTE

NAME, STOCK = "speed_constrained", "Q4_K_M"
QUICK_TYPES = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL")


def main() -> None:
    """Measure kernels, choose, quantize, compare, print."""
    options = parser(
        __doc__ or "", quick="7 types, 2 rounds of kernels, 1,024 tokens of gradients, 8 rows of each set, 2 samples"
    )
    options.add_argument("--threads", type=int, default=usable_cores(), help="of everything that is timed")
    options.add_argument(
        "--slack", type=float, default=0.0, help="share of Q4_K_M's speeds that the limits stay below them"
    )
    given = options.parse_args()
    base, data = base_gguf("rounding")
    calibrated = load_rows(data / "train.jsonl")[: 32 if given.quick else 128]
    sets = {name: load_rows(data / f"{name}.jsonl")[: 8 if given.quick else 48] for name in ("dev", "dev-ood")}
    with GgufRunner(base) as runner:
        rows, starts = calibration(runner, calibrated)
    say("what the kernels cost")
    try:
        kernels = measure_kernels(
            QUICK_TYPES if given.quick else PALETTE,
            threads=given.threads,
            rounds=2 if given.quick else 3,
            reps=1 if given.quick else 2,
        )
    except StepFailed as error:  # the machine is so noisy that a cost cannot be told from none
        could_not_measure(NAME, error.message)
    lines, notes = kernels_rows(kernels)
    table("picoseconds a weight and token", ["type", "bpw", "pp512", "spread", "tg128", "spread"], lines)
    print("\n".join(notes))
    settings = Settings(threads=given.threads, context=1024, reps=2 if given.quick else 8)
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        folder = Path(name)
        source, imatrix = folder / "f16.gguf", folder / "stock-imatrix.gguf"
        dither(base, source, 0)
        gguf_to_hf(source, folder / "checkpoint")
        collect(source, rows, imatrix)
        tokens = 1024 if given.quick else sensitivity.TOKENS
        sensitivity.measure(source, folder / "checkpoint", rows, starts, folder, tokens=tokens)
        found = json.loads((folder / "table.json").read_text())
        costs, shapes = found["costs"], found["shapes"]
        files = {arm: folder / f"{arm}.gguf" for arm in ("stock", "by size", "by size and speed")}
        quantize(source, files["stock"], STOCK, imatrix=imatrix)
        types = {
            "stock": {tensor.name: tensor.type for tensor in read_info(files["stock"]).tensors if tensor.name in costs}
        }
        stock = measure(files["stock"], settings)
        reached = {"pp512": stock.pp.median, "tg128": stock.tg.median}
        limits = figures({test: (1 - given.slack) * speed for test, speed in reached.items()}, kernels)
        room = files["stock"].stat().st_size - overhead(read_info(source), costs)
        types["by size"] = solve(costs, room).types
        try:
            within = [speed_limit(test, of, shapes) for test, of in limits.items()]
            types["by size and speed"] = solve(costs, room, within, shapes).types
        except UsageError as error:
            could_not_measure(NAME, f"{error.message} (Q4_K_M here: {reached})", noise=list(kernels.noise))
        for arm in list(files)[1:]:
            quantize(source, files[arm], named_after(types[arm]), imatrix=folder / "imatrix.gguf", types=types[arm])
        reference = Reference(source, sets)
        klds = {arm: np.concatenate(list(reference.divergences(path).values())) for arm, path in files.items()}
        pairs = {arm: measure_ratio(path, files["stock"], settings) for arm, path in files.items() if arm != "stock"}
        sizes = {arm: path.stat().st_size for arm, path in files.items()}
    told: list[list[str]] = []
    for arm in files:
        speeds = []
        for test, short in TESTS.items():
            one: Any = getattr(pairs[arm], short) if arm in pairs else None
            speeds += (
                [f"{predict(test, limits[test], types[arm], shapes):.4g}"]
                if _known(limits[test], types[arm])
                else ["?"]
            )
            speeds += [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" if one else f"1 ({reached[test]:.4g} t/s)"]
        value, low, high = ratio(klds[arm], klds["stock"])
        told.append(
            [arm, f"{sizes[arm]:,}", f"{klds[arm].mean():.5f}", f"{value:.2f} [{low:.2f}, {high:.2f}]", *speeds]
        )
    columns = [
        "chosen",
        "bytes",
        "KLD",
        "over Q4_K_M's",
        "pp512 predicted",
        "over Q4_K_M's",
        "tg128 predicted",
        "over Q4_K_M's",
    ]
    table(f"within the bytes and speeds of {STOCK}, {given.threads} threads", columns, told)
    noise = [*kernels.noise, *stock.noise, *(reason for pair in pairs.values() for reason in pair.noise)]
    print("\n".join(f"NOISY: {reason}" for reason in dict.fromkeys(noise)))
    print(machine_line(llama=kernels.runner["version"]))
    ours = pairs["by size and speed"]
    value, low, high = ratio(klds["by size and speed"], klds["stock"])
    fast = all(getattr(ours, short).value >= 1 - given.slack for short in TESTS.values())
    finish(
        name=NAME,
        ours=round(float(klds["by size and speed"].mean()), 6),
        peer=round(float(klds["stock"].mean()), 6),
        ratio=[round(one, 4) for one in (value, low, high)],
        unit=f"KLD, nats a token, bytes and speeds of {STOCK}",
        n=len(klds["stock"]),
        wanted="KLD below Q4_K_M's, at no less than its pp512 and tg128",
        holds=high < 1 and fast,
        speeds={arm: {short: getattr(pair, short).value for short in TESTS.values()} for arm, pair in pairs.items()},
        noise=noise,
    )


def _known(of: Any, types: dict[str, str]) -> bool:
    return set(types.values()) <= set(of["weight"])


if __name__ == "__main__":
    main()
