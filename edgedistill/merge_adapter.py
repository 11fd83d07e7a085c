"""``merge MODEL ADAPTER``: fold an adapter that was trained elsewhere into its model, by the gates of the merge step.

PEFT loads what fits and says nothing of what does not: an adapter of another model, or whole modules beside the low-rank pairs,
would merge into something that nobody trained. So every tensor of the adapter has to be one half of a pair on a linear layer of
this model, of its shape, before anything is merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import UsageError
from edgedistill.model_facts import read_json
from edgedistill.models import KINDS, resolve
from edgedistill.quantize_model import sample_rows
from edgedistill.store import Store

if TYPE_CHECKING:
    from edgedistill.training.lora import MergeReport

PAIR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<half>A|B|magnitude_vector)(\.default)?(\.weight)?$")
ROWS = 8


def merge_adapter(
    model: str, adapter: Path, out: Path, *, rows: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> MergeReport:
    """Write ``model`` with ``adapter`` merged to ``out``, float32 safetensors, once its logits agree with model + adapter.

    ``model`` is an HF folder or a source (hf:, path:); ``rows`` a JSONL file of text to compare on, where ordinary text is not
    like the task. Raises UsageError for what cannot be merged, StepFailed where the two disagree.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already, and not empty", "give another folder: -o DIR")
    text = text_to_compare(rows)
    folder = base_folder(model, note)
    config = check_adapter(folder, adapter)
    named = config.get("base_model_name_or_path")
    if named:
        note(f"the adapter was trained on {named}; every layer that it changes has its shape in {model}")
    from edgedistill.training.lora import merge
    from edgedistill.training.recipe import copy_tokenizer

    report = merge(folder, adapter, out, rows=encode(folder, text))
    copy_tokenizer(folder, out)
    return report


def text_to_compare(rows: Path | None) -> list[Row]:
    """Return the first rows of a JSONL file, or ordinary text where there is none."""
    return load_rows(rows)[:ROWS] if rows is not None else list(sample_rows())


def base_folder(model: str, note: Callable[[str], None]) -> Path:
    """Return the HF folder of ``model``, a folder or a source. Raises UsageError for a GGUF."""
    source = model if model.split(":", 1)[0] in KINDS else f"path:{model}"
    folder = resolve(source, Store().root, note=note).path
    if not folder.is_dir():
        raise UsageError(
            f"{model}: an adapter belongs to full-precision weights, not to a GGUF",
            "give the folder, or the hf: source, that the adapter was trained on",
        )
    return folder


def encode(folder: Path, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of each row, prompt and reference, by the folder's tokenizer and chat template."""
    from transformers import AutoTokenizer

    from edgedistill.training.data import prompt_tokens

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        [
            *prompt_tokens(tokenizer, list(row.messages)),
            *tokenizer.encode(row.reference or "", add_special_tokens=False),
        ]
        for row in rows
    ]


def check_adapter(model: Path, adapter: Path) -> dict[str, Any]:
    """Return the adapter's configuration. Raises UsageError unless all of it is LoRA pairs on linear layers of ``model``."""
    from edgedistill.training.lora import check_targets

    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise UsageError(f"{adapter}: no adapter_config.json: not a PEFT adapter", "give the folder that PEFT saved")
    if not weights.is_file():
        raise UsageError(
            f"{adapter}: no adapter_model.safetensors"
            + (" (adapter_model.bin is a pickle, and is not read)" if (adapter / "adapter_model.bin").exists() else ""),
            "save it again with safe_serialization=True",
        )
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{adapter}: a {config.get('peft_type')} adapter; only LORA is merged", "merge it where it was trained"
        )
    known = {name: shape for file in sorted(model.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    transposed, modules = bool(config.get("fan_in_fan_out")), set()
    for name, shape in _shapes(weights).items():
        found = PAIR.match(name)
        if found is None:
            raise UsageError(
                f"{adapter}: {name} is no half of a LoRA pair on a linear layer (modules_to_save, or an embedding?)",
                "train it without modules_to_save and trainable tokens: such parts do not merge into tied weights",
            )
        module, half = found["module"], found["half"]
        modules.add(module)
        base = known.get(f"{module}.weight")
        if base is None and module.rpartition(".")[2] not in ("lm_head", "embed_out"):
            raise UsageError(f"{adapter}: {module} is no layer of {model}", "give the model that it was trained on")
        wide = base[::-1] if base and transposed else base
        if wide and ((half == "A" and shape[1] != wide[1]) or (half == "B" and shape[0] != wide[0])):
            raise UsageError(
                f"{adapter}: {name} has the shape {shape}, and {module} of {model} is {base}",
                "give the model that it was trained on",
            )
    if not modules:
        raise UsageError(f"{adapter}: no tensors in adapter_model.safetensors", "save the adapter again")
    check_targets(read_json(model / "config.json"), sorted(modules))
    return config


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UsageError(
            f"{path}: no safetensors file, or one cut short: {error}", "save or download it again"
        ) from None
