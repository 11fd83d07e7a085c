"""A type for every matrix against llama.cpp's mixes: same model, same rows of the task, same bytes.

The model is SmolLM2-135M, its weights moved within their cells (what a package ships came from 4-bit blocks), once for each seed.
llama.cpp's own quantizer makes its types with the importance matrix of rows of the task (other text beside them brought it no
closer when that was tried). Ours sees conversations beside these rows that the model writes itself (``evals/own_text.py``), and
chooses the types of the matrices for a file of the same size (``formats/gguf/allocate.py``); a further arm rounds with feedback on
top (``rounding.py`` there), and one looks for Q4_K_M's KLD in fewer bytes. Three keep to Q4_0's blocks: rounding with feedback by
the task's rows alone, by both texts, and then trained (quantization-aware distillation, ``training/quantized.py``) on further rows
of the task and more conversations. Compared is the KLD from the f16 file on the answers of rows that were not calibrated on: in the
domain, out of it, and ordinary chat. Rows are the sample: the interval of the ratio is a bootstrap over the rows, each with all
seeds.

AutoRound's Q4_K_M and Q4_0 are an arm where AutoRound installs (``_autoround.py``: its default of 200 iterations, on all the text
that ours sees, in windows of 128 tokens); beside each stand ours of the same bytes. ``--model aligned`` takes another model:
SmolLM2-135M cut to 512 hidden dimensions and healed on the quickstart's task, whose matrices have columns of a multiple of 256 (but
those behind the attention, 576), so that little of a k-quant falls back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import _autoround
import numpy as np
from _common import cache_folder, finish, machine_line, parser, say, table
from _kld import Reference, calibration, dither, ratio
from _qad import distil, own_chat
from _recipe import base_gguf, build, entry_of, recipe_folder

from edgedistill.data.prompts import Row, load_rows
from edgedistill.evals.own_text import own_conversations
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf import sensitivity
from edgedistill.formats.gguf.allocate import overhead, solve
from edgedistill.formats.gguf.dequantize import gguf_to_hf
from edgedistill.formats.gguf.imatrix import collect
from edgedistill.formats.gguf.quantize import named_after, quantize
from edgedistill.formats.gguf.read import read_info

NAME = "quality_per_byte"
TYPES = ("Q4_K_M", "IQ4_XS", "Q4_0")
SETS = {"in domain": "dev", "out of domain": "dev-ood", "ordinary chat": "general"}
GENERAL = 64  # conversations
FEWER = 0.8  # of Q4_K_M's bytes
Found = dict[tuple[str, str, str], list[np.ndarray]]  # (type, arm, set): KLD of each row, by seed


DISTILLED = "rounding, distillation"
LLAMA, AUTOROUND = "llama.cpp", "AutoRound"
ALIGNED = {"student.hidden": 512, "student.ffn": None, "student.vocabulary": None, "teacher.min_score": {}}


def best_arm(quick: bool) -> str:
    """Return the arm that the verdict goes by."""
    return "types" if quick else "types, rounding"


def one_seed(
    base: Path,
    seed: int,
    text: tuple[list[list[int]], list[int]],
    sets: dict[str, list[Row]],
    quick: bool,
    found: Found,
    distilled: tuple[list[Row], list[Row]],
    only: bool = False,
    autoround: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Quantize one model every way; add the KLD of every row to ``found``. Returns {type: (bytes of the peer's, of ours)}.

    ``distilled`` are the rows of the task and others that blocks are trained on; ``only``: nothing but Q4_0's blocks;
    ``autoround``: iterations of AutoRound, None to leave it out.
    """
    sizes: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(dir=cache_folder(NAME)) as name:
        folder = Path(name)
        source, checkpoint, stock = folder / "f16.gguf", folder / "checkpoint", folder / "stock.gguf"
        (folder / "table").mkdir()
        dither(base, source, seed)
        gguf_to_hf(source, checkpoint)
        rows, starts = text
        collect(source, rows, stock)
        with GgufRunner(source) as runner:
            own, begun = own_conversations(runner, 8 if quick else GENERAL, seed=seed)
        mixed = [*rows, *own]
        reference = Reference(source, sets)

        def judge(type_: str, arm: str, path: Path) -> int:
            for where, klds in reference.divergences(path).items():
                found.setdefault((type_, arm, where), []).append(klds)
            size = path.stat().st_size
            path.unlink()
            return size

        def same_blocks() -> None:
            for arm, seen in (("rounding alone, text of the task", rows), ("rounding alone", mixed)):
                quantize(source, folder / "same.gguf", "Q4_0", imatrix=stock, feedback=seen)
                judge("Q4_0", arm, folder / "same.gguf")
            task, other = distilled
            quantize(source, folder / "start.gguf", "Q4_0", imatrix=stock, feedback=mixed)
            started = time.monotonic()
            tuned = distil(
                folder / "start.gguf", checkpoint, folder / "trained.gguf", task, other, folder, seed=seed,
                **({"epochs": 1.0} if quick else {}),
            )  # fmt: skip
            said = {key: value for key, value in tuned.to_json().items() if key != "parts"}
            say(f"seed {seed}: distilled in {time.monotonic() - started:.0f} s: {said}")
            (folder / "start.gguf").unlink()
            judge("Q4_0", DISTILLED, folder / "trained.gguf")

        if only:
            quantize(source, folder / "stock-file.gguf", "Q4_0", imatrix=stock)
            size = judge("Q4_0", LLAMA, folder / "stock-file.gguf")
            same_blocks()
            return {"Q4_0": (size, size)}
        tokens = 1024 if quick else sensitivity.TOKENS
        report = sensitivity.measure(source, checkpoint, mixed, [*starts, *begun], folder / "table", tokens=tokens)
        say(
            f"seed {seed}: table of {report.costs} costs in {report.seconds:.0f} s, gradients on {report.tokens} tokens"
        )
        costs = json.loads((folder / "table" / "table.json").read_text())["costs"]
        beside = overhead(read_info(source), costs)

        def ours(type_: str, arm: str, size: int, feedback: list[list[int]] | None = None) -> int:
            chosen, out = solve(costs, size - beside).types, folder / "ours.gguf"
            quantize(
                source,
                out,
                named_after(chosen),
                imatrix=folder / "table" / "imatrix.gguf",
                types=chosen,
                feedback=feedback,
            )
            return judge(type_, arm, out)

        for type_ in TYPES[:1] if quick else TYPES:
            started = time.monotonic()
            quantize(source, folder / "stock-file.gguf", type_, imatrix=stock)
            size = judge(type_, LLAMA, folder / "stock-file.gguf")
            sizes[type_] = size, ours(type_, "types", size)
            if not quick:
                ours(type_, "types, rounding", size, mixed)
            if type_ == "Q4_K_M":
                ours(type_, f"{best_arm(quick)}, fewer bytes", round(FEWER * size), None if quick else mixed)
            if type_ == "Q4_0":
                same_blocks()
            say(f"seed {seed}: {type_} in {time.monotonic() - started:.0f} s")
            if autoround is not None and type_ in _autoround.TYPES:
                started, name_ = time.monotonic(), f"{type_}, {AUTOROUND}"
                try:
                    made = _autoround.quantize(
                        checkpoint, folder / f"autoround-{type_}", type_, mixed, iterations=autoround, seed=seed
                    )
                except OSError as error:
                    say(f"seed {seed}: no {name_}: {error}")
                    continue
                say(f"seed {seed}: {name_} in {time.monotonic() - started:.0f} s")
                size = judge(name_, AUTOROUND, made)
                shutil.rmtree(folder / f"autoround-{type_}")
                ours(name_, "types", size)
                sizes[name_] = size, ours(name_, "types, rounding", size, mixed)
    return sizes


