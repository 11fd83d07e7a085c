"""Training speed and memory beside TRL: same SmolLM2-135M, LoRA, token ids, rows of a step and threads, turn by turn.

Cross-entropy on references is held against TRL's SFTTrainer; distillation on stored draws (RS-KD), and from a teacher in
memory, against TRL's experimental GKDTrainer with lmbda = 0 and beta = 0, which is forward KL from a teacher in memory.
Every arm is a process of its own that waits for its turn, and each runs in the micro-batch and precision that a trial on
the same rows found fastest for it. Tokens are those of prompt and completion, without padding, and a prefix that rows
share counts in every row, although we compute it once. Memory is the peak resident set of the process, library and
weights included.

Four kinds of rows: short (one call each), ragged (1 to 12 calls), prompt-heavy (8 solved examples, others in every row, and
one call), completion-heavy (a short prompt and 12 calls).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from _common import could_not_measure, finish, machine_line, parser, say, table
from _recipe import build, entry_of, recipe_folder
from _train_arms import RANK, WARM

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import EdgeDistillError
from edgedistill.evals.statistics import Estimate, median_ratio

NAME = "train_speed"
KINDS = {"short": 16, "ragged": 8, "prompt-heavy": 8, "completion-heavy": 8}  # and the rows of an optimiser step
WANTED = {"short": 2.0, "ragged": 2.0, "prompt-heavy": 2.0, "completion-heavy": 1.5}
MEMORY = 0.7
ARMS = {
    "sft-trl": "TRL SFTTrainer, cross-entropy",
    "sft-ours": "ours, cross-entropy",
    "gkd-trl": "TRL GKDTrainer, lmbda = 0",
    "dense-ours": "ours, KD, teacher in memory",
    "draws-ours": "ours, KD, 12 stored draws",
}
AGAINST = {"sft-ours": "sft-trl", "dense-ours": "gkd-trl", "draws-ours": "gkd-trl"}
ARM = Path(__file__).with_name("_train_arms.py")


def make_rows(kind: str, rows: list[Row], count: int) -> list[dict[str, Any]]:
    """Put rows of one kind together: dictionaries with messages and completion."""
    made = []
    for number in range(count):
        at = number * 12
        some = [rows[(at + offset) % len(rows)] for offset in range(12)]
        if kind == "prompt-heavy":
            system, turn = some[0].messages[0], some[-1].messages[-1]
            shots = [
                message
                for row in some[:8]
                for message in (row.messages[-1], {"role": "assistant", "content": row.reference})
            ]
            made.append({"messages": [system, *shots, turn], "completion": some[-1].reference})
            continue
        calls = {"short": 1, "ragged": (1, 2, 12, 1, 4, 3, 7, 1)[number % 8], "completion-heavy": 12}[kind]
        asked = some[: calls if kind == "ragged" else 1]
        prompt = " ".join(str(row.messages[-1]["content"]) for row in asked)
        made.append(
            {
                "messages": [some[0].messages[0], {"role": "user", "content": prompt}],
                "completion": "\n".join(row.reference or "" for row in some[:calls]),
            }
        )
    return made


class Arm:
    """Drive one arm's process from outside."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        self.name = job["arm"]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(ARM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self._write(json.dumps(job))
        self._expect("ready")

    def _write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def _expect(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found
        words = Path(self.log.name).read_text().strip().splitlines()
        raise EdgeDistillError(f"the arm {self.name} ended early: {words[-1] if words else 'no word'}")

    def turn(self) -> dict[str, Any]:
        """Let the arm run its turn; return seconds, tokens, memory and the split of its time."""
        self._write("go")
        found = self._expect("seconds")
        self._expect("ready")
        return found

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def settings_of(arm: str, batch: int) -> list[dict[str, Any]]:
    """Return the settings that the trial compares."""
    micros = [batch, batch // 4]
    if arm.endswith("-ours"):
        return [{"micro": micro, "autocast": False} for micro in micros]
    return [*({"micro": micro, "autocast": False} for micro in micros), {"micro": micros[0], "autocast": True}]


def rate(found: dict[str, Any]) -> float:
    """Return tokens per second."""
    return found["tokens"] / found["seconds"]


def trial(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run every setting of an arm for one turn; return the fastest."""
    best: tuple[float, dict[str, Any]] | None = None
    for setting in settings_of(job["arm"], job["batch"]):
        arm = Arm({**job, "setting": setting, "warm": 1, "steps": 1}, folder / "trial.log")
        try:
            found = rate(arm.turn())
        finally:
            arm.close()
        say(f"  trial, {job['arm']} {setting}: {found:.0f} tokens/s")
        if best is None or found > best[0]:
            best = found, setting
    assert best is not None
    return best[1]


def compare(
    kind: str, model: Path, rows: list[Row], folder: Path, rounds: int, *, quick: bool
) -> dict[str, dict[str, Any]]:
    """Measure all arms on one kind of rows, turn by turn; return per arm its rates, memory, setting and split."""
    batch, steps = KINDS[kind], 2 if kind == "short" and not quick else 1
    job = {
        "model": str(model),
        "rows": make_rows(kind, rows, batch * (WARM + steps * (rounds + 1) + 1)),
        "batch": batch,
        "steps": steps,
        "targets": str(folder / f"{kind}.parquet"),
        "out": str(folder / "trl"),
    }
    with subprocess.Popen(
        [sys.executable, str(ARM)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as scorer:
        scorer.communicate(json.dumps({**job, "arm": "draws-ours", "setting": {"micro": batch}}) + "\n")
    chosen: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        # The precision and micro-batch that suit cross-entropy suit our distillation: it runs the same decoder.
        like = "sft-ours" if arm.endswith("-ours") else arm
        if like not in chosen:
            chosen[like] = {"micro": batch, "autocast": False} if quick else trial({**job, "arm": like}, folder)
        chosen[arm] = chosen[like]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for name in ARMS:
            arms[name] = Arm({**job, "arm": name, "setting": chosen[name]}, folder / f"{name}.log")
            stack.callback(arms[name].close)
        for turn in range(rounds):
            for name in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                found[name].append(arms[name].turn())
                say(f"{kind}, round {turn + 1} of {rounds}, {name}: {rate(found[name][-1]):.0f} tokens/s")
    return {
        name: {
            "rates": [rate(one) for one in some],
            "memory": max(one["memory"] for one in some),
            "setting": chosen[name],
            "split": {
                part: sum(one["split"].get(part, 0.0) for one in some) / sum(one["seconds"] for one in some)
                for part in some[0]["split"]
            },
        }
        for name, some in found.items()
    }


def main() -> None:
    """Measure every kind of rows and print the comparison."""
    options = parser(__doc__ or "", quick="short rows, one round of one step, no trial of settings")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    given = options.parse_args()
    if given.quick:
        given.kinds, given.rounds = ["short"], 1
    session = build(recipe_folder(NAME, "recipe"), ["base/teacher"])
    model = entry_of(session, "base/teacher").path / "model"
    rows = load_rows(session.path.parent / "data" / "train.jsonl", need_reference=True)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in given.kinds:
                measured[kind] = compare(kind, model, rows, Path(folder), given.rounds, quick=given.quick)
        except EdgeDistillError as error:
            could_not_measure(NAME, str(error))
    ratios: dict[str, dict[str, Estimate]] = {}
    memory: dict[str, dict[str, float]] = {}
    lines = []
    for kind, arms in measured.items():
        ratios[kind] = {
            ours: median_ratio(arms[ours]["rates"], arms[peer]["rates"], paired=True) for ours, peer in AGAINST.items()
        }
        memory[kind] = {ours: arms[ours]["memory"] / arms[peer]["memory"] for ours, peer in AGAINST.items()}
        for name, arm in arms.items():
            precision = "fp32, bf16 autocast" if arm["setting"]["autocast"] else "bf16"
            ratio = ratios[kind].get(name)
            lines.append(
                [
                    f"{kind}: {ARMS[name]}",
                    f"{arm['setting']['micro']}, {precision}",
                    f"{median(arm['rates']):.0f}",
                    f"{arm['memory'] / 2**20:.0f}",
                    "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                    "" if ratio is None else f"{memory[kind][name]:.2f}",
                ]
            )
    table(
        f"LoRA r = {RANK} on SmolLM2-135M: tokens/s (medians of {given.rounds} turns), peak memory, over TRL's",
        ["rows: arm", "micro-batch", "tokens/s", "MiB", "speed-up", "memory"],
        lines,
    )
    parts = sorted({part for arms in measured.values() for name in AGAINST for part in arms[name]["split"]})
    table(
        "where our time goes",
        ["rows: arm", *parts, "optimiser and rest"],
        [
            [
                f"{kind}: {ARMS[name]}",
                *(f"{arms[name]['split'].get(part, 0.0):.0%}" for part in parts),
                f"{1 - sum(arms[name]['split'].values()):.0%}",
            ]
            for kind, arms in measured.items()
            for name in AGAINST
        ],
    )
    print(f"\n{machine_line()}")
    finish(
        name=NAME,
        ours={
            kind: {name: round(median(arms[name]["rates"]), 1) for name in AGAINST} for kind, arms in measured.items()
        },
        peer={
            kind: {name: round(median(arms[name]["rates"]), 1) for name in ("sft-trl", "gkd-trl")}
            for kind, arms in measured.items()
        },
        ratio={kind: {name: one.to_json() for name, one in some.items()} for kind, some in ratios.items()},
        unit="tokens/s",
        n=given.rounds,
        wanted="2x on short, ragged and prompt-heavy rows, 1.5x on completion-heavy ones, memory at most 0.7x",
        holds=all(one.value >= WANTED[kind] for kind, some in ratios.items() for one in some.values())
        and all(one <= MEMORY for some in memory.values() for one in some.values()),
        memory=memory,
        quick=given.quick,
    )


if __name__ == "__main__":
    main()
