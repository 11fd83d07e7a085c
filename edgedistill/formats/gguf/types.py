"""Name llama.cpp's tensor and file types, say what each tensor of a model gets, and what the file will weigh.

The choice per tensor repeats llama.cpp's own (``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in
src/llama-quant.cpp, dense models), so that ``plan`` knows the size and the fallbacks before anything is converted.
No heavy imports: the CLI loads this module.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.errors import UsageError
from edgedistill.families import plain_config


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """One tensor type: ``block`` weights of a row are stored together in ``bytes`` bytes."""

    number: int
    block: int
    bytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.block


def _ggml(number: int, block: int, nbytes: int) -> GgmlType:
    return GgmlType(number=number, block=block, bytes=nbytes)


# ggml.h, enum ggml_type; sizes as in gguf.constants.GGML_QUANT_SIZES (a test compares them).
GGML_TYPES: dict[str, GgmlType] = {
    "F32": _ggml(0, 1, 4), "F16": _ggml(1, 1, 2), "Q4_0": _ggml(2, 32, 18), "Q4_1": _ggml(3, 32, 20),
    "Q5_0": _ggml(6, 32, 22), "Q5_1": _ggml(7, 32, 24), "Q8_0": _ggml(8, 32, 34), "Q8_1": _ggml(9, 32, 40),
    "Q2_K": _ggml(10, 256, 84), "Q3_K": _ggml(11, 256, 110), "Q4_K": _ggml(12, 256, 144), "Q5_K": _ggml(13, 256, 176),
    "Q6_K": _ggml(14, 256, 210), "Q8_K": _ggml(15, 256, 292), "IQ2_XXS": _ggml(16, 256, 66),
    "IQ2_XS": _ggml(17, 256, 74), "IQ3_XXS": _ggml(18, 256, 98), "IQ1_S": _ggml(19, 256, 50),
    "IQ4_NL": _ggml(20, 32, 18), "IQ3_S": _ggml(21, 256, 110),
    "IQ2_S": _ggml(22, 256, 82), "IQ4_XS": _ggml(23, 256, 136), "I8": _ggml(24, 1, 1), "I16": _ggml(25, 1, 2),
    "I32": _ggml(26, 1, 4), "I64": _ggml(27, 1, 8), "F64": _ggml(28, 1, 8), "IQ1_M": _ggml(29, 256, 56),
    "BF16": _ggml(30, 1, 2), "TQ1_0": _ggml(34, 256, 54), "TQ2_0": _ggml(35, 256, 66), "MXFP4": _ggml(39, 32, 17),
    "NVFP4": _ggml(40, 64, 36), "Q1_0": _ggml(41, 128, 18), "Q2_0": _ggml(42, 64, 18),
}  # fmt: skip
_FIRST_ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
# Types that ``rounding`` can choose the codes of: those of ``blocks.FORMATS``.
FINELY_ROUNDED = (*_FIRST_ROUNDED, "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
GGML_TYPES_BY_ID: dict[int, str] = {kind.number: name for name, kind in GGML_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class FileType:
    """One type of a whole file, as ``llama-quantize`` names it.

    ``base`` is the type that most matrices get; ``bpw`` the bits per weight of Llama 3.1 8B in it without an importance
    matrix unless required (tools/quantize/README.md of llama.cpp, which ``plan_tensors`` reproduces to the last digit);
    ``imatrix``: "no" (not read), "advised", or "required" (llama.cpp refuses to quantize without one, as long as the
    rows fit the type).
    """

    number: int
    base: str
    bpw: float
    imatrix: str = "advised"


def _file(number: int, base: str, bpw: float, imatrix: str = "advised") -> FileType:
    return FileType(number=number, base=base, bpw=bpw, imatrix=imatrix)


# llama.h, enum llama_ftype; names as in tools/quantize/quantize.cpp without its aliases and the types for experts.
FILE_TYPES: dict[str, FileType] = {
    "F32": _file(0, "F32", 32.0, "no"), "F16": _file(1, "F16", 16.0005, "no"), "BF16": _file(32, "BF16", 16.0005, "no"),
    "Q8_0": _file(7, "Q8_0", 8.5008, "no"), "Q6_K": _file(18, "Q6_K", 6.5633),
    "Q5_K_M": _file(17, "Q5_K", 5.7036), "Q5_K_S": _file(16, "Q5_K", 5.5704),
    "Q5_1": _file(9, "Q5_1", 6.0377), "Q5_0": _file(8, "Q5_0", 5.5704),
    "Q4_K_M": _file(15, "Q4_K", 4.8944), "Q4_K_S": _file(14, "Q4_K", 4.6672),
    "Q4_1": _file(3, "Q4_1", 5.1031), "Q4_0": _file(2, "Q4_0", 4.6358),
    "IQ4_NL": _file(25, "IQ4_NL", 4.6818), "IQ4_XS": _file(30, "IQ4_XS", 4.4597),
    "Q3_K_L": _file(13, "Q3_K", 4.2979), "Q3_K_M": _file(12, "Q3_K", 3.996), "Q3_K_S": _file(11, "Q3_K", 3.6429),
    "IQ3_M": _file(27, "IQ3_S", 3.7628), "IQ3_S": _file(26, "IQ3_S", 3.6606),
    "IQ3_XS": _file(22, "IQ3_S", 3.4977, "required"), "IQ3_XXS": _file(23, "IQ3_XXS", 3.2548, "required"),
    "Q2_K": _file(10, "Q2_K", 3.1593), "Q2_K_S": _file(21, "Q2_K", 2.9697, "required"),
    "IQ2_M": _file(29, "IQ2_S", 2.9294, "required"), "IQ2_S": _file(28, "IQ2_XS", 2.7403, "required"),
    "IQ2_XS": _file(20, "IQ2_XS", 2.5882, "required"), "IQ2_XXS": _file(19, "IQ2_XXS", 2.3824, "required"),
    "IQ1_M": _file(31, "IQ1_M", 2.146, "required"), "IQ1_S": _file(24, "IQ1_S", 2.0042, "required"),
    "TQ2_0": _file(37, "TQ2_0", 2.5173, "no"), "TQ1_0": _file(36, "TQ1_0", 2.1914, "no"),
    "Q2_0": _file(41, "Q2_0", 2.6803), "Q1_0": _file(40, "Q1_0", 1.4817),
}  # fmt: skip

# tensor_type_fallback: what a type of long blocks becomes where the columns of a matrix are no multiple of its block.
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
PALETTE = (
    "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16"
)  # fmt: skip
"""What a matrix may become where each has a type of its own: those of llama.cpp's types that suit dense models, of 2.6 bits and
more. Fewer leave little of a small model."""

NEEDS_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_UNWEIGHED = ("F32", "F16", "BF16", "Q8_0")
_LOW_BIT = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M")


def file_type(name: str) -> FileType:
    """Look up a file type by llama.cpp's name. Raises UsageError with did-you-mean for an unknown one."""
    if name in FILE_TYPES:
        return FILE_TYPES[name]
    aliases = {
        "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "INT4": "Q4_0", "INT8": "Q8_0", "FP16": "F16",
        "FP32": "F32",
    }  # fmt: skip
    upper = str(name).upper().replace("-", "_")
    close = aliases.get(upper) or (upper if upper in FILE_TYPES else "")
    close = close or next(iter(difflib.get_close_matches(upper, FILE_TYPES, n=1, cutoff=0.5)), "")
    raise UsageError(
        f"unknown GGUF type {name!r}" + (f": did you mean {close!r}?" if close else ""),
        "types: " + ", ".join(FILE_TYPES),
    )


