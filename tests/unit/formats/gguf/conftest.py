"""Tiny random models with byte-level BPE tokenizers of their own, made once per run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = (
    "Set an alarm for 7:45 tomorrow and call 555-0199.", "def f(x):\n    return x ** 2  # 100%\n",
    "I'm sure it's Bob's.",
    "naïve café 日本語 🙂",
    "turn the volume down to thirty percent and then play the next song in the queue please",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, pre: str = "smollm", *, bos: bool = False, size: int = 400) -> int:
    """Train a byte-level BPE tokenizer, write it to ``folder`` with a chat template; returns how many tokens it has."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    from edgedistill.formats.gguf.pretokenizers import SPLITTERS, pre_tokenizer_json

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")],
    )  # type: ignore[call-arg]  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    data = json.loads(tokenizer.to_str())
    known = SPLITTERS[pre]
    data["pre_tokenizer"] = pre_tokenizer_json(pre)
    data["normalizer"] = {"type": known.normalizer} if known.normalizer else None
    data["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    data["model"]["ignore_merges"] = known.ignore_merges
    if bos:
        first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        rest = {"Sequence": {"id": "A", "type_id": 0}}
        data["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, rest],
            "pair": [first, rest, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": TEMPLATE,
        })
    )  # fmt: skip
    return len(data["model"]["vocab"])


def make_model(
    folder: Path, family: str = "llama", *, pre: str = "smollm", bos: bool = False, dtype: str = "float32",
    seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """Write a random model of ``family`` with a tokenizer to ``folder``; ``config`` overrides its tiny settings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab = make_tokenizer(folder, pre, bos=bos)
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 256, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True, **config,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        # The default start is so small that every token is as likely as any other; norms of one would hide a lost norm.
        for name, weights in model.named_parameters():
            if weights.ndim == 1:
                weights.copy_(1 + 0.3 * torch.randn_like(weights) if "norm" in name else torch.randn_like(weights))
            else:
                weights.normal_(0, 1.5 / weights.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a tiny model (arguments as ``make_model``), each kind once: do not change it."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = json.dumps([family, options], sort_keys=True)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model") / "tiny", family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the f16 GGUF of ``tiny(family, **options)``, converted once per run."""
    from edgedistill.formats.gguf.convert import convert

    made: dict[str, Path] = {}

    def get(family: str = "llama", *, to: str = "f16", **options: Any) -> Path:
        key = json.dumps([family, to, options], sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
            made[key] = convert(tiny(family, **options), out, dtype=to).path
        return made[key]

    return get
