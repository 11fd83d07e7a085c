"""The arms of train_speed.py, each a process of its own: it reads a job from standard input, trains, and waits for its turns."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _recipe import targets_header

RANK, LR = 16, 2e-4
WARM = 2  # optimiser steps before the first that counts


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
    from edgedistill.training.dense import DenseTeacher

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
        timed(DenseTeacher, "targets", "teacher"),
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
    from edgedistill.training.lora import LoraSettings
    from edgedistill.training.losses import LossTerms
    from edgedistill.training.recipe import load_model
    from edgedistill.training.settings import TrainSettings, plan_steps
    from edgedistill.training.targets import TargetsWriter, read_targets
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
            header = targets_header(scorer, "sampled", 12)
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

    trainer: Any = GKDTrainer if gkd else SFTTrainer

    class Counting(trainer):
        """Count the tokens of every micro-batch, padding left out."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            seen[0] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest)

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
    made = Counting(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        callbacks=[AtEnd()],
        **extra,
    )
    made.train()


def main() -> None:
    """Read the job and train."""
    job = json.loads(sys.stdin.readline())
    (train_ours if job["arm"].endswith("-ours") else train_peer)(job)


if __name__ == "__main__":
    main()