def ggml_type(name: str) -> GgmlType:
    """Look up a tensor type by its name. Raises UsageError with did-you-mean for an unknown one."""
    if name in GGML_TYPES:
        return GGML_TYPES[name]
    close = next(iter(difflib.get_close_matches(str(name).upper(), GGML_TYPES, n=1, cutoff=0.5)), "")
    raise UsageError(
        f"unknown GGUF tensor type {name!r}" + (f": did you mean {close!r}?" if close else ""),
        "tensor types: " + ", ".join(GGML_TYPES),
    )


def rounded_in(type_name: str) -> tuple[str, ...]:
    """Return the tensor types that ``rounding`` chooses the codes of in a file of ``type_name``; none where its base is none.

    The file types that came first keep to each other: their mixes hold another type in few matrices (attn_v in Q5_K, where 4
    heads or more share a kv head), and files that were built before this knew more types stay the same, byte by byte.
    """
    base = file_type(type_name).base
    return _FIRST_ROUNDED if base in _FIRST_ROUNDED else FINELY_ROUNDED if base in FINELY_ROUNDED else ()


def reads_imatrix(type_name: str, *tensor_types: str | None) -> bool:
    """Tell whether llama.cpp weighs errors by an importance matrix in a file of ``type_name`` with matrices of ``tensor_types``.

    Q8_0 takes its scale from the largest weight of a block; ternary files have a head, and rows that fall back, of types that do.
    """
    return any(name not in _UNWEIGHED for name in (file_type(type_name).base, *tensor_types) if name is not None)


