"""How a text encoder makes one vector of a text: what its checkpoint says of it, as sentence-transformers writes it. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from edgedistill.errors import UsageError

Pooling = Literal["mean", "cls", "last"]
KNOWN: dict[str, Pooling] = {
    **{"mean_tokens": "mean", "cls_token": "cls"},
    **{"mean": "mean", "cls": "cls", "lasttoken": "last"},
}
"""Names of sentence-transformers: keys that are true (pooling_mode_…), and in newer files one value."""
LAYERS = ("Transformer", "Pooling", "Normalize")
HINT = 'say it: pooling = "mean" for an encoder, "last" for a decoder that was trained so'


def pooling_of(folder: Path, asked: Pooling | None = None) -> Pooling:
    """Return how a checkpoint pools: as ``asked``, as it says itself, or, an encoder that says nothing, by the mean of its tokens.

    Raises UsageError for one that takes more than pooling, for a decoder that says nothing, and for an encoder with a decoder.
    """
    config, modules = _read(folder / "config.json", {}), _read(folder / "modules.json", [])
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{folder}: an encoder with a decoder gives no vector of a text", "give a text encoder")
    layers = {str(one.get("type", "")).rpartition(".")[2]: str(one.get("path", "")) for one in modules}
    if more := [name for name in layers if name not in LAYERS]:
        raise UsageError(
            f"{folder / 'modules.json'}: its vectors go through a layer {more[0]!r}, which is not applied here",
            "give an encoder of a transformer and its pooling alone",
        )
    if asked is not None:
        return asked
    if told := _read(folder / layers.get("Pooling", "1_Pooling") / "config.json", {}):
        modes = [name.removeprefix("pooling_mode_") for name, on in told.items() if on is True and "_mode_" in name]
        modes = modes or [str(told.get("pooling_mode", ""))]
        if len(modes) == 1 and modes[0] in KNOWN:
            return KNOWN[modes[0]]
        raise UsageError(f"{folder}: it pools by {' and '.join(modes)}, which is not known here", HINT)
    if any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or []):
        raise UsageError(f"{folder}: a decoder, and nothing says how its tokens become one vector", HINT)
    return "mean"


def _read(path: Path, default: Any) -> Any:
    """Return what a JSON file holds; ``default`` where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    return found if isinstance(found, type(default)) else default
