"""Write a LoRA adapter as a GGUF file of its own, which llama.cpp lays over a base while it runs (``--lora``), and prove it.

One base then serves many tasks: a file of some megabytes for each. Layout as llama.cpp's convert_lora_to_gguf.py writes it and
src/llama-adapter.cpp reads it: ``general.type`` "adapter", ``adapter.type`` "lora", ``adapter.lora.alpha``, and for each matrix
``NAME.lora_a`` [rank, columns] and ``NAME.lora_b`` [rows, rank], which count alpha / rank times. Rows of B are in the order of the
base's rows: for the llama family queries and keys are reordered, as ``convert`` does it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.architectures import family_of
from edgedistill.formats.gguf.checkpoint import read_config

if TYPE_CHECKING:
    import numpy as np

APART = 0.02
"""Largest difference between the two engines, as a share of what the adapter does: rms over logits, base against base + adapter.
Faithful files measured 0.003 and less (SmolLM2-135M, tiny models), those with queries and keys in the wrong order 0.3 and more."""
SEEN = 10
"""Times that the adapter must move logits further than the engines are apart without it, or nothing is proved."""


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What was written and how it compares: ``effect`` is how far the adapter moves logits in transformers, ``difference`` how far
    llama.cpp's movement is from that, ``noise`` how far the two are apart without it; rms over all logits of the positions.
    """

    path: Path
    architecture: str
    tensors: int
    ranks: tuple[int, ...]
    alpha: float
    size: int
    effect: float
    difference: float
    noise: float
    top1: float
    positions: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "path": str(self.path), "ranks": list(self.ranks)}


def lora_to_gguf(
    model_dir: Path,
    adapter: Path,
    out: Path,
    *,
    rows: Sequence[Sequence[int]],
    name: str = "",
    threads: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> LoraReport:
    """Write the PEFT adapter in the folder ``adapter``, trained on the checkpoint ``model_dir``, to the file ``out``.

    Then llama.cpp computes the token ``rows`` with the base and with base + adapter, as transformers and PEFT did. Raises
    UsageError for an adapter that does nothing there, StepFailed, and leaves no file, where the two disagree.
    """
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from edgedistill.formats.gguf.convert import convert

    family = family_of(read_config(model_dir), f"{model_dir}/config.json")
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
    plain = [_logits(model.eval(), row) for row in rows]
    # The plain model's logits first: some ways to start an adapter (PiSSA, OLoRA) change the weights beneath it.
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    adapted = [_logits(model, row) for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        ranks, alpha = _write(partial, model, model_dir, family.arch, name or adapter.resolve().name)
        del model
        note("converting the base to compare with")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".base-") as folder:
            base = convert(model_dir, Path(folder) / "base.gguf", dtype="f32").path
            ours, both = (_by_llama_cpp(base, path, rows, threads) for path in (None, partial))
        moved = [after - before for before, after in zip(plain, adapted, strict=True)]
        theirs = [after - before for before, after in zip(ours, both, strict=True)]
        effect, noise = _rms(moved), _rms([one - two for one, two in zip(ours, plain, strict=True)])
        difference = _rms([one - two for one, two in zip(theirs, moved, strict=True)])
        _judge(adapter, effect, noise, difference)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    agree = [one.argmax(1) == two.argmax(1) for one, two in zip(both, adapted, strict=True)]
    return LoraReport(
        path=out,
        architecture=family.arch,
        tensors=2 * sum(ranks.values()),
        ranks=tuple(sorted(ranks)),
        alpha=alpha,
        size=out.stat().st_size,
        effect=effect,
        difference=difference,
        noise=noise,
        top1=float(np.concatenate(agree).mean()),
        positions=sum(map(len, agree)),
    )


def _judge(adapter: Path, effect: float, noise: float, difference: float) -> None:
    if effect <= SEEN * noise:
        raise UsageError(
            f"{adapter}: it moves logits by {effect:.2g} on this text, and the two engines are {noise:.2g} apart without it: "
            "nothing is proved",
            "give text of its task: --rows FILE; an adapter that was not trained moves nothing",
        )
    if not difference <= APART * effect:
        raise StepFailed(
            f"{adapter}: llama.cpp makes something else of it than PEFT: it moves logits by {effect:.3g}, and they are "
            f"{difference:.3g} apart ({APART:.0%} of that is allowed)",
            "merge it instead: edgedistill merge MODEL ADAPTER",
        )


def _write(path: Path, model: Any, model_dir: Path, arch: str, name: str) -> tuple[dict[int, int], float]:
    """Write the file from a PEFT model; return how many matrices there are of each rank, and alpha."""
    import gguf
    import numpy as np

    from edgedistill.formats.gguf.convert import places

    where, key = places(model_dir), "default"
    layers = [(module, layer) for module, layer in model.named_modules() if key in getattr(layer, "lora_A", ())]
    alpha = float(model.peft_config[key].lora_alpha)
    writer, ranks = gguf.GGUFWriter(path, arch), dict[int, int]()
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, layer in layers:
        target, order = where[f"{module.removeprefix('base_model.model.')}.weight"]
        a, b = (part[key].weight.detach().numpy().astype(np.float32) for part in (layer.lora_A, layer.lora_B))
        # llama.cpp multiplies all by alpha / rank; what PEFT does otherwise (rsLoRA, alpha_pattern) goes into B.
        b = order(b) * np.float32(layer.scaling[key] * len(a) / alpha)
        writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(b))
        ranks[len(a)] = ranks.get(len(a), 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ranks, alpha


def _by_llama_cpp(
    base: Path, adapter: Path | None, rows: Sequence[Sequence[int]], threads: int | None
) -> list[np.ndarray]:
    """Return llama.cpp's logits of each row, float32 [tokens compared, vocabulary]. Its KV cache is in f32, too."""
    from edgedistill.formats.gguf.model_io import all_logits, open_model

    options: dict[str, Any] = {} if adapter is None else {"lora_path": str(adapter)}
    model = open_model(base, n_ctx=max(map(len, rows)), threads=threads, type_k=0, type_v=0, **options)
    try:
        return [all_logits(model, list(row), start=_first(row)) for row in rows]
    finally:
        model.close()


def _logits(model: Any, row: Sequence[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(row)])).logits[0, _first(row) :].float().numpy()


def _first(row: Sequence[int]) -> int:
    """Leave out the first token of a longer row: the attention sink, whose states are so large that rounding alone moves it."""
    return min(1, len(row) - 1)


def _rms(parts: Sequence[np.ndarray]) -> float:
    import numpy as np

    return float(np.sqrt(np.mean(np.concatenate([part.astype(np.float64).ravel() ** 2 for part in parts]))))