def fits(type_name: str, columns: int) -> str:
    """Return the type that a matrix of ``columns`` gets when ``type_name`` is asked for (the same where it fits).

    Raises UsageError where llama.cpp has no fallback (Q1_0).
    """
    if columns % GGML_TYPES[type_name].block == 0:
        return type_name
    if type_name not in _FALLBACK and GGML_TYPES[type_name].block > 32:
        raise UsageError(
            f"type {type_name} needs rows of a multiple of {GGML_TYPES[type_name].block} weights; this model has "
            f"rows of {columns}, and llama.cpp knows no fallback", "choose another type, such as Q4_0 or Q4_K_M",
        )  # fmt: skip
    other = _FALLBACK.get(type_name, type_name)
    return other if columns % GGML_TYPES[other].block == 0 else "F16"


def _must_fit(type_name: str, name: str, columns: int) -> str:
    # llama.cpp has no fallback for a type that was given by name: it fails an assertion.
    if columns % ggml_type(type_name).block == 0:
        return type_name
    raise UsageError(
        f"type {type_name} does not fit {name}: its rows of {columns} weights are no multiple of "
        f"{GGML_TYPES[type_name].block}",
        f"choose {fits(type_name, columns)}",
    )


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of one row of ``columns`` weights."""
    kind = GGML_TYPES[type_name]
    return columns // kind.block * kind.bytes


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What one tensor gets: ``asked`` by the file type's mix, ``got`` after the fallback for its columns; sizes in
    bytes.
    """

    name: str
    shape: tuple[int, ...]
    asked: str
    got: str
    nbytes: int
    asked_nbytes: float
    needs_imatrix: bool

    @property
    def fell_back(self) -> bool:
        return self.asked != self.got


def _order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1, name)


