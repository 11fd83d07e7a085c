"""Convert a Hugging Face folder (safetensors) to GGUF: our own converter for a closed list of families.

Families are closed because each has traps of its own (``architectures`` says which); everything else is refused by name. After
writing, llama.cpp reads the file back and its token ids must equal the tokenizer's on a set of hard texts.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.cpus import usable_cpus
from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.architectures import Family, check_settings, family_of, rope_of, rope_tables, write_config
from edgedistill.formats.gguf.checkpoint import Entry, open_checkpoint, read_config, read_entry, require_keys
from edgedistill.formats.gguf.types import FILE_TYPES, GGML_TYPES, tensor_shapes
from edgedistill.formats.gguf.vocabulary import load_tokenizer, read_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]


_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_PHI3_TOKENS = ("</s>", "<s>", "<unk>", "<|endoftext|>")  # llama-vocab.cpp changes their attributes by the model's name
# Hard texts for every tokenizer: digits, contractions, white space of all kinds, scripts, emoji, code, markup.
PROBES = (
    "Set an alarm for 7:45 and call 555-0199 on 12/03/2025.", "I'm sure it's Bob's, they'll've DON'T WE'RE",
    "  two  spaces,\ttabs\t\tand\n\n\nlines \r\n end   ", " ", "\n\n", "naïve café, Straße, Ελλάδα, Привет мир, שלום",
    "日本語のテキスト、中文\uff0c한국어 1234567890", "🙂🙃 👩‍👩‍👧 ½ ² ٣٤ \u00a0 \u2028 \u3000 x",
    "def f(x):\n    return x**2  # 100%\n",
    '{"name": "set_timer", "arguments": {"minutes": 10, "label": "tea"}}',
    "<html>&amp;</html> a/b\\c ~!@#$%^&*()_+[]|;:,.?", "e\u0301 vs \u00e9; \ufb01; A\u030a",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was written: sizes in bytes, ``tokens`` as llama.cpp and the tokenizer agreed on them, ``echo`` of the
    config.
    """

    path: Path
    architecture: str
    dtype: str
    size: int
    sha256: str
    tensors: int
    parameters: int
    probe_tokens: int
    echo: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}


