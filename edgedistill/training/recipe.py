"""From recipe tables and kept rows to what the training library takes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Row, guided
from edgedistill.data.thinking import split
from edgedistill.errors import UsageError
from edgedistill.jsonl import json_lines
from edgedistill.training.data import Example, encode_example
from edgedistill.training.divergences import Divergence
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.objectives import FeatureTerms
from edgedistill.training.settings import LATER, KeepSettings, TrainSettings
from edgedistill.training.targets import SparseTargets, find_targets, read_header, read_targets, tokenizer_hash
from edgedistill.training.traces import join_turns
from edgedistill.training.vocabulary import read_origin


def train_settings(table: Mapping[str, Any], *, seed: int, loss: Mapping[str, Any] | None = None) -> TrainSettings:
    """Translate ``[adapt]``, ``[heal]`` or ``[distill]``. ``accumulate`` splits a batch, so the step stays the same.

    ``EDGEDISTILL_CHECKPOINT_SECONDS`` (60) is how much training a killed build may lose; it changes no byte.
    """
    lora = table.get("lora") or {}
    terms: dict[str, Any] = {"kd": 0.0, "ce": 1.0}
    if loss:
        terms = {key: loss[key] for key in ("kd", "ce", "temperature")}
        terms["divergence"] = Divergence(loss["divergence"], loss.get("share"))
    targets = lora.get("targets", "all-linear")
    later = {name: table[name] for name in LATER if name in table}  # left out of a key at their default
    if "features" in later:
        later["features"] = _features(later["features"])
    if "keep" in later:
        later["keep"] = KeepSettings(**{name: table["keep"][name] for name in ("share", "kl", "ce", "stop")})
    return TrainSettings(
        method=table.get("method", "full"),
        lora=LoraSettings(**{**lora, "targets": targets if isinstance(targets, str) else tuple(targets)}),
        lr=table["lr"],
        beta2=table["beta2"],
        epochs=table["epochs"],
        batch_size=table["batch_size"],
        micro_batch=max(1, -(-table["batch_size"] // table["accumulate"])),
        schedule=table["schedule"],
        warmup=table["warmup"],
        weight_decay=table["weight_decay"],
        clip=table["max_grad_norm"],
        **later,
        loss=LossTerms(**terms),
        hidden=table.get("hidden", 0.0),
        freeze_embeddings=table.get("freeze_embeddings", True),
        seed=seed,
        checkpoint_seconds=float(os.environ.get("EDGEDISTILL_CHECKPOINT_SECONDS", "60")),
    )


def _features(table: Mapping[str, Any]) -> FeatureTerms:
    """Translate ``distill.features``."""
    pairs = table["pairs"]
    return FeatureTerms(
        weight=table["weight"],
        pairs=None if pairs == "even" else tuple((of_teacher, at) for of_teacher, at in pairs),
        distance=table["distance"],
        project=table["project"],
        **table["relations"],
    )


def load_kept(
    kept: Path,
    model: Path,
    *,
    text: str = "text",
    limit: int | None = None,
    think_weight: float = 1.0,
    guide: bool = False,
) -> tuple[list[Example], Any]:
    """Encode the rows that the filters kept with the model's tokenizer: (examples, tokenizer).

    ``text`` is the field that is learnt: "text" (what the filters kept) or "reference" (gold). A token of thinking, or of
    a rationale that is a task of its own, counts ``think_weight`` in the loss. The turns of one trace become one example where
    their tokens allow it (``training/traces.py``). A row that is one of several labels of its prompt has its share as its weight.
    With ``guide`` prompts hold what the teacher alone is told. Raises UsageError for a row that is longer than the model's context.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    context = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    examples: list[tuple[str | None, Example]] = []
    for row in itertools.islice(_kept_lines(kept, text), limit):
        if row[text]:
            one = encode_example(
                tokenizer,
                guided(row["messages"], row.get("guidance") if guide else None),
                row[text],
                tools=row.get("tools", ()),
                id=row["id"],
                context=context,
                evolution=row.get("evolution", 0),
                weight=row.get("weight", 1.0),
                group=row.get("prompt", ""),
            )
            if think_weight != 1.0:
                rationale = row.get("task") == "rationale"
                one = weigh_thinking(tokenizer, one, row[text], think_weight, whole=rationale)
            examples.append((row.get("trace"), one))
    return _whole_traces(examples), tokenizer


def _whole_traces(examples: Iterable[tuple[str | None, Example]]) -> list[Example]:
    """Join the turns of each trace, (name of the trace, turn); what is of no trace stays as it is."""
    found: list[Example] = []
    for trace, group in itertools.groupby(examples, key=lambda pair: pair[0]):
        rows = [one for _, one in group]
        found += rows if trace is None else join_turns(rows)
    return found