def allows_quantization(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether llama.cpp quantizes a tensor at all: matrices that are no norm and no positions and end in ``weight``."""
    if name == "position_embd.weight":
        return False
    return sum(size > 1 for size in shape) >= 2 and name.endswith("weight") and not name.endswith("_norm.weight")


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    type_name: str,
    *,
    gqa: int = 1,
    imatrix: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
) -> list[TensorPlan]:
    """Say which type each tensor gets, as llama.cpp chooses it.

    ``shapes`` maps GGUF tensor names to numpy shapes (rows first); ``gqa`` is heads per kv head; ``imatrix`` says
    whether one will be there (some mixes change with it). The result is in llama.cpp's order, layer by layer.
    """
    kind = file_type(type_name)
    layers = 1 + max((_order(name)[0] for name in shapes), default=-1)
    tied = "output.weight" not in shapes
    head = "token_embd.weight" if tied else "output.weight"
    n_attn_v = sum(1 for name in shapes if name.endswith(("attn_v.weight", "attn_qkv.weight")))
    seen = {"attn_v": 0, "ffn_down": 0, "ffn_gate": 0, "ffn_up": 0}
    plans: list[TensorPlan] = []
    for name in sorted(shapes, key=_order):
        shape = tuple(shapes[name])
        columns, rows = shape[-1], math.prod(shape[:-1])
        if not allows_quantization(name, shape):
            asked = got = "F32"
        elif (chosen := {"token_embd.weight": embedding_type, "output.weight": output_type}.get(name)) is not None:
            asked = got = _must_fit(chosen, name, columns)
        elif GGML_TYPES[kind.base].block == 1:
            asked = got = kind.base
        else:
            asked = kind.base
            if not pure:
                asked = _mix(name, kind.base, type_name, layers, n_attn_v, gqa, imatrix, head, output_type, seen)
            got = fits(asked, columns)
            if head == name and not pure and not output_type and columns % GGML_TYPES[kind.base].block:
                got = fits("Q8_0", columns)  # llama.cpp does not even try the type that the mix has for the head
        plans.append(
            TensorPlan(
                name=name, shape=shape, asked=asked, got=got, nbytes=rows * row_bytes(got, columns),
                asked_nbytes=rows * columns * GGML_TYPES[asked].bpw / 8,
                needs_imatrix=name not in ("token_embd.weight", "output.weight")
                and (got in NEEDS_IMATRIX or (got == "Q2_K" and type_name == "Q2_K_S")),
            )
        )  # fmt: skip
    return plans


def _mix(
    name: str, base: str, kind: str, layers: int, n_attn_v: int, gqa: int, imatrix: bool, head: str,
    output_type: str | None, seen: dict[str, int],
) -> str:  # fmt: skip
    """Repeat llama_tensor_get_type_impl (llama.cpp b0.5.0, dense models). ``seen`` counts tensors per role so far."""

    def more_bits(i: int, n: int) -> bool:
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    if name == head:
        if output_type:
            return output_type
        if kind in (*_LOW_BIT, "IQ3_XXS"):
            return "Q5_K"
        return base if base == "Q8_0" else "Q6_K"
    if name == "token_embd.weight":
        if kind in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if kind in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if kind in ("TQ1_0", "TQ2_0", "Q2_0") else base
    role = name.split(".")[-2].replace("attn_qkv", "attn_v")  # one matrix of all three has the rules of values
    i = seen.get(role, 0)
    if role in seen:
        seen[role] += 1
    if kind in _LOW_BIT:
        better = "IQ3_S" if kind in ("IQ2_S", "IQ2_M") else "Q2_K"
        if role == "attn_v":
            return "Q4_K" if gqa >= 4 else better
        if role == "ffn_down":
            return better if i < layers // 8 else base
        if role == "attn_output":
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(kind, base)
        return base
    if role == "attn_v":
        return _mix_attn_v(base, kind, i, n_attn_v, gqa, imatrix, layers, more_bits(i, n_attn_v))
    if role in ("attn_k", "attn_q"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(kind, base)
    if role == "ffn_down":
        first = i < layers // 8
        choices = {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first else base,
            "Q3_K_M": "Q5_K" if i < layers // 16 else "Q4_K",
            "IQ3_M": "Q4_K" if first else base,
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more_bits(i, layers) else base,
            "Q5_K_M": "Q6_K" if more_bits(i, layers) else base,
            "Q4_K_S": "Q5_K" if first else base,
        }
        if not imatrix:
            choices["IQ3_XXS"] = "Q4_K" if first else "Q3_K"
            choices["IQ4_NL"] = choices["IQ4_XS"] = "Q5_K" if first else base
        elif first:
            choices |= {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
        return choices.get(kind, base)
    if role == "attn_output":
        choices = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return choices.get(kind, base)
    if role in ("ffn_gate", "ffn_up") and kind == "IQ3_XS" and layers // 8 <= i < 7 * layers // 8:
        return "IQ3_XXS"
    return base


def _mix_attn_v(base: str, kind: str, i: int, n: int, gqa: int, imatrix: bool, layers: int, more: bool) -> str:
    if kind == "IQ3_XXS":
        choice = "Q4_K" if gqa >= 4 else "IQ3_XXS" if imatrix else "IQ3_S"
    elif gqa >= 4 and kind in ("Q2_K", "Q2_K_S", "IQ3_XS", "IQ3_S"):
        choice = "Q4_K"
    elif gqa >= 4 and kind in ("IQ4_NL", "IQ4_XS"):
        choice = "Q5_K"
    else:
        choice = {
            "Q2_K": "Q3_K",
            "IQ3_M": "Q4_K",
            "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more else base,
            "Q5_K_M": "Q6_K" if more else base,
            "Q4_K_S": "Q5_K" if i < 4 else base,
        }.get(kind, base)
    # llama.cpp gives its 70B shape (80 layers, 8 heads to a kv head) more bits here.
    return "Q5_K" if layers == 80 and gqa == 8 and choice in ("Q3_K", "Q4_K") else choice


def predict_type(type_name: str, tensor_name: str, columns: int) -> str:
    """Return the type that a tensor of ``columns`` gets when the file type's base type is used for it (no mix)."""
    kind = file_type(type_name)
    if not tensor_name.endswith("weight") or tensor_name.endswith("_norm.weight"):
        return "F32"
    return fits(kind.base, columns)


def tensor_shapes(config: Mapping[str, Any], layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return GGUF tensor names and shapes (rows first) of a decoder from its config.json, or from llama.cpp's name of the
    architecture in ``model_type`` (``layers`` overrides the depth). Families that are not told apart count as Llama.

    Raises UsageError naming the key that config.json lacks.
    """
    config = plain_config(config)
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        inner, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
        depth = int(config["num_hidden_layers"]) if layers is None else layers
    except KeyError as error:
        raise UsageError(f"config.json lacks {error.args[0]!r}: not a llama-family model") from None
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    kind = str(config.get("model_type", "")).removesuffix("_text")
    queries, keys = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["output.weight"] = (vocab, hidden)
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,), "attn_output.weight": (hidden, queries),
        "ffn_down.weight": (hidden, inner),
    }  # fmt: skip
    if kind in ("phi3", "gpt2"):
        parts["attn_qkv.weight"] = (queries + 2 * keys, hidden)
        parts["ffn_up.weight"] = ((2 if kind == "phi3" else 1) * inner, hidden)  # Phi-3's gate and up lie in one
    else:
        parts |= {
            "attn_q.weight": (queries, hidden), "attn_k.weight": (keys, hidden), "attn_v.weight": (keys, hidden),
            "ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden),
        }  # fmt: skip
    if config.get("attention_bias") or kind == "qwen2":
        parts |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if kind in ("qwen3", "gemma3"):
        parts |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if kind == "gemma3":
        parts |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if kind == "gpt2":
        parts |= {f"{part.removesuffix('weight')}bias": shape[:1] for part, shape in parts.items()}
        shapes |= {
            "output_norm.bias": (hidden,), "position_embd.weight": (int(config.get("max_position_embeddings", 0)), hidden)
        }  # fmt: skip
    return shapes | {f"blk.{layer}.{part}": shape for layer in range(depth) for part, shape in parts.items()}


def estimate_size(shapes: Mapping[str, tuple[int, ...]], type_name: str, **options: Any) -> int:
    """Return the bytes of the file with these tensors; ``options`` as ``plan_tensors`` takes them.

    Tensor data and its padding are exact for dense models; the header is approximated from the vocabulary: tokens,
    types and merges of a byte-level BPE take about 39 bytes an entry (SmolLM2 36.4, Llama 3 and Qwen2 42 or less).
    """
    data = sum(-(-plan.nbytes // 32) * 32 for plan in plan_tensors(shapes, type_name, **options))
    return data + _header_bytes(shapes)


def _header_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    vocab = shapes.get("token_embd.weight", (0,))[0]
    # Gemma's vocabulary is SentencePiece's: no merges, but a score.
    return (24 if "blk.0.post_ffw_norm.weight" in shapes else 39) * vocab + 64 * len(shapes) + 4096


def estimate_file_size(
    config: Mapping[str, Any], layers: int | None, type_name: str, *, imatrix: bool = False, **options: Any
) -> int:
    """Return the bytes that the GGUF of a llama-family ``config`` will have in ``type_name`` (within about 1 %).

    ``layers`` overrides the depth (a pruned student). The fallback for rows that are no multiple of 256 is in.
    """
    heads = int(config.get("num_attention_heads", 1))
    gqa = heads // int(config.get("num_key_value_heads") or heads)
    return estimate_size(tensor_shapes(config, layers), type_name, gqa=gqa, imatrix=imatrix, **options)


def smallest_type(config: Mapping[str, Any], layers: int | None = None, *, imatrix: bool = True) -> tuple[str, int]:
    """Return the file type that makes this model smallest, and its bytes: a limit below that cannot be met.

    Without an importance matrix the types that require one do not count. Types for ternary models (TQ, Q1_0, Q2_0)
    never count: on any other model they destroy it.
    """
    best = ("", 0)
    for name, kind in FILE_TYPES.items():
        if name in ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0") or (kind.imatrix == "required" and not imatrix):
            continue
        size = estimate_file_size(config, layers, name, imatrix=imatrix)
        if not best[0] or size < best[1]:
            best = (name, size)
    return best


def smallest_choice(config: Mapping[str, Any], layers: int | None = None) -> int:
    """Return the bytes that this model has where every matrix takes the smallest type of ``PALETTE`` that its rows fit."""
    data = 0
    for name, shape in tensor_shapes(config, layers).items():
        types = PALETTE if allows_quantization(name, shape) else ("F32",)
        data += math.prod(shape[:-1]) * min(
            row_bytes(type_name, shape[-1]) for type_name in types if shape[-1] % GGML_TYPES[type_name].block == 0
        )
    return data + _header_bytes(tensor_shapes(config, layers))
