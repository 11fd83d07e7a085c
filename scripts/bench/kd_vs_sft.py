"""Distillation against plain fine-tuning: same student, data, steps and seeds; ours by soft targets, the peer by TRL.

Both arms train the same LoRA on the quickstart's healed student, on the rows that the filters kept, for the same
number of optimiser steps: ours with the recipe's loss (forward KL on random-sampled targets + cross-entropy), the peer with
TRL's SFTTrainer (completion-only cross-entropy), each in a process of its own. Exact match on holdout and ood and KL to the
teacher are averaged over the seeds row by row, and rows are the sample: seeds answer the same rows, so they are no new ones. The
table shows whichever way it falls. What the quickstart has built already is reused.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from _common import finish, parser, say
from _recipe import build, entry_of, recipe_folder

from edgedistill.errors import EdgeDistillError
from edgedistill.evals.statistics import paired_difference
from edgedistill.session import Session
from edgedistill.training.recipe import load_kept, load_model, train_settings
from edgedistill.ui import clock

TARGET = "phone-midrange"
SUITES = ("holdout", "ood")
QUICK = {
    "teacher.min_score": {},
    "adapt.rows": 24,
    "prompts.rows": 24,
    "heal.rows": 48,
    "baselines": {},
    "suites": {},  # held-out rows are scored here, arm by arm
    "gates": {},
}


def bring(quick: bool) -> Session:
    """Bring the quickstart up to its healed student and soft targets; the full recipe shares the user's store."""
    folder = recipe_folder("kd_vs_sft", "quick" if quick else "full")
    return build(folder, ("score", "heal"), targets=[TARGET], overrides=QUICK if quick else {})


def places(session: Session) -> dict[str, str]:
    """Return where student, teacher, kept rows and targets lie."""

    def path(step: str, file: str) -> str:
        return str(entry_of(session, step).path / file)

    return {
        "student": path("heal", "model"),
        "teacher": path("adapt", "model"),
        "kept": path("filter", "kept.jsonl"),
        "targets": path("score", "targets"),
    }


# ── one arm, in a process of its own ──


def train_ours(job: dict[str, Any], out: Path) -> Path:
    """Train with soft targets; return the adapter's folder."""
    from edgedistill.training.recipe import load_targets
    from edgedistill.training.trainer import train

    student = Path(job["student"])
    examples, tokenizer = load_kept(Path(job["kept"]), student)
    examples, targets = load_targets(Path(job["targets"]), examples, tokenizer, student)
    settings = train_settings(job["training"], loss=job["loss"], seed=job["seed"])
    return train(load_model(student), examples, targets, settings=settings, out=out).path


def train_peer(job: dict[str, Any], out: Path) -> Path:
    """Train by TRL's SFTTrainer on the same token ids, steps, batch size, learning rate and adapter; return its folder."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    student, training = Path(job["student"]), job["training"]
    examples, tokenizer = load_kept(Path(job["kept"]), student)
    steps = max(1, round(training["epochs"] * -(-len(examples) // training["batch_size"])))
    data = Dataset.from_dict(
        {
            "input_ids": [[*e.prompt_ids, *e.completion_ids] for e in examples],
            "completion_mask": [[0] * len(e.prompt_ids) + [1] * len(e.completion_ids) for e in examples],
        }
    )
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=training["batch_size"],
        learning_rate=training["lr"],
        lr_scheduler_type=training["schedule"],
        warmup_steps=max(1, round(training["warmup"] * steps)),
        max_grad_norm=training["max_grad_norm"],
        weight_decay=training["weight_decay"],
        completion_only_loss=True,
        bf16=False,  # the model is bf16 already, as in our arm; its adapter stays float32
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=job["seed"],
        max_length=None,
        disable_tqdm=True,
    )
    lora = training["lora"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["targets"]
        ),
    )
    trainer.train()
    trained: Any = trainer.model
    trained.save_pretrained(out / "adapter")
    return out / "adapter"


def arm(job: dict[str, Any]) -> None:
    """Train one arm, then score it: prints one JSON object with the per-row results."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from edgedistill.data.prompts import load_rows
    from edgedistill.evals.metrics import json_exact
    from edgedistill.teachers.protocol import Sampling
    from edgedistill.teachers.transformers import TransformersTeacher
    from edgedistill.training.data import encode_example
    from edgedistill.training.vocabulary import read_origin

    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        adapter = (train_ours if job["arm"] == "ours" else train_peer)(job, Path(folder))
        seconds = time.monotonic() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        base = AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32)
        adapted: Any = PeftModel.from_pretrained(base, str(adapter))
        merged = adapted.merge_and_unload()
    student = TransformersTeacher(Path(job["student"]), model=merged)
    suites = {name: load_rows(Path(path), need_reference=True)[: job["rows"]] for name, path in job["suites"].items()}
    right = {name: [0.0] * len(rows) for name, rows in suites.items()}
    for name, rows in suites.items():
        for answer in student.generate([list(row.messages) for row in rows], sampling=Sampling(max_new_tokens=64)):
            right[name][answer.index] = json_exact(answer.text, rows[answer.index].reference or "").value
    teacher = TransformersTeacher(Path(job["teacher"]))
    # Where the student's vocabulary was trimmed: over the tokens that it kept, by the teacher's numbers of them.
    origin = read_origin(Path(job["student"]))
    kept = None if origin is None else torch.from_numpy(origin.kept)
    divergences = []
    with torch.inference_mode():
        for row in suites["holdout"][: job["kl_rows"]]:
            example = encode_example(student.tokenizer, list(row.messages), row.reference or "", id=row.id)
            ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
            at = slice(len(example.prompt_ids) - 1, -1)
            p = teacher.model(input_ids=ids if kept is None else kept[ids]).logits[0, at]
            p = (p if kept is None else p[:, kept]).float().log_softmax(-1)
            q = student.model(input_ids=ids).logits[0, at].float().log_softmax(-1)
            divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    print(json.dumps({"right": right, "kl": divergences, "seconds": seconds, "memory": memory}))


