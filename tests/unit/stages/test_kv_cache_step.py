"""The step that takes the types of a KV cache by the memory of a real process, and says what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.fingerprint import Key
from edgedistill.kv_cache import CHOICES, types_of
from edgedistill.stages.kv_cache import KvCache
from tests.unit.formats.gguf.conftest import make_model

CONTEXT = (
    32768  # 4 layers x 64 x 4 bytes of f16 a token: 33.6 MB, of which q8_0 saves 15.7, q8_0 / q4_0 19.9, q4_0 24.1
)
MODEL, TEXT = Key("a" * 64), Key("b" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgedistill.formats.gguf.convert import convert

    folder = tmp_path_factory.mktemp("kv")
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4}
    convert(make_model(folder / "hf", max_position_embeddings=256, **heads), folder / "model.gguf")
    (folder / "tokens.json").write_text(json.dumps([list(range(3, 80)), list(range(90, 40, -1))]))
    return folder


def run(folder: Path, out: Path, **fields: Any) -> tuple[dict[str, Any], list[str], Any]:
    notes: list[str] = []
    out.mkdir()
    ctx: Any = SimpleNamespace(
        out=out, threads=1, path=lambda key, name: folder / name, note=notes.append, progress=lambda *told: None
    )
    plain: dict[str, Any] = {
        "model": MODEL, "text": TEXT, "context": CONTEXT, "threads": 1, "build": "b", "isa": "i", "peak_rss": None,
    }  # fmt: skip
    stage = KvCache(**{**plain, **fields})
    return dict(stage.run(ctx)["kv_cache"]), notes, ctx


def test_auto_takes_the_first_types_that_the_memory_allows(folder: Path, tmp_path: Path) -> None:
    given, notes, _ = run(folder, tmp_path / "given", types=(("q4_0", "q4_0"),))
    whole, least = given["peak_rss"]["f16"], given["peak_rss"]["q4_0"]
    assert whole - least == pytest.approx(24.1e6, rel=0.15)
    assert (given["k"], given["v"], given["context"], given["rows"]) == ("q4_0", "q4_0", 256, 16)
    assert given["kld"]["value"] > 0 and "KV cache in q4_0: KLD" in notes[0]

    auto, notes, ctx = run(folder, tmp_path / "auto", types=CHOICES, peak_rss=whole - 18_000_000)
    assert list(auto["peak_rss"]) == ["f16", "q8_0", "q8_0 / q4_0"]
    assert (auto["k"], auto["v"]) == ("q8_0", "q4_0")
    assert 0 < auto["kld"]["value"] < given["kld"]["value"]
    read = SimpleNamespace(path=lambda key, name: ctx.out / name)
    assert types_of(read, MODEL) == ("q8_0", "q4_0")  # type: ignore[arg-type]
    # What the steps after it are keyed by holds no measured bytes: another run has the same.
    assert "peak_rss" not in json.loads((ctx.out / "kv_cache.json").read_text())

    none, notes, _ = run(folder, tmp_path / "none", types=CHOICES, peak_rss=whole - 30_000_000)
    assert (none["k"], none["v"]) == ("q4_0", "q4_0")
    assert "no type of the KV cache keeps to limits.peak_rss" in notes[0]


def test_auto_stays_with_f16_where_there_is_room_and_measures_nothing(folder: Path, tmp_path: Path) -> None:
    found, notes, _ = run(folder, tmp_path / "room", types=CHOICES, peak_rss=2**34)
    assert (found["k"], found["v"], notes) == ("f16", "f16", [])
    assert list(found["peak_rss"]) == ["f16"] and "kld" not in found
