"""Turn a tokenizer.json into what a GGUF stores of it: tokens, their kinds, merges, splitter, special tokens,
template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.pretokenizers import SPLITTERS, find_pre
from edgedistill.model_facts import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A vocabulary: ``pre`` is llama.cpp's name of the splitter, ``kinds`` are gguf.TokenType numbers. One of SentencePiece has
    ``scores``, the larger the earlier a token is merged, and no splitter.
    """

    folder: Path
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    pre: str
    normalizer: str
    add_bos: bool
    add_eos: bool
    add_prefix_space: bool
    scores: tuple[float, ...] = ()


def load_tokenizer(folder: Path) -> Any:
    """Load tokenizer.json exactly as it stands, as a ``tokenizers.Tokenizer``.

    Not through AutoTokenizer: transformers 5 rebuilds the pre-tokenizer of named classes from its own defaults (a
    SmolLM2 folder with tokenizer_class GPT2Tokenizer loses its digit splitting there).
    Raises UsageError when the folder has none or it does not parse.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"{folder}: no tokenizer.json",
            f'python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UsageError(f"{path}: not a usable tokenizer: {error}") from None


def read_vocabulary(folder: Path, size: int, bos: int | None, eos: int | None) -> Vocabulary:
    """Read the vocabulary of ``folder``, padded with unused tokens to ``size`` (the rows of the embedding).

    Raises UsageError when the tokenizer is neither byte-level BPE nor SentencePiece's BPE, has a splitter that llama.cpp lacks,
    or is larger than the embedding.
    """
    data = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    tokenizer = load_tokenizer(folder)
    model = data.get("model", {})
    if model.get("type") != "BPE":
        raise UsageError(
            f"{folder}/tokenizer.json: a {model.get('type')} tokenizer; only BPE is converted: byte-level (GPT-2, Llama 3, Qwen2, "
            "SmolLM2) or SentencePiece's with byte fallback (Llama 2, Mistral, Gemma)",
            "choose a model with such a tokenizer",
        )
    pieces = bool(model.get("byte_fallback"))
    prefix = _prefix_space(data, folder) if pieces else None
    pre = "default" if pieces else find_pre(data)
    if pre is None:
        raise UsageError(
            f"{folder}/tokenizer.json: llama.cpp would split text otherwise than this pre-tokenizer does; known ones: "
            + ", ".join(SPLITTERS),
            "choose a model with one of these tokenizers",
        )
    added = {int(item["id"]): item for item in data.get("added_tokens", [])}
    vocab = {int(number): token for token, number in model["vocab"].items()}
    vocab |= {number: str(item["content"]) for number, item in added.items()}
    if pieces and (lost := 256 - sum(bool(_BYTE.fullmatch(token)) for token in vocab.values())):
        raise UsageError(
            f"{folder}/tokenizer.json: {lost} of the 256 byte tokens (<0x00> to <0xFF>) are missing: llama.cpp needs all"
        )
    if max(vocab) >= size:
        raise UsageError(f"{folder}: the tokenizer has ids up to {max(vocab)}, but the embedding only {size} rows")
    tokens, kinds = [], []
    for number in range(size):
        if number not in vocab:
            tokens.append(f"[PAD{number}]")
            kinds.append(UNUSED)
            continue
        tokens.append(vocab[number])
        if pieces and tokens[-1] == model.get("unk_token"):
            kinds.append(UNKNOWN)
        elif pieces and _BYTE.fullmatch(tokens[-1]):
            kinds.append(BYTE)
        elif number not in added:
            kinds.append(NORMAL)
        else:
            kinds.append(CONTROL if added[number].get("special") else USER_DEFINED)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return Vocabulary(
        folder=folder, tokens=tuple(tokens), kinds=tuple(kinds), pre=pre, normalizer="" if pieces else SPLITTERS[pre].normalizer,
        # What the tokenizer does, not what a flag says: llama.cpp adds a BOS of its own where the key is missing.
        add_bos=bos is not None and full[:1] == [bos] and plain[:1] != [bos],
        add_eos=eos is not None and full[-1:] == [eos] and plain[-1:] != [eos],
        add_prefix_space=bool(config.get("add_prefix_space", False)) if prefix is None else prefix,
        scores=_scores(tokens, model.get("merges", [])) if pieces else (),
    )  # fmt: skip


def _prefix_space(data: dict[str, Any], folder: Path) -> bool:
    """Tell whether a SentencePiece tokenizer puts a space before the text, as llama.cpp would: after every special token, too.

    Raises UsageError where it does otherwise.
    """
    steps = data.get("normalizer") or {}
    steps = list(steps.get("normalizers", [])) if steps.get("type") == "Sequence" else [steps] if steps else []
    plain = [(step.get("type"), step.get("prepend") or step.get("content")) for step in steps]
    before = data.get("pre_tokenizer") or {}
    # Gemma splits at spaces after they were replaced: at none.
    idle = not before or (before.get("type") == "Split" and before.get("pattern") == {"String": " "})
    if idle and plain in ([("Replace", _SPACE)], [("Prepend", _SPACE), ("Replace", _SPACE)]):
        return len(plain) == 2
    meta = (
        before.get("type") == "Metaspace"
        and before.get("replacement", _SPACE) == _SPACE
        and not before.get("split", True)
    )
    if not plain and meta and before.get("prepend_scheme") == "never":
        return False
    raise UsageError(
        f"{folder}/tokenizer.json: llama.cpp puts spaces otherwise than this SentencePiece tokenizer does "
        f"(normalizer {[kind for kind, _ in plain] or 'none'}, pre-tokenizer {before.get('type', 'none')} "
        f"{before.get('prepend_scheme', '')})",
        "choose a model whose tokenizer.json prepends and replaces spaces in its normalizer, as Llama 2's and Gemma's",
    )


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> tuple[float, ...]:
    """Return a score for each token: minus the place of the first merge that makes it, so that llama.cpp merges in that order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> dict[str, Any]:
    """Add tokens, merges, special tokens and chat template to ``writer``; returns what was written of the special
    ones.
    """
    from gguf import SpecialVocab

    special = SpecialVocab(vocabulary.folder, load_merges=not vocabulary.scores, n_vocab=len(vocabulary.tokens))
    special.add_special_token = {"bos": vocabulary.add_bos, "eos": vocabulary.add_eos}
    writer.add_add_space_prefix(vocabulary.add_prefix_space)
    writer.add_tokenizer_model("llama" if vocabulary.scores else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.kinds))
    special.add_to_gguf(writer, quiet=True)
    return {
        "pre": vocabulary.pre, "add_bos": vocabulary.add_bos, "add_eos": vocabulary.add_eos,
        "special_ids": dict(special.special_token_ids), "chat_template": bool(special.chat_template),
    }  # fmt: skip
