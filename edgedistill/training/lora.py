"""LoRA adapters: attaching, refusing what cannot be merged, merging with proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training.quiet import quiet

if TYPE_CHECKING:
    import torch

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("lm_head", "embed_out", "output")
EMBEDDING_NAMES = ("embed_tokens", "wte", "tok_embeddings", "embed_in")
_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"), _OF_LLAMA),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
"""What the linear layers of a block are called in transformers, by architecture."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Shape of an adapter. ``targets``: "all-linear" (all but head and embeddings), or module names. ``dora`` and ``rslora``
    are PEFT's ``use_dora`` and ``use_rslora``.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    dora: bool = False
    rslora: bool = False


def check_modules(architecture: str, targets: str | Sequence[str]) -> None:
    """Refuse targets that no layer of a known family is called by: PEFT says so after the teacher has answered, and of some that
    are there beside others that are not it says nothing. Raises UsageError.
    """
    known = MODULES.get(architecture.removesuffix("_text"), ())
    missing = [name for name in targets if name.split(".")[-1] not in known] if known and targets != ALL_LINEAR else []
    if missing:
        raise UsageError(
            f"{architecture} has no {', '.join(missing)} to adapt", f'give "all-linear", or some of {", ".join(known)}'
        )


def check_targets(config: Any, targets: str | Sequence[str]) -> None:
    """Refuse adapters that merge wrong; ``config`` is a dict (config.json) or a transformers config.

    The head of a tied model is its embedding: PEFT adapts one use of the tensor and merges into both (logit error 1 to
    11 on a scale below 1, and ``ensure_weight_tying`` does not mend it). Raises UsageError.
    """
    if isinstance(targets, str):
        if targets != ALL_LINEAR:
            raise UsageError(f'lora.targets = "{targets}": give "all-linear" or a list of module names')
        return
    if not targets:
        raise UsageError('lora.targets is empty: give "all-linear" or a list of module names')
    tied = config.get("tie_word_embeddings", True) if isinstance(config, dict) else config.tie_word_embeddings
    bad = [name for name in targets if name.split(".")[-1] in (*HEAD_NAMES, *EMBEDDING_NAMES)]
    if bad and tied:
        raise UsageError(
            f"lora.targets names {', '.join(bad)}, but this model ties its head to its embedding: "
            "such an adapter does not merge",
            hint=f"remove {', '.join(bad)} from lora.targets, or train with method = 'full'",
        )
    if bad:
        raise UsageError(
            f"lora.targets names {', '.join(bad)}: the loss evaluates the head by itself, adapters go on the decoder",
            hint="use lora.targets = 'all-linear'",
        )


def attach(model: Any, settings: LoraSettings, *, seed: int = 0) -> Any:
    """Wrap a causal LM in a PEFT adapter (A from the seed, B zero) and return the PEFT model."""
    import torch
    from peft import LoraConfig, get_peft_model

    check_targets(model.config, settings.targets)
    if settings.rank < 1:
        raise UsageError(f"lora.rank = {settings.rank}: it must be at least 1")
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"lora.targets = {targets}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Agreement of the merged checkpoint with base + adapter on the given tokens."""

    max_logit_difference: float
    mean_logit_difference: float
    logit_scale: float
    top1_agreement: float
    positions: int
    dtype: str
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def merge(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    rows: Sequence[Sequence[int]],
    dtype: str = "float32",
    tolerance: float | None = None,
) -> MergeReport:
    """Merge an adapter into its full-precision base, save, reload and compare logits on the token ``rows``.

    The base is loaded in float32 whatever it was trained in; ``safe_merge`` refuses non-finite weights. ``tolerance``
    is the largest allowed logit difference, in logit units (default 0.25 saved as bfloat16; as float32 a thousandth of the
    logits' standard deviation, and no less than 1e-3). Raises StepFailed when base + adapter and the reloaded checkpoint
    disagree; nothing is left in ``out_dir`` then. The first token of a longer row is not compared: it is the attention sink,
    whose states are so large that rounding alone moved its logits by 0.0019 where the others' moved by 0.0001, and nobody reads
    them. Other tokens can have such states, too (0.0023 was seen, of logits that spread by 6.4), so what rounding may do is held
    against the spread; a merge that is wrong moves logits by a good part of it.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not rows:
        raise UsageError("merge: no token rows to compare on")
    kind = getattr(torch, dtype)
    adapter_config = json.loads((adapter_dir / "adapter_config.json").read_text())
    base_config = json.loads((base_dir / "config.json").read_text())
    targets = adapter_config.get("target_modules")
    if isinstance(targets, list):
        check_targets(base_config, targets)
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, trust_remote_code=False)
        model = PeftModel.from_pretrained(model, str(adapter_dir)).eval()
        expected = [_logits(model, row) for row in rows]
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise StepFailed(
                f"the adapter in {adapter_dir} does not merge: {error}", hint="train it again with a lower lr"
            ) from error
        merged.to(kind).save_pretrained(out_dir, max_shard_size="4GB")
        del model, merged
        reloaded: Any = AutoModelForCausalLM.from_pretrained(out_dir, dtype=kind, trust_remote_code=False).eval()
    worst = total = scale = 0.0
    agree = positions = 0
    for row, reference in zip(rows, expected, strict=True):
        got = _logits(reloaded, row)  # [tokens compared, vocabulary]
        difference = (got - reference).abs()
        worst = max(worst, float(difference.max()))
        total += float(difference.mean()) * len(reference)
        scale += float(reference.std()) * len(reference)
        agree += int((got.argmax(-1) == reference.argmax(-1)).sum())
        positions += len(reference)
    scale /= positions
    if tolerance is None:
        tolerance = 1e-3 * max(1.0, scale) if kind == torch.float32 else 0.25
    report = MergeReport(
        max_logit_difference=worst,
        mean_logit_difference=total / positions,
        logit_scale=scale,
        top1_agreement=agree / positions,
        positions=positions,
        dtype=dtype,
        tolerance=tolerance,
    )
    if not worst <= tolerance:
        shutil.rmtree(out_dir)
        raise StepFailed(
            f"the merged checkpoint differs from base + adapter: largest logit difference {worst:.3g} on {positions} "
            f"positions, {tolerance:g} allowed (logits spread {scale:.2g})",
            hint="check lora.targets; layers that share a tensor cannot be merged",
        )
    return report


def _logits(model: Any, row: Sequence[int]) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(row)])).logits[0, min(1, len(row) - 1) :].float()