def main() -> None:
    """Quantize every way, compare, print."""
    options = parser(
        __doc__ or "",
        quick="one seed, 8 rows of each set; Q4_K_M, 1,024 tokens of gradients, no rounding; --only-blocks: an epoch of 64 rows",
    )
    options.add_argument("--only-blocks", action="store_true", help="nothing but the arms that keep to Q4_0's blocks")
    options.add_argument("--seeds", type=int, default=3, help="how many models")
    options.add_argument("--model", choices=("smollm2", "aligned"), default="smollm2", help="what is quantized")
    options.add_argument(
        "--autoround", type=int, default=_autoround.ITERATIONS, help="iterations of AutoRound; -1 leaves it out"
    )
    given = options.parse_args()
    seeds = 1 if given.quick else given.seeds
    if given.model == "aligned":
        session = build(recipe_folder(NAME, "aligned"), ["convert/student"], overrides=ALIGNED)
        base, data = entry_of(session, "convert/student").path / "model.gguf", session.path.parent / "data"
    else:
        base, data = base_gguf("rounding")
    left_out = given.quick or given.only_blocks or given.autoround < 0
    autoround, why = (None if left_out else given.autoround), "left out"
    if autoround is not None:
        try:
            _autoround.environment()
        except OSError as error:
            autoround, why = None, str(error)
    calibrated = load_rows(data / "train.jsonl")[: 32 if given.quick else 128]
    sets = {name: load_rows(data / f"{file}.jsonl")[: 8 if given.quick else 48] for name, file in SETS.items()}
    with GgufRunner(base) as runner:
        text = calibration(runner, calibrated)
    distilled: tuple[list[Row], list[Row]] = ([], [])
    if given.only_blocks or not given.quick:
        further = load_rows(data / "train.jsonl")[128 : 128 + (64 if given.quick else 512)]
        distilled = further, own_chat(base, 64 if given.quick else 256)
    found: Found = {}
    sizes: dict[str, tuple[int, int]] = {}
    for seed in range(seeds):
        sizes = one_seed(base, seed, text, sets, given.quick, found, distilled, given.only_blocks, autoround)
    lines, ratios = [], {}
    for (type_, arm, where), klds in found.items():
        if len(klds) < seeds:
            print(f"{type_}, {arm}, {where}: made for {len(klds)} of {seeds} models, and left out")
            continue
        other = AUTOROUND if (type_, AUTOROUND, where) in found else LLAMA
        ours, peer = np.stack(klds), np.stack(found[type_, other, where])
        value, low, high = ratio(ours, peer)
        ratios[f"{type_}, {arm}, {where}"] = [round(one, 4) for one in (value, low, high)]
        each = " ".join(f"{one.mean() / two.mean():.2f}" for one, two in zip(ours, peer, strict=True))
        told = ["", ""] if arm == other else [f"{value:.2f} [{low:.2f}, {high:.2f}]", each]
        lines.append([type_, arm, where, str(ours.shape[1]), f"{ours.mean():.5f}", *told])
    columns = ["bytes of", "arm", "text", "rows", "KLD", "over the peer's", "by seed"]
    table("KLD from the f16 file, nats a token", columns, lines)
    print("bytes: " + ", ".join(f"{name}: the peer's {peer:,}, ours {ours:,}" for name, (peer, ours) in sizes.items()))
    print(
        f"AutoRound {_autoround.VERSION}: {why if autoround is None else f'{autoround} iterations'}; the model: {given.model}"
    )
    print(machine_line())
    best = best_arm(given.quick)

    def worst(type_: str, arm: str, *texts: str) -> float:
        return max(ratios[f"{type_}, {arm}, {where}"][0] for where in texts)

    inside, outside = ("in domain",), ("out of domain", "ordinary chat")
    wanted: dict[str, bool] = {}
    if not given.only_blocks:
        wanted["Q4_K_M at most 0.5 on every text"] = worst("Q4_K_M", best, *SETS) <= 0.5
        fewer = worst("Q4_K_M", f"{best}, fewer bytes", *SETS)
        wanted["20 % fewer bytes at Q4_K_M's KLD on every text"] = fewer <= 1
        if not given.quick:
            wanted["IQ4_XS at most 0.5 on every text"] = worst("IQ4_XS", best, *SETS) <= 0.5
    if given.only_blocks or not given.quick:
        wanted["Q4_0's blocks at most 0.35 in the domain"] = worst("Q4_0", DISTILLED, *inside) <= 0.35
        wanted["Q4_0's blocks at most 0.6 out of it, chat included"] = worst("Q4_0", DISTILLED, *outside) <= 0.6
    for what, holds in wanted.items():
        print(f"{what}: {'holds' if holds else 'does not hold'}")
    first = ("Q4_0", DISTILLED, "in domain") if given.only_blocks else ("Q4_K_M", best, "in domain")
    finish(
        name=NAME,
        ours=round(float(np.concatenate(found[first]).mean()), 6),
        peer=round(float(np.concatenate(found[first[0], LLAMA, "in domain"]).mean()), 6),
        ratio=ratios[", ".join(first)][0],
        unit=f"KLD in domain, nats a token, bytes of {first[0]}",
        n=sum(map(len, found[first])),
        wanted="; ".join(wanted),
        holds=all(wanted.values()),
        ratios=ratios,
        seeds=seeds,
        model=given.model,
    )


if __name__ == "__main__":
    main()
