"""What ``plan`` must know of a model that is here: architecture, shape, tokenizer, licence, read from its files without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgedistill.errors import UsageError
from edgedistill.families import plain_config
from edgedistill.fingerprint import digest

Task = Literal["text", "classification", "embedding"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What ``plan`` must know of a model. ``quantized_from`` is the GGUF type its weights came from, or "" if none."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    context: int
    tokenizer: str
    quantized_from: str
    licence: str
    size: int
    head_dim: int = 0  # 0: hidden / heads
    template: bool | None = None  # whether it has a chat template; None: not known

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim or self.hidden // self.heads

    def block_params(self) -> int:
        """Parameters of one transformer block (llama family: attention with grouped keys, gated FFN, two norms)."""
        attention = 2 * self.hidden * self.head * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    def params(self) -> int:
        """Parameters in total."""
        heads = 1 if self.tied else 2
        return heads * self.embedding_params + self.layers * self.block_params() + self.hidden

    def config(self) -> dict[str, Any]:
        """Return the config.json keys that size estimates and adapter checks read."""
        return {
            "model_type": self.architecture,
            "max_position_embeddings": self.context,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
        }


ENCODERS = frozenset(
    ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "t5",
     "t5encoder", "gemma-embedding", "llama-embed", "clip", "wavtokenizer-dec")
)  # fmt: skip
"""Architectures, by their names in GGUF files, that write no text from left to right: llama.cpp gives no logits of theirs."""
AGAIN = "download it again, or save the model anew: model.save_pretrained(DIR)"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError with the file and position when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", "point to a Hugging Face model folder") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})", f"ls -l {path}") from None
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8
        raise UsageError(f"{path}: not valid JSON: {error}", AGAIN) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object was expected", AGAIN)
    return value


def model_files(path: Path) -> list[Path]:
    """Return the files of a model that are its content: one GGUF, or what transformers loads from a folder.

    Raises UsageError for a folder whose weights are pickles.
    """
    if path.is_file():
        return [path]
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
        if pickles:
            raise UsageError(
                f"{path / pickles[0]}: a pickle checkpoint can run code when it is loaded and is refused",
                "save it again with model.save_pretrained(DIR, safe_serialization=True) where you trust it",
            )
        raise UsageError(f"{path}: no *.safetensors in this folder", "give the folder that save_pretrained wrote")
    names = ("*.json", "*.jinja", "tokenizer.model")
    return sorted({*weights, *(p for pattern in names for p in path.glob(pattern))})


def gguf_facts(path: Path) -> ModelFacts:
    """Read the facts of a GGUF from its metadata; a file cut short is refused here, and what does not write text."""
    from edgedistill.formats.gguf.read import read_info

    info = read_info(path)
    if info.architecture in ENCODERS:
        raise UsageError(
            f"{path}: {info.architecture} does not generate text",
            "give a decoder (llama, qwen3, gemma3, …): encoders are neither quantized nor distilled here",
        )
    tokens = info.metadata.get("tokenizer.ggml.tokens", [])

    def number(key: str, default: int) -> int:
        value = info.of_arch(key, default)
        return int(max(value, default=default) if isinstance(value, list) else value)  # a list: layers that differ

    heads = number("attention.head_count", 1)
    licence = path.with_suffix(".licence")
    return ModelFacts(
        architecture=info.architecture,
        layers=info.n_layers,
        hidden=info.hidden,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        ffn=number("feed_forward_length", 0),
        vocab=len(tokens),
        tied=all(tensor.name != "output.weight" for tensor in info.tensors),
        context=info.context_length,
        tokenizer=digest([tokens, info.metadata.get("tokenizer.ggml.merges", [])]),
        quantized_from=info.file_type if info.is_quantized else "",
        licence=info.license or (licence.read_text() if licence.is_file() else "") or "not stated",
        size=path.stat().st_size,
        head_dim=number("attention.key_length", 0),
        template=bool(info.chat_template),
    )


def labels_of(path: Path) -> list[str]:
    """Return the labels of a sequence classifier, in their order; transformers leaves out of config.json that there are two."""
    config = path / "config.json"
    named = read_json(config).get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        return [str(name) for _, name in sorted(named.items(), key=lambda pair: int(pair[0]))]
    except (AttributeError, ValueError):
        raise UsageError(f"{config}: id2label is {named!r}; names by number were expected", AGAIN) from None


def folder_facts(path: Path, task: Task = "text") -> ModelFacts:
    """Read the facts of an HF folder from its config.json and tokenizer.json; refuses what does another task: an encoder where text
    is to be written, a language model where a sequence classifier scores.
    """
    config = plain_config(read_json(path / "config.json"))
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UsageError(
            f"{path / 'config.json'}: architectures is {architectures!r}; a list of names was expected", AGAIN
        )
    if task == "classification" and not any("ForSequenceClassification" in name for name in architectures):
        raise UsageError(
            f"{path / 'config.json'}: {', '.join(architectures) or 'no architecture'} is no sequence classifier",
            "give a reward model or a classifier (…ForSequenceClassification)",
        )
    if task == "text" and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise UsageError(
            f"{path / 'config.json'}: {', '.join(architectures) or 'no architecture'} does not generate text",
            "give a decoder (…ForCausalLM): encoders cannot be distilled here",
        )
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise UsageError(
            f"{path}: no tokenizer.json", "save the fast tokenizer beside the model: tokenizer.save_pretrained(DIR)"
        )
    tokens, merges = _tokens(tokenizer)

    def number(key: str, default: int, least: int = 0) -> int:
        value = default if config.get(key) is None else config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise UsageError(f"{path / 'config.json'}: {key} is {value!r}; a number was expected", AGAIN)
        return int(value)

    heads = number("num_attention_heads", 1, least=1)
    card, settings = path / "README.md", path / "tokenizer_config.json"
    licences = [
        line.split(":", 1)[1].strip()
        for line in (card.read_text(errors="replace").splitlines()[:40] if card.is_file() else [])
        if line.startswith("license:")
    ]
    return ModelFacts(
        architecture=str(config.get("model_type", "")),
        layers=number("num_hidden_layers", 0),
        hidden=number("hidden_size", 0),
        heads=heads,
        kv_heads=number("num_key_value_heads", 0) or heads,
        ffn=number("intermediate_size", 0),
        vocab=number("vocab_size", len(tokens)),
        tied=bool(config.get("tie_word_embeddings", False)),
        context=number("max_position_embeddings", 0),
        tokenizer=digest([tokens, merges]),
        quantized_from="",
        licence=licences[0] if licences else "not stated",
        size=sum(f.stat().st_size for f in model_files(path)),
        head_dim=number("head_dim", 0),
        template=(path / "chat_template.jinja").is_file()
        or (settings.is_file() and bool(read_json(settings).get("chat_template"))),
    )


def _tokens(path: Path) -> tuple[list[str], list[str]]:
    """Return the tokens of a tokenizer.json in the order of their ids, and its merges. Raises UsageError."""
    raw = read_json(path)
    try:
        model = raw.get("model", {})
        tokens = {**(model.get("vocab") if isinstance(model.get("vocab"), dict) else {})}
        tokens.update({token["content"]: token["id"] for token in raw.get("added_tokens", [])})
        merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges", [])]
        return [token for token, _ in sorted(tokens.items(), key=lambda pair: pair[1])], merges
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not as tokenizers writes it ({type(error).__name__}: {error})",
            "save the fast tokenizer beside the model: tokenizer.save_pretrained(DIR)",
        ) from None
