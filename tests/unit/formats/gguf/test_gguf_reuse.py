"""The file is llama.cpp's own, byte for byte, whether its tensors were quantized now or found in files of earlier builds."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.formats.gguf import quantize_worker, sensitivity
from edgedistill.formats.gguf.imatrix import collect
from edgedistill.formats.gguf.model_io import silence
from edgedistill.formats.gguf.quantize import named_after, quantize
from edgedistill.formats.gguf.read import read_info
from edgedistill.formats.gguf.reuse import INDEX, find_tensors
from edgedistill.formats.gguf.types import FILE_TYPES, GGML_TYPES

Tiny = Callable[..., Path]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = [[3 + (7 * row + 3 * at * at) % 300 for at in range(60)] for row in range(6)]


def stock(
    src: Path, out: Path, type: str, *, imatrix: Path | None = None, types: dict[str, str] | None = None
) -> bytes:
    """Quantize by llama.cpp's own quantizer, one thread, and return the file's bytes."""
    import llama_cpp

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[type].number, 1
    keep: list[Any] = []
    if types:
        quantize_worker._attach_types(params, {name: GGML_TYPES[kind].number for name, kind in types.items()}, keep)
    if imatrix:
        _, notes = quantize_worker._attach_imatrix(params, str(imatrix), keep)
        overrides = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
        for override, (key, value) in zip(overrides, notes.items(), strict=False):
            override.key, override.tag = key.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
        params.kv_overrides = ctypes.cast(overrides, type_of(params.kv_overrides))
        keep.append(overrides)
    given: Any = ctypes.byref(params)
    assert llama_cpp.llama_model_quantize(str(src).encode(), str(out).encode(), given) == 0
    return out.read_bytes()


type_of = type


@pytest.fixture(scope="module")
def imatrix(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that collects the importance matrix of a tiny model, once each."""
    made: dict[str, Path] = {}

    def get(**options: object) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("imatrix") / "i.gguf"
            collect(tiny_gguf(**options), TEXT, made[key], threads=1)
        return made[key]

    return get


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def entry(store: Path, name: str) -> Path:
    """Return where the file of an entry lies."""
    folder = store / "entries" / name[:2] / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("type", "options", "with_imatrix"),
    [
        ("Q4_K_M", WIDE, True),
        ("Q4_K_M", {}, False),
        ("Q2_K_S", WIDE, True),
        pytest.param("IQ2_M", WIDE, True, marks=pytest.mark.slow),
        ("IQ4_NL", {"to": "bf16", "tie_word_embeddings": False}, True),
        ("Q8_0", {"to": "f32"}, False),
        ("F16", {"to": "f32"}, False),
        ("BF16", {}, False),
    ],
)
def test_the_file_is_llama_cpps_own(
    type: str,
    options: dict[str, Any],
    with_imatrix: bool,
    tiny_gguf: Tiny,
    imatrix: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source, matrix = tiny_gguf(**options), imatrix(**options) if with_imatrix else None
    want = stock(source, tmp_path / "stock.gguf", type, imatrix=matrix)
    report = quantize(source, tmp_path / "ours.gguf", type, imatrix=matrix, threads=2)
    assert (tmp_path / "ours.gguf").read_bytes() == want and report.reused == 0


def test_a_second_file_takes_what_the_first_has(
    tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path, store: Path
) -> None:
    source, matrix = tiny_gguf(**WIDE), imatrix(**WIDE)
    matrices = [tensor.name for tensor in read_info(source).tensors if len(tensor.shape) == 2]
    types = dict(zip(matrices, ["Q4_K", "Q6_K", "IQ4_XS"] * 5, strict=True))
    quantize(source, entry(store, "aa1"), named_after(types), imatrix=matrix, types=types, store=store)
    other = types | {name: "Q5_K" for name in matrices[3:6]}
    path = entry(store, "bb2")
    report = quantize(source, path, named_after(other), imatrix=matrix, types=other, store=store)
    assert report.reused == len(matrices) - 3
    want = stock(source, tmp_path / "stock.gguf", named_after(other), imatrix=matrix, types=other)
    assert path.read_bytes() == want
    # of both files now, in a file with a name of its own
    mixed = other | {matrices[3]: types[matrices[3]]}
    report = quantize(source, entry(store, "cc3"), "Q6_K", imatrix=matrix, types=mixed, store=store)
    assert report.reused == len(matrices)
    assert entry(store, "cc3").read_bytes() == stock(
        source, tmp_path / "stock.gguf", "Q6_K", imatrix=matrix, types=mixed
    )


def test_other_weights_and_another_importance_are_not_found(
    tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path, store: Path
) -> None:
    source, matrix = tiny_gguf(**WIDE), imatrix(**WIDE)
    quantize(source, entry(store, "aa1"), "Q4_0", imatrix=matrix, store=store)
    # Without an importance, only the embedding is as it was: the matrix says nothing of it.
    assert quantize(source, entry(store, "bb2"), "Q4_0", store=store).reused == 1
    changed, name = Path(shutil.copy(source, tmp_path / "changed.gguf")), "blk.1.ffn_up.weight"
    tensor = next(one for one in read_info(changed).tensors if one.name == name)
    weights = np.memmap(changed, np.float16, "r+", tensor.offset, (tensor.nbytes // 2,))
    weights[-1] *= 2
    weights.flush()
    report = quantize(changed, entry(store, "cc3"), "Q4_0", imatrix=matrix, store=store)
    assert report.reused == len([one for one in report.tensors if len(one.shape) == 2]) - 1
    assert entry(store, "cc3").read_bytes() == stock(changed, tmp_path / "stock.gguf", "Q4_0", imatrix=matrix)


@pytest.mark.parametrize("damage", ["tensor", "file", "index"])
def test_what_is_damaged_is_made_anew(damage: str, tiny_gguf: Tiny, imatrix: Callable[..., Path], store: Path) -> None:
    source, matrix = tiny_gguf(**WIDE), imatrix(**WIDE)
    first = entry(store, "aa1")
    whole = quantize(source, first, "Q4_K_S", imatrix=matrix, store=store)
    data = first.read_bytes()
    if damage == "tensor":
        at = next(one.offset for one in read_info(first).tensors if one.name == "blk.0.ffn_up.weight")
        first.write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    elif damage == "file":
        first.unlink()
    else:
        (first.parent / INDEX).write_text("{")
    again = quantize(source, entry(store, "bb2"), "Q4_K_S", imatrix=matrix, store=store)
    assert again.sha256 == whole.sha256
    assert again.reused == (14 if damage == "tensor" else 0)


@pytest.mark.parametrize(("type", "options"), [("Q4_0", {}), ("Q4_K_M", WIDE)])
def test_rounded_tensors_are_found_and_moments_taken_once(
    type: str, options: dict[str, Any], tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path, store: Path
) -> None:
    source, matrix = tiny_gguf(**options), imatrix(**options)
    info = read_info(source)
    matrices = [tensor.name for tensor in info.tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    kinds = ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL"] if type == "Q4_0" else ["Q4_K", "Q6_K", "IQ4_XS", "Q5_0"]
    types = {name: kinds[at % len(kinds)] for at, name in enumerate(matrices)}
    other = types | {name: kinds[1] for name in matrices[2:5]}
    changed = sum(types[name] != other[name] for name in matrices)

    def make(name: str, wanted: dict[str, str], store: Path | None) -> tuple[bytes, Any]:
        path = entry(store, name) if store else tmp_path / f"{name}.gguf"
        report = quantize(source, path, type, imatrix=matrix, types=wanted, feedback=TEXT, store=store, threads=1)
        return path.read_bytes(), report

    plain, alone = make("p1", types, None)
    first, report = make("aa1", types, store)
    assert first == plain and report.reused == 0 and report.rounding["passes"] == 1
    assert {key: report.rounding[key] for key in ("tensors", "kept", "before", "after", "tokens")} == {
        key: alone.rounding[key] for key in ("tensors", "kept", "before", "after", "tokens")
    }
    plain, alone = make("p2", other, None)
    second, report = make("bb2", other, store)
    assert second == plain and report.rounding["passes"] == 0  # moments are there
    assert report.reused == len(report.tensors) - sum(one.got == "F32" for one in report.tensors) - changed
    assert report.rounding["after"] == alone.rounding["after"] < report.rounding["before"] == alone.rounding["before"]
    # moments that were lost are taken anew
    shutil.rmtree(store / "kept")
    third = types | {matrices[0]: kinds[2]}
    again, report = make("cc3", third, store)
    assert again == make("p3", third, None)[0] and report.rounding["passes"] == 1
    # other text is another rounding
    path = entry(store, "dd4")
    report = quantize(source, path, type, imatrix=matrix, types=types, feedback=TEXT[:3], store=store, threads=1)
    assert report.rounding is not None and report.rounding["passes"] == 1 and path.read_bytes() != first


def test_what_the_table_was_made_of_is_taken_from_beside_it(
    tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path, store: Path
) -> None:
    source, table = tiny_gguf(**WIDE), entry(store, "ab1").parent
    sensitivity.measure(
        source, tiny(**WIDE), TEXT, [30] * len(TEXT), table, palette=("IQ4_XS", "IQ4_NL", "Q4_0"), aside=True, threads=1
    )
    matrices = [tensor.name for tensor in read_info(source).tensors if len(tensor.shape) == 2]
    types = dict(zip(matrices, ["IQ4_XS", "Q4_0", "IQ4_NL"] * 5, strict=True))
    path = entry(store, "bb2")
    report = quantize(source, path, "IQ4_XS", imatrix=table / "imatrix.gguf", types=types, store=store)
    assert report.reused == sum(kind != "Q4_0" for kind in types.values()) == 10
    assert path.read_bytes() == stock(
        source, tmp_path / "stock.gguf", "IQ4_XS", imatrix=table / "imatrix.gguf", types=types
    )


def test_the_index_says_where_tensors_lie(tiny_gguf: Tiny, store: Path) -> None:
    path = entry(store, "aa1")
    report = quantize(tiny_gguf(), path, "Q8_0", store=store)
    places = find_tensors(store)
    data = path.read_bytes()
    assert len(places) == sum(one.got != "F32" for one in report.tensors)
    by_offset = {tensor.offset: tensor.nbytes for tensor in read_info(path).tensors}
    for place in places.values():
        assert by_offset[place.offset] == place.nbytes
        assert place.read() == data[place.offset : place.offset + place.nbytes]
