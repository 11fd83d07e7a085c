"""Name the ways in which byte-level BPE tokenizers split text before merging, in llama.cpp's words and in Hugging
Face's.

llama.cpp has one hand-written splitter per name in ``tokenizer.ggml.pre`` (src/llama-vocab.cpp); a tokenizer.json holds
the same thing as JSON (normalizer + pre_tokenizer). Both directions use this one table: converting looks the JSON up,
dequantizing writes it. Names are not proof that the two split alike, so callers compare token ids on real text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# GPT-2's own expression is built into the ByteLevel step of the tokenizers library (use_regex).
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3 splits as Qwen2 does, but takes up to three digits together.
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """One way to split: the steps in Hugging Face's words; ``ignore_merges`` as the model section of the JSON has
    it.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: str = ""
    ignore_merges: bool = False


SPLITTERS: dict[str, Splitter] = {
    "gpt-2": Splitter(steps=(_GPT2,)),
    "smollm": Splitter(steps=(_DIGITS, _GPT2)),
    "llama-bpe": Splitter(steps=(_split(_LLAMA3), _BYTES), ignore_merges=True),
    "qwen2": Splitter(steps=(_split(_QWEN2), _BYTES), normalizer="NFC"),
}
# Other names under which llama.cpp runs the same code (not "default": that one has an expression of its own).
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def splitter(pre: str) -> Splitter | None:
    """Return the splitter that llama.cpp calls ``pre``, or None when we do not know it."""
    return SPLITTERS.get(ALIASES.get(pre, pre))


def pre_tokenizer_json(pre: str) -> dict[str, Any]:
    """Return the ``pre_tokenizer`` section of a tokenizer.json for the known name ``pre``."""
    steps = [dict(step) for step in SPLITTERS[ALIASES.get(pre, pre)].steps]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _plain(step: dict[str, Any]) -> tuple[Any, ...]:
    """Keep of one step only what changes how text is split."""
    kind = step.get("type")
    if kind == "Split":
        pattern = step.get("pattern", {})
        return kind, str(pattern.get("Regex", pattern)), step.get("behavior"), bool(step.get("invert"))
    if kind == "ByteLevel":
        return kind, bool(step.get("add_prefix_space")), bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    return kind, repr(sorted(step.items(), key=str))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    if not pre_tokenizer:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [plain for step in pre_tokenizer.get("pretokenizers", []) for plain in _steps(step)]
    return [_plain(pre_tokenizer)]


def find_pre(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the splitter of a parsed tokenizer.json, or None when it is none of ours."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "")
    ignore_merges = bool(tokenizer.get("model", {}).get("ignore_merges"))
    for name, known in SPLITTERS.items():
        if steps == [_plain(step) for step in known.steps] and normalizer == known.normalizer:
            # llama.cpp ties ignore_merges to the name, so the same expression without it is another tokenizer.
            return name if ignore_merges == known.ignore_merges else None
    return None
