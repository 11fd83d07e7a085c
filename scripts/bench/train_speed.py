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
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from _common import cache_folder, could_not_measure, finish, machine_line, parser, say, table

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import EdgeDistillError
from edgedistill.evals.statistics import Estimate, median_ratio
from edgedistill.recipes import copy_recipe
from edgedistill.runner import Runner
from edgedistill.session import prepare
from edgedistill.store import Store
from edgedistill.ui import TerminalReporter

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
RANK, LR = 16, 2e-4
WARM = 2  # optimiser steps before the first that counts


def base_model() -> tuple[Path, list[Row]]:
    """Return the folder of SmolLM2-135M-Instruct in the user's store, and rows to train on."""
    folder = cache_folder(NAME) / "recipe"
    if not (folder / "recipe.toml").is_file():
        copy_recipe("quickstart", folder)
    session = prepare(folder, note=say)
    wanted = session.plan.match("base/teacher")
    outcome = Runner(session.plan.only(wanted), session.store, TerminalReporter()).build()
    for error in outcome.failed.values():
        raise error
    entry = Store(session.store.root).load(wanted[0].key)
    assert entry is not None
    return entry.path / "model", load_rows(folder / "data" / "train.jsonl", need_reference=True)


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


# ── an arm, in a process of its own ──


class Turns:
    """Report what was measured and wait for the next turn, on standard input and output."""

    def __init__(self, steps: int, warm: int = WARM) -> None:
        self.warm = warm
        self.steps, self.done, self.tokens, self.started = steps, 0, 0, 0.0
        self.spent: dict[str, float] = {}

    def wait(self) -> None:
        """Say that the arm stands ready; return when its turn begins."""
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        self.tokens, self.spent, self.started = 0, {}, time.perf_counter()

    def step(self, tokens: int) -> None:
        """Count one optimiser step; at the end of a turn, report and wait."""
        self.tokens += tokens
        self.done += 1
        if self.done < self.warm:
            return
        if self.done > self.warm and (self.done - self.warm) % self.steps == 0:
            seconds = time.perf_counter() - self.started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            found = {"seconds": seconds, "tokens": self.tokens, "memory": peak, "split": self.spent}
            print(json.dumps(found), flush=True)
        if (self.done - self.warm) % self.steps == 0:
            self.wait()


