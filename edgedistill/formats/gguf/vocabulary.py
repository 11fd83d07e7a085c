"""Turn a tokenizer.json into what a GGUF stores of it: tokens, their kinds, merges, splitter, special tokens,
template.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.checkpoint import read_json
from edgedistill.formats.gguf.pretokenizers import SPLITTERS, find_pre

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE vocabulary: ``pre`` is llama.cpp's name of the splitter, ``kinds`` are gguf.TokenType
    numbers.
    """

    folder: Path
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    pre: str
    normalizer: str
    add_bos: bool
    add_eos: bool
    add_prefix_space: bool


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

    Raises UsageError when the tokenizer is not byte-level BPE, has a splitter that llama.cpp lacks, or is larger than
    the embedding.
    """
    data = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    tokenizer = load_tokenizer(folder)
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE with byte fallback" if model.get("byte_fallback") else str(model.get("type"))
        raise UsageError(
            f"{folder}/tokenizer.json: a {kind} tokenizer; only byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) "
            "is converted",
            "choose a model with a byte-level BPE tokenizer",
        )
    pre = find_pre(data)
    if pre is None:
        raise UsageError(
            f"{folder}/tokenizer.json: llama.cpp would split text otherwise than this pre-tokenizer does; known ones: "
            + ", ".join(SPLITTERS),
            "choose a model with one of these tokenizers",
        )
    added = {int(item["id"]): item for item in data.get("added_tokens", [])}
    vocab = {int(number): token for token, number in model["vocab"].items()}
    vocab |= {number: str(item["content"]) for number, item in added.items()}
    if max(vocab) >= size:
        raise UsageError(f"{folder}: the tokenizer has ids up to {max(vocab)}, but the embedding only {size} rows")
    tokens, kinds = [], []
    for number in range(size):
        if number not in vocab:
            tokens.append(f"[PAD{number}]")
            kinds.append(UNUSED)
            continue
        tokens.append(vocab[number])
        if number not in added:
            kinds.append(NORMAL)
        else:
            kinds.append(CONTROL if added[number].get("special") else USER_DEFINED)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return Vocabulary(
        folder=folder, tokens=tuple(tokens), kinds=tuple(kinds), pre=pre, normalizer=SPLITTERS[pre].normalizer,
        # What the tokenizer does, not what a flag says: llama.cpp adds a BOS of its own where the key is missing.
        add_bos=bos is not None and full[:1] == [bos] and plain[:1] != [bos],
        add_eos=eos is not None and full[-1:] == [eos] and plain[-1:] != [eos],
        add_prefix_space=bool(config.get("add_prefix_space", False)),
    )  # fmt: skip


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> dict[str, Any]:
    """Add tokens, merges, special tokens and chat template to ``writer``; returns what was written of the special
    ones.
    """
    from gguf import SpecialVocab

    special = SpecialVocab(vocabulary.folder, load_merges=True, n_vocab=len(vocabulary.tokens))
    special.add_special_token = {"bos": vocabulary.add_bos, "eos": vocabulary.add_eos}
    writer.add_add_space_prefix(vocabulary.add_prefix_space)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    special.add_to_gguf(writer, quiet=True)
    return {
        "pre": vocabulary.pre, "add_bos": vocabulary.add_bos, "add_eos": vocabulary.add_eos,
        "special_ids": dict(special.special_token_ids), "chat_template": bool(special.chat_template),
    }  # fmt: skip