def run_arm(job: dict[str, Any]) -> dict[str, Any]:
    """Run one arm in a fresh process; raises EdgeDistillError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, "--arm", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EdgeDistillError(f"the arm {job['arm']} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run both arms for every seed, in turn, and print the comparison."""
    options = parser(__doc__ or "", quick="24 rows, one seed, 16 held-out rows")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--arm", help="a job as JSON: used by the script itself")
    given = options.parse_args()
    if given.arm:
        arm(json.loads(given.arm))
        return
    session = bring(given.quick)
    distill = session.recipe.distill
    job = {
        **places(session),
        "training": distill.keyed("loss", "seed"),
        "loss": distill.loss.model_dump(),
        "suites": {name: str(session.path.parent / "data" / f"{name}.jsonl") for name in SUITES},
        "rows": 16 if given.quick else 480,
        "kl_rows": 8 if given.quick else 96,
    }
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for seed in range(1 if given.quick else given.seeds):
        for name in ("ours", "peer") if seed % 2 == 0 else ("peer", "ours"):
            results[name].append(run_arm({**job, "arm": name, "seed": seed}))
            one = results[name][-1]
            exact = ", ".join(f"{suite} {mean(values):.3f}" for suite, values in one["right"].items())
            say(f"seed {seed}, {name}: {exact} in {clock(one['seconds'])}")
    print(f"{'':28}{'KD (ours)':>14}{'SFT (TRL)':>14}{'difference':>14}  95 % interval, n rows")
    compared: dict[str, dict[str, Any]] = {}
    for label, key in (*((f"exact match, {suite}", suite) for suite in SUITES), ("KL to the teacher, nats", "kl")):
        of = {
            name: [
                mean(of_row)
                for of_row in zip(*(one["kl"] if key == "kl" else one["right"][key] for one in found), strict=True)
            ]
            for name, found in results.items()
        }
        difference = paired_difference(of["ours"], of["peer"])
        compared[key] = {name: mean(values) for name, values in of.items()} | {"difference": difference}
        print(
            f"{label:28}{mean(of['ours']):14.4f}{mean(of['peer']):14.4f}{difference.value:+14.4f}"
            f"  [{difference.low:+.4f}, {difference.high:+.4f}], {difference.n}"
        )
    for label, key, scale, unit in (("training time", "seconds", 1.0, "s"), ("peak memory", "memory", 2**-20, "MiB")):
        middle = {name: sorted(one[key] for one in found)[len(found) // 2] * scale for name, found in results.items()}
        print(
            f"{label + ', ' + unit:28}{middle['ours']:14.1f}{middle['peer']:14.1f}{middle['ours'] / middle['peer']:13.2f}x"
        )
    ours, peer = compared["holdout"]["ours"], compared["holdout"]["peer"]
    finish(
        name="kd_vs_sft",
        ours=round(ours, 4),
        peer=round(peer, 4),
        ratio=round(ours / peer, 4) if peer else None,
        unit="exact match on holdout",
        n=compared["holdout"]["difference"].n,
        wanted="accuracy on holdout and ood not below SFT's (95 % intervals of the paired differences reach 0)",
        holds=all(compared[suite]["difference"].high >= 0 for suite in SUITES),
        seeds=len(results["ours"]),
        differences={key: one["difference"].to_json() for key, one in compared.items()},
    )


if __name__ == "__main__":
    main()