def _kept_lines(kept: Path, text: str) -> Iterator[dict[str, Any]]:
    """Yield the kept rows. Of references a prompt has one, however many labels the rows of it teach: it counts once, and whole."""
    seen: set[str] = set()
    for row in map(json.loads, json_lines(kept)):
        if text == "reference" and "prompt" in row:
            prompt = row.pop("prompt")
            row.pop("weight")
            if prompt in seen:
                continue
            seen.add(prompt)
        yield row


def kept_texts(kept: Path, *, text: str = "text") -> list[str]:
    """Return the completions of the rows that ``load_kept`` encodes, in their order."""
    return [row[text] for row in _kept_lines(kept, text) if row[text]]


def weigh_thinking(tokenizer: Any, example: Example, text: str, weight: float, *, whole: bool) -> Example:
    """Return the example with the weight of thinking on the tokens of its block, or on all of them (``whole``).

    A token that reaches over the end of the block belongs to the block, and the space between block and answer does.
    """
    if whole:
        return replace(example, weights=(weight,) * len(example.completion_ids))
    block = split(text)
    starts = [
        start for start, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    ]
    weights = [weight if block.start <= start < block.end else 1.0 for start in starts]
    return replace(example, weights=(*weights, 1.0))  # the token that ends the turn


def load_targets(
    folder: Path, examples: list[Example], tokenizer: Any, model: Path
) -> tuple[list[Example], list[SparseTargets]]:
    """Read the soft targets of the examples, in the numbers of the model's own tokens: (examples, targets).

    Where the vocabulary of ``model`` was trimmed, a row whose text it cuts into other pieces than the teacher has no
    targets and is left out. Raises UsageError where that leaves none, or where targets are missing otherwise.
    """
    shards, origin, own = sorted(folder.glob("*.parquet")), read_origin(model), tokenizer_hash(tokenizer)
    if origin is None or read_header(shards[0]).tokenizer == own:
        return examples, read_targets(shards, examples, tokenizer=own)
    found, scored = find_targets(shards, [origin.example(one) for one in examples], tokenizer=origin.tokenizer)
    if missing := [one.id for one in examples if one.id not in scored]:
        raise UsageError(f"row {missing[0]!r} has no soft targets: it was not scored", "build the score step again")
    pairs = [(one, origin.targets(soft, one)) for one, soft in zip(examples, found, strict=True) if soft is not None]
    if not pairs:
        raise UsageError(
            "the student's vocabulary cuts every scored row into other pieces than the teacher's",
            "take a larger student.vocabulary, or distil on text alone (score.kind = 'none', distill.loss.kd = 0)",
        )
    return [one for one, _ in pairs], [soft for _, soft in pairs]


def encode_rows(rows: Iterable[Row], model: Path) -> list[Example]:
    """Encode rows with their references, with the model's tokenizer; traces and errors as in ``load_kept``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    context = json.loads((model / "config.json").read_text()).get("max_position_embeddings")
    return _whole_traces(
        (
            row.trace,
            encode_example(
                tokenizer,
                list(row.messages),
                row.reference or "",
                tools=row.tools,
                id=row.id,
                context=context,
                evolution=row.evolution or 0,
            ),
        )
        for row in rows
    )


def real_vocabulary(folder: Path, model: Any) -> int:
    """Return the number of tokens that there are: rows of the head beyond the tokenizer's are padding."""
    from transformers import AutoTokenizer

    return min(len(AutoTokenizer.from_pretrained(folder)), model.get_output_embeddings().weight.shape[0])


def load_model(path: Path) -> Any:
    """Load a checkpoint in float32: the trainer chooses what it computes in."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings as they are: saving them anew may rewrite them."""
    for pattern in ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def take_results(result: Any, work: Path, out: Path, *, source: Path) -> None:
    """Move what ``train`` left in ``work`` into the entry: ``adapter/`` or ``model/`` (with its tokenizer), and the
    log.
    """
    shutil.move(result.path, out / result.path.name)
    (out / "log").mkdir()
    shutil.move(work / "log.jsonl", out / "log" / "train.jsonl")
    if result.path.name == "model":
        copy_tokenizer(source, out / "model")
    else:
        strip_adapter(out / "adapter")


def strip_adapter(adapter: Path) -> None:
    """Take out of an adapter what is no part of it: PEFT writes this machine's path of the base and an unordered set.

    Left in, the same adapter built elsewhere would have other bytes, and its teacher's answers would be asked anew.
    """
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = ""
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (adapter / "README.md").unlink(missing_ok=True)
