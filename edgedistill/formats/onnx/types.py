"""Name what a matrix of an ONNX model may become, and count its bytes. No heavy imports: ``plan`` loads this module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import UsageError
from edgedistill.families import plain_config

BLOCKS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How MatMulNBits stores a matrix: codes of ``bits``, ``block`` of a row under one float32 scale, which have a zero point of
    their own where ``zeros`` (else their middle is 0).
    """

    bits: int
    block: int
    zeros: bool = False

    @property
    def name(self) -> str:
        """Return ``int4/32``, or ``uint4/32`` with zero points, as the builder tells the two apart."""
        return f"{'u' * self.zeros}int{self.bits}/{self.block}"

    def blocks(self, columns: int) -> int:
        """Return the blocks of a row; the last one is padded."""
        return -(-columns // self.block)

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes, scales and zero points."""
        count = self.blocks(columns)
        zeros = math.ceil(count * self.bits / 8) if self.zeros else 0
        return rows * (count * (self.block * self.bits // 8 + 4) + zeros)


def _kinds(*kinds: Kind) -> dict[str, Kind]:
    return {kind.name: kind for kind in kinds}


KINDS = _kinds(
    *(Kind(bits=4, block=block, zeros=zeros) for block in BLOCKS for zeros in (False, True)),
    *(Kind(bits=8, block=block) for block in BLOCKS),
)
"""What "auto" chooses from: of 8 bits, zero points bring nothing that shows."""


def kinds_for(columns: int, *, looked_up: bool) -> dict[str, Kind]:
    """Return the kinds that a matrix may take. What is looked up as well has rows of the width that the builder gave them, in
    blocks of 32.
    """
    width = Kind(bits=4, block=32).blocks(columns) * 32
    return {name: kind for name, kind in KINDS.items() if not looked_up or width % kind.block == 0}


def refuse_blocks(config: Mapping[str, Any], block: int) -> None:
    """Raise UsageError where a matrix of a decoder has an odd number of blocks in a row: onnxruntime's k_quant, which type "mixed"
    asks for, packs two zero points in a byte and fails there (onnxruntime 1.32, ``make_matmul_weight_only_node``).
    """
    config = plain_config(config)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    for what, width in (("hidden size", hidden), ("heads", heads * head), ("FFN", int(config["intermediate_size"]))):
        if -(-width // block) % 2:
            raise UsageError(
                f'the builder\'s "mixed" needs an even number of blocks in each row, and the {what} of {width} has '
                f"{-(-width // block)} blocks of {block}",
                'take another block, or type = "auto", which mixes types itself',
            )


def smallest(config: Mapping[str, Any]) -> int:
    """Return about the bytes of the model's files with every matrix in the smallest kind: weights, embedding, tokenizer.

    An embedding that is not the head stays in float32, as the builder writes it.
    """
    from edgedistill.formats.gguf.types import tensor_shapes

    config = plain_config(config)
    total = 0
    for name, shape in tensor_shapes(config).items():
        if len(shape) < 2:
            total += 4 * math.prod(shape)
        elif name == "token_embd.weight" and not config.get("tie_word_embeddings", False):
            total += 4 * shape[0] * shape[1]
        else:
            kinds = kinds_for(shape[1], looked_up=name == "token_embd.weight")
            total += min(kind.nbytes(*shape) for kind in kinds.values())
    return total
