"""A distillation as another trainer takes it: the student before it, the rows that were kept, and a configuration.

The configuration says the same as the recipe, as far as that tool can: model, adapter, rates, batches, schedule, length, and loss
on completions alone. What it cannot is written at its head. Formats as documented:
axolotl https://docs.axolotl.ai/docs/dataset-formats/conversation.html and https://docs.axolotl.ai/docs/config-reference.html;
ms-swift https://swift.readthedocs.io/en/latest/Instruction/Command-line-parameters.html;
unsloth https://docs.unsloth.ai (``FastLanguageModel``) with TRL https://huggingface.co/docs/trl/sft_trainer.
An adapter that they write comes back through ``edgedistill merge``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines

if TYPE_CHECKING:
    from edgedistill.recipe_distill import Distill
    from edgedistill.session import Session
    from edgedistill.stages.distill import Distill as DistillStage

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = {"constant": "constant_with_warmup"}  # by transformers' names


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the configurations are made of. ``longest`` is tokens of the longest row, ``end`` the token that ends a turn."""

    recipe: str
    distill: Distill
    seed: int
    rows: int
    longest: int
    end: str
    chatml: bool
    lost: tuple[str, ...]

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        return max(1, math.ceil(self.distill.batch_size / self.distill.accumulate))

    @property
    def warmup(self) -> int:
        """Steps of the warm-up: a count, because tools and versions disagree on what to call a share."""
        steps = max(1, round(self.distill.epochs * math.ceil(self.rows / self.distill.batch_size)))
        return max(1, round(self.distill.warmup * steps)) if self.distill.warmup else 0

    @property
    def schedule(self) -> str:
        """The schedule by transformers' name."""
        return SCHEDULES.get(self.distill.schedule, self.distill.schedule)


def export(session: Session, tool: str, out: Path) -> list[Path]:
    """Write ``model/`` (the student before it is distilled), ``rows.jsonl`` and the tool's configuration to ``out``.

    Raises UsageError for a tool that there is not, a folder that is in use, steps that are not built yet, and rows that the
    tool would read otherwise.
    """
    if tool not in TOOLS:
        raise UsageError(f"--to {tool}: there is no such format", f"give one of {', '.join(TOOLS)}, gguf-lora")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already, and not empty", "give another folder: -o DIR")
    (step,) = session.plan.match(f"distill/{len(session.recipe.chain) + 1}")
    stage = cast("DistillStage", step.stage)
    model, kept = (_built(session, key) for key in (stage.student, stage.kept))
    lines = [json.loads(line) for line in json_lines(kept / "kept.jsonl")]
    lines = [line for line in lines if line["text"]]
    if tool == "ms-swift" and any("tools" in line for line in lines):
        raise UsageError(
            "the rows define tools, which ms-swift writes into prompts by templates of its own",
            "give --to axolotl or unsloth",
        )
    job = _job(session, model / "model", kept / "kept.jsonl", len(lines))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model / "model", out / "model", copy_function=_link)
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            turns = [*line["messages"], {"role": "assistant", "content": line["text"]}]
            if tool == "axolotl":  # an earlier turn of the assistant's is part of the prompt
                turns = [{**turn, "train": at == len(turns) - 1} for at, turn in enumerate(turns)]
            tools = {"tools": line["tools"]} if "tools" in line else {}
            file.write(json.dumps({"messages": turns, **tools}, ensure_ascii=False) + "\n")
    name, write = TOOLS[tool]
    (out / name).write_text(write(job), encoding="utf-8")
    return [out / "model", out / "rows.jsonl", out / name]


def _built(session: Session, key: Any) -> Path:
    entry = session.store.load(key)
    if entry is None:
        step = next(step for step in session.plan.steps if step.key == key)
        raise UsageError(f"{step.id} is not built yet", f"edgedistill build {session.path} --until {step.id}")
    return entry.path


def _link(source: Any, goal: Any) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another disk
        shutil.copy2(source, goal)


def _job(session: Session, model: Path, kept: Path, rows: int) -> Job:
    from edgedistill.training.data import turn_end
    from edgedistill.training.recipe import load_kept

    examples, tokenizer = load_kept(kept, model)
    distill = session.recipe.distill
    return Job(
        recipe=session.recipe.name,
        distill=distill,
        seed=session.recipe.seed if distill.seed is None else distill.seed,
        rows=rows,
        longest=max(example.length for example in examples),
        end=tokenizer.convert_ids_to_tokens(turn_end(tokenizer)),
        chatml="<|im_start|>" in (tokenizer.chat_template or ""),
        lost=tuple(_lost(session)),
    )