def encode(job: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the tokenizer and the rows as token ids: every arm trains on the same."""
    from transformers import AutoTokenizer

    from edgedistill.training.data import encode_example

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    return tokenizer, [
        encode_example(tokenizer, row["messages"], row["completion"], id=str(at)) for at, row in enumerate(job["rows"])
    ]


@contextmanager
def split_of_time(turns: Turns) -> Iterator[None]:
    """Account for the parts of our optimiser step while inside."""
    import torch

    from edgedistill.training import trainer

    def timed(owner: Any, name: str, part: str) -> Callable[[], None]:
        whole = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return whole(*arguments, **named)
            finally:
                turns.spent[part] = turns.spent.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, call)
        return lambda: setattr(owner, name, whole)

    undo = [
        timed(trainer, "completion_states", "decoder, forward"),
        timed(trainer, "completion_loss", "head and loss"),
        timed(torch.Tensor, "backward", "decoder, backward"),
        timed(trainer.DenseTeacher, "targets", "teacher"),
    ]
    try:
        yield
    finally:
        for one in undo:
            one()


def train_ours(job: dict[str, Any]) -> None:
    """Train by our own loop until the rows end."""
    from edgedistill.teachers.transformers import TransformersTeacher
    from edgedistill.training.dense import DenseTeacher
    from edgedistill.training.draws import stored_temperatures
    from edgedistill.training.lora import LoraSettings
    from edgedistill.training.losses import LossTerms
    from edgedistill.training.recipe import load_model
    from edgedistill.training.settings import TrainSettings, plan_steps
    from edgedistill.training.targets import TargetsHeader, TargetsWriter, read_targets
    from edgedistill.training.trainer import train

    tokenizer, examples = encode(job)
    model = Path(job["model"])
    kd = job["arm"] != "sft-ours"
    settings = TrainSettings(
        lora=LoraSettings(rank=RANK, alpha=2 * RANK),
        lr=LR,
        batch_size=job["batch"],
        micro_batch=job["setting"]["micro"],
        loss=LossTerms(kd=1.0 if kd else 0.0, ce=0.0 if kd else 1.0),
        gradient_norms=0,
        schedule="constant",
    )
    turns = Turns(job["steps"], job.get("warm", WARM))
    counts = [sum(examples[row].length for row in rows) for rows in plan_steps(examples, settings)]
    targets = teacher = None
    if job["arm"] == "dense-ours":
        teacher = DenseTeacher(load_model(model), len(tokenizer))
    if job["arm"] == "draws-ours":
        shard = Path(job["targets"])
        if not shard.is_file():  # what the score step does; no part of what is timed
            scorer = TransformersTeacher(model)
            header = TargetsHeader(
                kind="sampled",
                n=12,
                temperature=1.0,
                temperatures=stored_temperatures(1.0),
                vocab_size=scorer.vocab_size,
                tokenizer=scorer.tokenizer_hash,
                teacher="bench",
                seed=0,
            )
            with TargetsWriter(shard, header) as writer:
                for index, found in scorer.score(examples, kind="sampled", n=12, temperature=1.0, seed=0):
                    writer.write(examples[index], found)
            return  # its memory is not that of training: the caller asks again
        targets = read_targets([shard], examples)
    with tempfile.TemporaryDirectory() as out, split_of_time(turns):
        train(
            load_model(model),
            examples,
            targets,
            settings=settings,
            out=Path(out),
            vocab_size=len(tokenizer),
            teacher=teacher,
            progress=lambda done, total, note: turns.step(counts[done - 1]),
        )


def train_peer(job: dict[str, Any]) -> None:
    """Train by TRL on the same token ids until the rows end."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer, examples = encode(job)
    turns = Turns(job["steps"], job.get("warm", WARM))
    seen = [0]
    gkd, setting = job["arm"] == "gkd-trl", job["setting"]
    dtype = torch.float32 if setting["autocast"] else torch.bfloat16
    data = Dataset.from_dict(
        {
            "input_ids": [[*one.prompt_ids, *one.completion_ids] for one in examples],
            "completion_mask": [[0] * len(one.prompt_ids) + [1] * len(one.completion_ids) for one in examples],
        }
    )
    common: dict[str, Any] = {
        "output_dir": job["out"],
        "num_train_epochs": 1,
        "per_device_train_batch_size": setting["micro"],
        "gradient_accumulation_steps": job["batch"] // setting["micro"],
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "group_by_length",
        "bf16": setting["autocast"],
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "max_length": None,
        "disable_tqdm": True,
    }

    class AtEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(seen[0])
            seen[0] = 0

    class Counted:
        """Count the tokens of every micro-batch, padding left out."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            seen[0] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest)  # type: ignore[misc]

    def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for at, row in enumerate(rows):
            own = torch.tensor(row["input_ids"])
            ids[at, : len(own)], mask[at, : len(own)] = own, 1
            labels[at, : len(own)] = own.masked_fill(torch.tensor(row["completion_mask"]) == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    extra: dict[str, Any] = {}
    if gkd:
        common |= {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0}
        extra = {
            "teacher_model": AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype),
            "data_collator": padded,
        }
        arguments = GKDConfig(**common)
    else:
        arguments = SFTConfig(**common, completion_only_loss=True)
    counting: Any = type("Counting", (Counted, GKDTrainer if gkd else SFTTrainer), {})
    made = counting(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        callbacks=[AtEnd()],
        **extra,
    )
    made.train()


class Arm:
    """Drive one arm's process from outside."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        self.name = job["arm"]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--arm", "-"],
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
        [sys.executable, __file__, "--arm", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
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
    options.add_argument("--arm", help="used by the script itself: a job as JSON on standard input")
    given = options.parse_args()
    if given.arm:
        job = json.loads(sys.stdin.readline())
        (train_ours if job["arm"].endswith("-ours") else train_peer)(job)
        return
    if given.quick:
        given.kinds, given.rounds = ["short"], 1
    model, rows = base_model()
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
