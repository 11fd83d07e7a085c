"""A small tokenizer as transformers makes it of a SentencePiece model: BPE with byte fallback and every merge of its pieces."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

SPACE = "\u2581"
TEXT = "set an alarm for the next song in the queue and turn the volume down to thirty percent then call me at seven please"


def make_pieces(folder: Path, *, prefix: bool, size: int = 500) -> None:
    """Write tokenizer.json and its config: pieces by how often they are in a text, merges of all their splits in that order."""
    words = [SPACE + word for word in TEXT.split()]
    counts = Counter(word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<tool>": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    pieces = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    pieces = [SPACE * 2, *pieces, SPACE * 4][: size - 4 - 256 - 40]
    letters = sorted({letter for word in words for letter in word} | set("SIT.,:'é"))
    ranks = {piece: rank for rank, piece in enumerate(pieces)} | dict.fromkeys(letters, -1)
    for piece in [*pieces, *letters]:
        vocab[piece] = len(vocab)
    merges = [
        [piece[:at], piece[at:]]
        for piece in pieces for at in range(1, len(piece)) if piece[:at] in ranks and piece[at:] in ranks
    ]  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    rest = {"Sequence": {"id": "A", "type_id": 0}}
    added = [(token, vocab[token], token != "<tool>") for token in ("<unk>", "<s>", "</s>", "<tool>")]
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": special} for token, number, special in added
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if prefix else replace,
        "pre_tokenizer": None if prefix else
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, rest],
            "pair": [first, rest, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