def _lost(session: Session) -> list[str]:
    """Say what of the recipe's distilling no other trainer is told."""
    recipe, distill = session.recipe, session.recipe.distill
    found = []
    if distill.loss.kd:
        kind = {"dense": "the teacher beside the student", "top-k": f"its {recipe.score.n} best tokens"}
        found.append(
            f"the teacher's distributions ({kind.get(recipe.score.kind, f'{recipe.score.n} ids a token')}, weight "
            f"{distill.loss.kd:g}): here the kept text is learnt by cross-entropy alone"
        )
    if distill.on_policy:
        found.append(f"on_policy = {distill.on_policy:g}: rows that the student writes itself")
    if distill.think_weight != 1.0:
        found.append(f"think_weight = {distill.think_weight:g}: all tokens of a completion count the same")
    if distill.features and distill.features.on:
        found.append("features: hidden states and relations that are drawn to the teacher's")
    if recipe.labels is not None:
        found.append('labels: a prompt has a row for each label, and their shares ("weight") are not used')
    if recipe.round:
        found.append("[[round]]: these are the rows of the first distillation")
    if distill.keep:
        found.append("keep: general rows that hold the student to its start")
    if distill.curriculum != "none":
        found.append(f"curriculum = {distill.curriculum}: here the first epoch is shuffled, too")
    if distill.method == "qlora":
        found.append("qlora: an adapter on full-precision weights stands in for it")
    found.append("batches of rows of like length, gradients by tokens of the whole step, float32 weights in training")
    return found