def convert(
    model_dir: Path | str, out: Path | str, *, dtype: str = "f16", name: str = "", license: str = "",
    threads: int | None = None, progress: Progress | None = None,
) -> ConvertReport:  # fmt: skip
    """Convert the model in ``model_dir`` to the GGUF file ``out`` (written under a temporary name, then renamed).

    Matrices are stored as ``dtype`` (f32, f16 or bf16), vectors as f32. As many tensors are in memory as ``threads``. Raises
    UsageError for what cannot be converted (see ``family_of``, ``checkpoint`` and ``vocabulary``), and for weights that
    overflow f16; StepFailed when llama.cpp then tokenizes otherwise than tokenizer.json.
    """
    import gguf

    started = time.monotonic()
    model_dir, out = Path(model_dir), Path(out)
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}", "use f16")
    config = read_config(model_dir)
    family = family_of(config, f"{model_dir}/config.json")
    require_keys(config, model_dir / "config.json")
    check_settings(config, family, f"{model_dir}/config.json")
    notes: list[str] = []
    plan = _plan(model_dir, config, family, _open(model_dir, family), dtype)
    vocabulary = read_vocabulary(
        model_dir, int(config["vocab_size"]), _first(config, "bos_token_id"), _first(config, "eos_token_id")
    )
    if vocabulary.normalizer:
        notes.append(
            f"the tokenizer normalizes text to {vocabulary.normalizer}, llama.cpp does not: normalize prompts before"
        )
    title = name or model_dir.resolve().name
    if any(part in title.lower() for part in ("phi-3", "phi3")) and not set(_PHI3_TOKENS) <= set(vocabulary.tokens):
        raise UsageError(
            f"{model_dir}: by the name {title!r} llama.cpp expects Phi-3's own tokens ({', '.join(_PHI3_TOKENS)}), and the "
            "tokenizer has others",
            "give the model a name without phi-3 or phi3",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, family.arch)
    try:
        writer.add_type("model")
        writer.add_name(title)
        if license:
            writer.add_license(license)
        write_config(writer, config, family, model_dir, notes)
        writer.add_file_type(FILE_TYPES[_DTYPES[dtype]].number)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        special = write_vocabulary(writer, vocabulary)
        tables = rope_tables(config)
        for target, factors in tables.items():
            writer.add_tensor_info(target, factors.shape, factors.dtype, factors.nbytes)
        for target, (entry, type_name) in plan.items():
            kind = GGML_TYPES[type_name]
            nbytes = math.prod(entry.shape) * kind.bytes
            shape = family.shape(target, entry.shape)
            writer.add_tensor_info(
                target, shape, _numpy_type(type_name), nbytes, raw_dtype=gguf.GGMLQuantizationType[type_name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for factors in tables.values():
            writer.write_tensor_data(factors)
        for done, (target, tensor) in enumerate(zip(plan, _tensors(plan, config, family, threads), strict=True), 1):
            writer.write_tensor_data(tensor)
            if progress:
                progress(done, len(plan), target)
        writer.close()
        probe_tokens = check_probes(model_dir, partial)
        partial.replace(out)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be written: {error.strerror or error}", "free some disk space, or choose another place"
        ) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return ConvertReport(
        path=out, architecture=family.arch, dtype=dtype, size=out.stat().st_size, sha256=file_digest(out),
        tensors=len(plan) + len(tables), parameters=sum(math.prod(entry.shape) for entry, _ in plan.values()),
        probe_tokens=probe_tokens, echo={**_echo(config), **special}, notes=tuple(notes),
        seconds=time.monotonic() - started,
    )  # fmt: skip


def places(model_dir: Path) -> dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Return, for each of the checkpoint's tensors, its name in the GGUF and what puts values of its rows into the GGUF's order.

    Raises UsageError as ``convert``.
    """
    config = read_config(model_dir)
    family = family_of(config, f"{model_dir}/config.json")
    entries = _open(model_dir, family)
    found: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {}
    names = {id(entry): name for name, entry in entries.items()}
    for target, (entry, _) in _plan(model_dir, config, family, entries, "f16").items():
        order = functools.partial(permute, heads=_heads(target, config)) if family.is_turned(target) else _as_it_is
        found[names[id(entry)]] = target, order
    return found


def _heads(target: str, config: dict[str, Any]) -> int:
    """Return the heads of a query or key matrix."""
    heads = int(config["num_attention_heads"])
    return heads if ".attn_q." in target else int(config.get("num_key_value_heads") or heads)


def _as_it_is(values: np.ndarray) -> np.ndarray:
    return values


def check_probes(model_dir: Path, gguf_path: Path, texts: tuple[str, ...] = PROBES) -> int:
    """Compare llama.cpp's token ids with tokenizer.json's on ``texts``; returns how many tokens agreed, else
    StepFailed.
    """
    from edgedistill.formats.gguf.model_io import open_model

    tokenizer = load_tokenizer(model_dir)
    model = open_model(gguf_path, vocab_only=True)
    total = 0
    try:
        for text in texts:
            if tokenizer.normalizer is not None:
                text = tokenizer.normalizer.normalize_str(text)  # llama.cpp does not; ``convert`` notes that
            for special in (False, True):
                want = tokenizer.encode(text, add_special_tokens=special).ids
                got = model.tokenize(text.encode(), add_bos=special, special=True)
                if want != got:
                    at = next(
                        (i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]),
                        min(len(want), len(got)),
                    )
                    raise StepFailed(
                        f"llama.cpp tokenizes {text[:60]!r} otherwise than {model_dir}/tokenizer.json: token {at} is "
                        f"{got[at : at + 3]} instead of {want[at : at + 3]}",
                        "this tokenizer cannot be converted faithfully; choose another model",
                    )
                total += len(want)
    finally:
        model.close()
    return total


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(model_dir: Path, family: Family) -> dict[str, Entry]:
    """Index the checkpoint under the names that transformers has, without what it computes itself."""
    skipped = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # GPT-2's causal mask
    return {
        name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name: entry
        for name, entry in open_checkpoint(model_dir).items()
        if not name.endswith(skipped)
    }


def _plan(
    model_dir: Path, config: dict[str, Any], family: Family, entries: dict[str, Entry], dtype: str
) -> dict[str, tuple[Entry, str]]:
    """Map GGUF tensor names to (where, type), in the order of the layers. Raises UsageError when a tensor has no
    place.
    """
    import gguf

    layers = int(config["num_hidden_layers"])
    arch = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == family.arch)
    names = gguf.get_tensor_name_map(arch, layers)
    tied = bool(config.get("tie_word_embeddings", False))
    wanted = tensor_shapes(config)
    plan: dict[str, tuple[Entry, str]] = {}
    for name in sorted(entries, key=_layer_order):
        if tied and name == "lm_head.weight":
            continue  # llama.cpp reads the embedding for it
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or (family.whole and target not in wanted):
            raise UsageError(f"{model_dir}: tensor {name!r} has no place in a {family.arch} GGUF of {layers} layers")
        entry = entries[name]
        matrix = len(entry.shape) > 1 and not target.startswith("position_embd.")  # positions stay float32, as upstream
        plan[target] = (entry, _DTYPES[dtype] if matrix else "F32")
    if missing := sorted(set(wanted) - set(plan)):
        raise UsageError(f"{model_dir}: the checkpoint lacks {len(missing)} tensors, {missing[0]} among them")
    rows = plan["token_embd.weight"][0].shape[0]
    if rows != int(config["vocab_size"]):
        raise UsageError(
            f"{model_dir}/config.json: vocab_size is {config['vocab_size']}, the embedding has {rows} rows"
        )
    for target, shape in wanted.items():
        found = family.shape(target, plan[target][0].shape)
        if found != shape:
            raise UsageError(f"{model_dir}: {target} has shape {found}, where config.json makes it {shape}")
    return plan


def _layer_order(name: str) -> tuple[int, str]:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1, name)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q/k rows from transformers' halves to llama.cpp's pairs (RoPE rotates neighbours there)."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _tensor(target: str, entry: Entry, type_name: str, config: dict[str, Any], family: Family) -> np.ndarray:
    import gguf
    import numpy as np

    weights = read_entry(entry)
    if family.is_turned(target):
        weights = permute(weights, _heads(target, config))
    if family.transposed and target.startswith("blk."):
        weights = weights.T
    if family.gain and target.endswith("norm.weight"):
        weights = weights.astype(np.float32) + np.float32(family.gain)
    if type_name == "F16":
        with np.errstate(over="ignore"):
            stored = weights.astype(np.float16)
        if not np.isfinite(stored).all():
            why = "weights over 65504" if np.isfinite(weights).all() else "NaN or infinite weights"
            raise UsageError(
                f"{entry.file}: {target} has {why}", 'use dtype "bf16"' if "65504" in why else "train it again"
            )
        return np.ascontiguousarray(stored)
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if not np.isfinite(weights).all():
        raise UsageError(f"{entry.file}: {target} has NaN or infinite weights", "train it again")
    if type_name == "BF16":
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType.BF16)
    return weights


def _tensors(
    plan: dict[str, tuple[Entry, str]], config: dict[str, Any], family: Family, threads: int | None
) -> Iterator[np.ndarray]:
    """Yield the tensors in the plan's order; no more than ``threads`` of them are under way or waiting."""
    threads = threads or usable_cpus()
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[np.ndarray]] = collections.deque()
        for target, (entry, type_name) in plan.items():
            if len(waiting) == threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_tensor, target, entry, type_name, config, family))
        while waiting:
            yield waiting.popleft().result()


def _numpy_type(type_name: str) -> Any:
    import numpy as np

    # BF16 goes in as raw shape with an explicit type, so the numpy type only has to be no uint8.
    return np.dtype(np.float32 if type_name == "F32" else np.float16)


def _first(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return int(value) if isinstance(value, int) else None


def _echo(config: dict[str, Any]) -> dict[str, Any]:
    rope = rope_of(config)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id")  # fmt: skip
    return {**{key: config[key] for key in keys if key in config}, "rope": rope}
