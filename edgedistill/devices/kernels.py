"""Measure what each type's kernels cost on this machine, inside llama.cpp, which alone repacks weights for them.

Files of random weights and of one type are timed by the tests that limits are about (pp512, tg128), each in two depths, and for one
type in three shapes. Seconds a token are linear in what a file has: so many layers, so wide, so many weights of a type
(``formats.gguf.speeds``). What does not grow with the layers drops out of a type's cost by the depths; attention, norms and the
start of an operation drop out by the shapes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedistill.devices.host import fingerprint, usable_cores
from edgedistill.devices.local import Others, Steps, Worker, noise_of
from edgedistill.devices.protocol import NOISY_SPREAD, Progress, Samples, percentile
from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.speeds import Costs, Kernels
from edgedistill.formats.gguf.types import GGML_TYPES, PALETTE

REFERENCE = "Q8_0"  # the type that is timed in every shape
ROUNDS, REPS = 3, 2
VOCABULARY, HEAD, CONTEXT = 256, 64, 2048  # tokens, width of an attention head, tokens
_ROWS = 64  # that are quantized: a kernel's time does not depend on what the weights are, so the rows repeat
TOKENS = {"pp": ("prompt", 512), "tg": ("generate", 128)}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Width of the stream and of the FFN, and the two depths. The deeper file does not fit caches of a core's own."""

    hidden: int
    ffn: int
    depths: tuple[int, int]

    @property
    def weights(self) -> int:
        """Weights of the matrices of one layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.ffn


WIDE = Shape(hidden=768, ffn=2048, depths=(2, 6))
OTHERS = (Shape(hidden=768, ffn=256, depths=(4, 12)), Shape(hidden=256, ffn=768, depths=(8, 24)))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a token of one file in one test."""

    type: str
    hidden: int
    layers: int
    weights: int  # of all layers
    seconds: float


def measure_kernels(
    types: Sequence[str] = PALETTE,
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
    reps: int = REPS,
    shapes: Sequence[Shape] = (WIDE, *OTHERS),
    progress: Progress | None = None,
) -> Kernels:
    """Time every type's kernels with ``threads`` (default: all cores); about four minutes for all types on two quiet cores.

    Each round opens every pair of depths anew, in processes of their own, and samples them in turns: where pages land is a part
    of the spread. Figures are fitted to medians over all rounds; the spread is that of fits to each round. The first of
    ``shapes`` is every type's, the others are ``REFERENCE``'s. Raises StepFailed where a cost cannot be told from none.
    """
    threads = threads or usable_cores()
    types = list(dict.fromkeys([*types, REFERENCE]))
    if unknown := [name for name in types if name not in PALETTE]:
        raise UsageError(f"{unknown[0]} is none of the types that are chosen among", f"types: {', '.join(PALETTE)}")
    cases = [*((name, shapes[0]) for name in types), *((REFERENCE, shape) for shape in shapes[1:])]
    say, others = Steps(progress, total=rounds * len(cases)), Others()
    samples: dict[tuple[str, Shape, int, str], list[list[float]]] = {}
    runner: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="edgedistill-kernels-") as folder:
        for at in range(rounds):
            for name, shape in cases:
                say(f"round {at + 1} of {rounds}: {name}, {shape.hidden} wide")
                files = {
                    depth: write_model(Path(folder) / f"{depth}.gguf", name, shape, depth) for depth in shape.depths
                }
                for (depth, test), seconds in _pair(files, threads, reps, others, runner).items():
                    samples.setdefault((name, shape, depth, test), []).append(seconds)
    costs: dict[str, Costs] = {}
    spreads: dict[str, Samples] = {}
    for test in TOKENS:
        timed = {key[:3]: given for key, given in samples.items() if key[3] == test}
        whole = fit(_timings({key: [one for some in given for one in some] for key, given in timed.items()}, test))
        each = [fit(_timings({key: given[at] for key, given in timed.items()}, test)) for at in range(rounds)]
        for name in types:
            if whole.weight[name] <= 0:
                raise StepFailed(
                    f"{name}: its kernel's cost ({test}) is lost in the noise of this machine",
                    "let nothing else run, and measure again",
                )
            spreads[f"{name} {test}"] = Samples(values=tuple(one.weight[name] for one in each), unit="s")
        costs[test] = Costs(
            weight=whole.weight,
            spread={name: spreads[f"{name} {test}"].spread for name in types},
            fixed=whole.fixed,
            layer=whole.layer,
            column=whole.column,
        )
    return Kernels(
        threads=threads,
        host=fingerprint(),
        runner=runner,
        settings={
            "rounds": rounds, "reps": reps, "tokens": {test: n for test, (_, n) in TOKENS.items()}, "reference": REFERENCE,
            "shapes": [{**asdict(shape), "depths": list(shape.depths)} for shape in shapes],
        },
        costs=costs,
        noise=_noise(spreads, others.load, threads),
    )  # fmt: skip


