"""``export ADAPTER --to gguf-lora``: an adapter as a file of its own beside one base, instead of merged into a copy of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgedistill.errors import UsageError
from edgedistill.merge_adapter import base_folder, check_adapter, encode, text_to_compare

if TYPE_CHECKING:
    from edgedistill.session import Session
    from edgedistill.stages.merge import Merge

TO, ADAPTER = "gguf-lora", "adapter_config.json"


def export_lora(
    model: str,
    adapter: Path,
    out: Path,
    *,
    name: str = "",
    rows: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Write the PEFT adapter in ``adapter``, trained on ``model``, to the GGUF file ``out``; return what to say of it.

    ``model`` is an HF folder or a source (hf:, path:); ``rows`` a JSONL file of text to compare on, where ordinary text is not
    like the task. Raises UsageError for an adapter that llama.cpp has no place for, StepFailed where it computes another one.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already", "give another file: -o FILE.gguf")
    if out.suffix != ".gguf":
        raise UsageError(f"{out}: llama.cpp expects a .gguf file", f"-o {out.with_suffix('.gguf')}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror})", "give another file: -o FILE.gguf") from None
    text = text_to_compare(rows)
    folder = base_folder(model, note)
    _refuse(check_adapter(folder, adapter), adapter)
    from edgedistill.formats.gguf.architectures import family_of
    from edgedistill.formats.gguf.checkpoint import read_config
    from edgedistill.formats.gguf.lora import lora_to_gguf
    from edgedistill.training.quiet import quiet

    family_of(read_config(folder), f"{folder}/config.json")
    with quiet():
        report = lora_to_gguf(folder, adapter, out, rows=encode(folder, text), name=name, note=note)
    ranks = "/".join(map(str, report.ranks))
    return [
        f"{out}: {report.size / 1e6:.1f} MB, {report.tensors // 2} matrices of rank {ranks}",
        f"llama.cpp moves logits as PEFT does: by {report.effect:.3g}, {report.difference:.2g} apart, first choices agree "
        f"{report.top1:.1%} (n = {report.positions} positions)",
        f"base: edgedistill quantize {model} -t TARGET; then llama-server -m BASE.gguf --lora {out}",
    ]


def of_recipe(session: Session, base: str | None) -> tuple[Path, Path]:
    """Return the checkpoint that a recipe's last adapter was trained on, and the adapter. Raises UsageError where it trains none,
    for steps that are not built yet, and where the student has a temperature beside the adapter.
    """
    if base is not None:
        raise UsageError("--base is for an adapter alone: a recipe names its own", "leave it out")
    steps = [step for step in session.plan.steps if "merge" in step.ids]
    if not steps:
        raise UsageError(
            f'{session.path}: distill.method = "{session.recipe.distill.method}" trains no adapter',
            'set distill.method = "lora"',
        )
    stage = cast("Merge", steps[0].stage)
    student, adapter = (session.store.load(key) for key in (stage.student, stage.adapter))
    if student is None or adapter is None:
        raise UsageError("the adapter is not built yet", f"edgedistill build {session.path} --until merge")
    _refuse_temperature(session)
    return student.path / "model", adapter.path / "adapter"


def _refuse_temperature(session: Session) -> None:
    """Refuse a student whose logits are divided by a temperature: that is in its final norm, where an adapter has no place."""
    steps = [step for step in session.plan.steps if "temper" in step.ids]
    if not steps:
        return
    entry = session.store.load(steps[0].key)
    if entry is None:
        raise UsageError(
            "it is not known yet whether the student has a temperature beside the adapter",
            f"edgedistill build {session.path} --until temper",
        )
    found = entry.facts["temper"]
    if found["helped"]:
        raise UsageError(
            f"the student's logits are divided by T = {found['temperature']:.4g}, which is folded into its final norm; llama.cpp "
            "lays an adapter over matrices alone, so that base and file would be surer than the student",
            "take [temperature] out of the recipe, which builds nothing anew for this, and sample at T times the temperature; or "
            "ship the merged student",
        )


def _refuse(config: dict[str, Any], adapter: Path) -> None:
    """Refuse what a GGUF LoRA file has no place for, where `check_adapter` lets it pass because it merges."""
    told = {
        "use_dora": "a DoRA adapter: llama.cpp adds low-rank pairs, and has no magnitudes",
        "lora_bias": "its pairs have biases, and llama.cpp's have none",
        "alora_invocation_tokens": "an activated LoRA, which begins to count at a token of its own",
    }
    for key, why in told.items():
        if config.get(key):
            raise UsageError(f"{adapter / ADAPTER}: {key}: {why}", "merge it instead: edgedistill merge MODEL ADAPTER")
    if not config.get("lora_alpha"):
        raise UsageError(f"{adapter / ADAPTER}: lora_alpha is {json.dumps(config.get('lora_alpha'))}", "train it again")