def _scalar(value: Any) -> str:
    """Write a value as YAML: JSON is YAML, but for floats without a point, which YAML 1.1 reads as text."""
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _yaml(fields: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {_scalar(value)}\n" for name, value in fields.items())


def _head(job: Job, tool: str, command: str) -> str:
    lines = [
        f"Recipe {job.recipe!r} for {tool}, written by edgedistill export. Run in this folder:",
        f"    {command}",
        "then bring the adapter back: edgedistill merge model ADAPTER -o merged",
        f"What {tool} is not told:",
        *(f"- {line}" for line in job.lost),
    ]
    return "".join(f"# {line}\n" for line in lines)


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _training(job: Job) -> dict[str, Any]:
    """Return what transformers' TrainingArguments are told, by its names."""
    one = job.distill
    return {
        "num_train_epochs": _whole(one.epochs),
        "per_device_train_batch_size": job.micro,
        "gradient_accumulation_steps": one.accumulate,
        "learning_rate": one.lr,
        "lr_scheduler_type": job.schedule,
        "warmup_steps": job.warmup,
        "weight_decay": one.weight_decay,
        "adam_beta2": one.beta2,
        "max_grad_norm": one.max_grad_norm,
        "optim": one.optimizer,
        "gradient_checkpointing": one.gradient_checkpointing,
        "seed": job.seed,
    }


def _axolotl(job: Job) -> str:
    one, lora = job.distill, job.distill.lora
    fields: dict[str, Any] = {"base_model": "./model"}
    if one.method != "full":
        fields |= {
            "adapter": "lora",
            "lora_r": lora.rank,
            "lora_alpha": _whole(lora.alpha),
            "lora_dropout": lora.dropout,
        }
        every = isinstance(lora.targets, str)
        fields |= {"lora_target_linear": True} if every else {"lora_target_modules": list(lora.targets)}
        fields |= {"peft_use_dora": lora.dora, "peft_use_rslora": lora.rslora}
    datasets = (
        "datasets:\n  - path: rows.jsonl\n    ds_type: json\n    type: chat_template\n    field_messages: messages\n"
        "    message_field_training: train\n    roles_to_train: []\n    train_on_eos: turn\n"
    )
    fields |= {"chat_template": "tokenizer_default", "eot_tokens": [job.end]}
    rest = {
        "val_set_size": 0,
        "output_dir": "./adapter",
        "sequence_len": job.longest,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "num_epochs": _whole(one.epochs),
        "micro_batch_size": job.micro,
        "gradient_accumulation_steps": one.accumulate,
        "learning_rate": one.lr,
        "lr_scheduler": job.schedule,
        "warmup_steps": job.warmup,
        "weight_decay": one.weight_decay,
        "adam_beta2": one.beta2,
        "max_grad_norm": one.max_grad_norm,
        "optimizer": one.optimizer,
        "gradient_checkpointing": one.gradient_checkpointing,
        "bf16": "auto",
        "seed": job.seed,
    }
    return _head(job, "axolotl", "axolotl train axolotl.yaml") + _yaml(fields) + datasets + _yaml(rest)


def _swift(job: Job) -> str:
    one, lora = job.distill, job.distill.lora
    head = _head(job, "ms-swift", "swift sft --config ms-swift.yaml")
    head += "# Of ms-swift 4; ms-swift 3 calls tuner_type train_type. A model_type that it cannot tell has to be named here.\n"
    if not job.chatml:
        head += "# The model's chat template is not ChatML: name ms-swift's template that is the same.\n"
    fields: dict[str, Any] = {"model": "./model", "use_hf": True, "dataset": ["rows.jsonl"]}
    if job.chatml:
        fields["template"] = "chatml"
    fields["tuner_type"] = "full" if one.method == "full" else "lora"
    if one.method != "full":
        fields |= {"lora_rank": lora.rank, "lora_alpha": _whole(lora.alpha), "lora_dropout": lora.dropout}
        targets = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
        fields |= {"target_modules": targets, "use_dora": lora.dora, "use_rslora": lora.rslora}
    fields |= {
        "loss_scale": "last_round",
        "max_length": job.longest,
        "output_dir": "./adapter",
        **_training(job),
        "torch_dtype": "bfloat16",
    }
    return head + _yaml(fields)


UNSLOTH = '''
from unsloth import FastLanguageModel  # first: it changes what the others import

import json

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained("./model", **{load!r})
{adapter}

def encode(row):
    """Prompt and completion as token ids; the loss is on the completion and the token that ends the turn."""
    *asked, answer = row["messages"]
    tools = row.get("tools")
    text = tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    learnt = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
    learnt = [*learnt, tokenizer.convert_tokens_to_ids({end!r})]
    ids = [*prompt, *learnt]
    return {{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + learnt}}


with open("rows.jsonl", encoding="utf-8") as file:
    rows = Dataset.from_list([encode(json.loads(line)) for line in file])
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    args=SFTConfig(
        dataset_kwargs={{"skip_prepare_dataset": True}},
        remove_unused_columns=False,
        report_to="none",
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # SFTConfig's own default asks for a GPU
        {arguments}
    ),
)
trainer.train()
model.save_pretrained("adapter")
'''


def _unsloth(job: Job) -> str:
    one, lora = job.distill, job.distill.lora
    if lora.dora and one.method != "full":
        raise UsageError("unsloth trains no DoRA adapters", "set distill.lora.dora = false, or take another tool")
    arguments = {
        "output_dir": "checkpoints",
        "max_length": job.longest,
        **_training(job),
    }
    adapter = ""
    if one.method != "full":
        given = {
            "r": lora.rank,
            "lora_alpha": _whole(lora.alpha),
            "lora_dropout": lora.dropout,
            "target_modules": list(LINEAR if isinstance(lora.targets, str) else lora.targets),
            "bias": "none",
            "use_rslora": lora.rslora,
            "use_gradient_checkpointing": one.gradient_checkpointing,
            "random_state": job.seed,
        }
        adapter = "model = FastLanguageModel.get_peft_model(\n    model,\n" + _arguments(given, 4) + ",\n)\n"
    load = {"max_seq_length": job.longest, "load_in_4bit": False, "full_finetuning": one.method == "full"}
    text = UNSLOTH.format(load=load, adapter=adapter, end=job.end, arguments=_arguments(arguments, 8).lstrip() + ",")
    return _head(job, "unsloth", "python train.py") + text


def _arguments(given: Mapping[str, Any], indent: int) -> str:
    return ",\n".join(f"{' ' * indent}{name}={value!r}" for name, value in given.items())


TOOLS: dict[str, tuple[str, Callable[[Job], str]]] = {
    "axolotl": ("axolotl.yaml", _axolotl),
    "unsloth": ("train.py", _unsloth),
    "ms-swift": ("ms-swift.yaml", _swift),
}
"""Name of each tool's file, and what writes it."""