def _pair(
    files: Mapping[int, Path], threads: int, reps: int, others: Others, runner: dict[str, str]
) -> dict[tuple[int, str], list[float]]:
    """Return the seconds of every sample of two files that take turns, by depth and test."""
    found: dict[tuple[int, str], list[float]] = {}
    with ExitStack() as stack:
        workers = {depth: stack.enter_context(Worker(path, threads)) for depth, path in files.items()}
        for test, (do, n) in TOKENS.items():
            for worker in workers.values():
                worker.ask(do, n=n)  # warm-up
            for rep in range(reps):
                turns = list(workers.items())
                for depth, worker in turns if rep % 2 == 0 else reversed(turns):
                    with others.watch(worker):
                        found.setdefault((depth, test), []).append(worker.ask(do, n=n)["seconds"])
        runner.update(next(iter(workers.values())).loaded["runner"])
    return found


def _timings(samples: Mapping[tuple[str, Shape, int], Sequence[float]], test: str) -> list[Timing]:
    return [
        Timing(
            type=name,
            hidden=shape.hidden,
            layers=depth,
            weights=depth * shape.weights,
            seconds=percentile(seconds, 0.5) / TOKENS[test][1],
        )
        for (name, shape, depth), seconds in samples.items()
    ]


def fit(timings: Sequence[Timing]) -> Costs:
    """Return the costs, none below zero, whose predictions are nearest to ``timings``: least squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    types = list(dict.fromkeys(one.type for one in timings))
    design = np.zeros((len(timings), 3 + len(types)))
    for row, one in zip(design, timings, strict=True):
        row[:3] = 1, one.layers, one.layers * one.hidden
        row[3 + types.index(one.type)] = one.weights
    design /= np.array([one.seconds for one in timings])[:, None]
    scale = design.max(0)  # columns differ by ten orders of magnitude
    found, _ = nnls(design / scale, np.ones(len(timings)))
    fixed, layer, column, *weight = (found / scale).tolist()
    return Costs(weight=dict(zip(types, weight, strict=True)), spread={}, fixed=fixed, layer=layer, column=column)


def _noise(spreads: Mapping[str, Samples], load: float | None, threads: int) -> tuple[str, ...]:
    """Return the reasons to distrust the figures; of the types that vary, one line."""
    varied = {name: one for name, one in spreads.items() if one.spread > NOISY_SPREAD}
    reasons = noise_of({}, load, threads)
    if varied:
        worst = max(varied, key=lambda name: varied[name].spread)
        told = f"{len(varied)} of {len(spreads)} costs vary by more than {NOISY_SPREAD:.0%} between rounds"
        reasons = (f"{told}, {worst} by {varied[worst].spread:.0%}", *reasons)
    return reasons


def write_model(path: Path, type_name: str, shape: Shape, layers: int, seed: int = 0) -> Path:
    """Write a llama of random weights whose layers' matrices are all of one type. Every layer has the same bytes."""
    import gguf
    import numpy as np

    from edgedistill.formats.gguf.ggml import quantize_matrix

    hidden, ffn = shape.hidden, shape.ffn
    random = np.random.default_rng(seed)
    importance = {columns: np.ones(columns, dtype=np.float32) for columns in (hidden, ffn)}
    rows = {
        columns: quantize_matrix(
            random.normal(0, 0.02, (_ROWS, columns)).astype(np.float32), type_name, importance[columns], threads=1
        )
        for columns in (hidden, ffn)
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(hidden // HEAD)
    writer.add_head_count_kv(hidden // HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    letters = [chr(33 + at) for at in range(94)] + ["\u0120", "\u010a"]  # GPT-2's bytes for a blank and a line break
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*letters, *(f"word{at}" for at in range(VOCABULARY - len(letters)))])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_add_bos_token(False)
    ones = np.ones(hidden, dtype=np.float32)
    writer.add_tensor("token_embd.weight", random.normal(0, 0.5, (VOCABULARY, hidden)).astype(np.float32))
    writer.add_tensor("output_norm.weight", ones)
    number = gguf.GGMLQuantizationType(GGML_TYPES[type_name].number)
    matrices = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (ffn, hidden)),
        "ffn_down": (hidden, ffn),
    }
    whole = {name: np.tile(rows[shape[1]], (-(-shape[0] // _ROWS), 1))[: shape[0]] for name, shape in matrices.items()}
    for layer in range(layers):
        for name, blocks in whole.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=number)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kernels_rows(kernels: Kernels) -> tuple[list[list[str]], list[str]]:
    """Lay figures out for a table: (type, bits a weight, picoseconds a weight and token, spread, ... of both tests), and notes."""
    pp, tg = kernels.costs["pp"], kernels.costs["tg"]
    rows = [
        [name, f"{GGML_TYPES[name].bpw:.2f}"]
        + [text for of in (pp, tg) for text in (f"{1e12 * of.weight[name]:.3g}", f"{of.spread[name]:.0%}")]
        for name in sorted(kernels.types(), key=pp.weight.__getitem__)
    ]
    host, settings = kernels.host, kernels.settings
    notes = [
        f"{host.cpu}, {host.cores} cores; {kernels.threads} threads; n = {settings['rounds']} rounds of {settings['reps']} samples",
        f"{kernels.runner['version']}, {kernels.runner['commit']}: {kernels.runner['build']}",
        *(
            f"{test}: beside the matrices {1e6 * of.fixed:.3g} us a token, {1e6 * of.layer:.3g} us a layer and "
            f"{1e9 * of.column:.3g} ns a layer and column"
            for test, of in (("pp512", pp), ("tg128", tg))
        ),
        *(f"NOISY: {reason}" for reason in kernels.noise),
    ]
    return rows, notes
