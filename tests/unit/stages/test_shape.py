"""Several ways to make a student smaller at once: in which order, and that what comes out heals and converts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key
from edgedistill.recipe import Heal as HealTable
from edgedistill.stages.heal import Heal
from edgedistill.stages.shape import MeasuredShape, Shape
from edgedistill.step import Context, Stage
from edgedistill.training.ffn import prune_ffn
from edgedistill.training.recipe import encode_rows, load_model
from edgedistill.training.residual import choose_basis, narrow_residual, read_basis
from edgedistill.training.shaping import block_influence, most_important, prune_depth
from tests.unit.formats.gguf.conftest import TEXT, make_model

MODEL, SHAPED = Key("a" * 64), Key("b" * 64)
ROWS = tuple(
    Row(id=str(at), messages=({"role": "user", "content": text},), reference=TEXT[at - 1])
    for at, text in enumerate(TEXT)
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry of a model with five layers, 96 wide."""
    entry = tmp_path_factory.mktemp("whole")
    make_model(entry / "model", hidden_size=96, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=5)
    return entry


def run(stage: Stage, out: Path, **entries: Any) -> Any:
    """Run a stage; return its facts."""
    for folder in (out, out.with_name(f"{out.name}-work")):
        folder.mkdir()
    ctx = Context(
        out=out, work=out.with_name(f"{out.name}-work"), entries=cast(Any, entries), rows=cast(Any, None), threads=1,
        progress=lambda *_: None, note=lambda _: None,
    )  # fmt: skip
    return stage.run(ctx)


def shape(**changes: Any) -> MeasuredShape:
    fields: dict[str, Any] = {
        "model": MODEL, "layers": (), "keep": 3, "hidden": 64, "ffn": 96, "rows_digest": "", "rows": ROWS,
        "vocabulary": 380, "taught_digest": "", "taught": ROWS[:1],
    }  # fmt: skip
    return MeasuredShape(**{**fields, **changes})


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


def test_each_way_is_chosen_on_what_the_ones_before_it_leave(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers by the whole model, directions by these layers' states, FFNs on the narrow stream, the vocabulary last."""
    monkeypatch.setattr("edgedistill.training.precision.torch_dtype", lambda *_: torch.float32)
    entry = SimpleNamespace(path=whole, facts={})
    facts = run(shape(), tmp_path / "out", **{MODEL: entry})
    source = whole / "model"
    examples = encode_rows(ROWS, source)
    layers = most_important(block_influence(load_model(source), examples), 3)
    assert facts["layers"] == layers and len(facts["ffn_error"]) == 3
    basis, lost = choose_basis(load_model(source), examples, 64, layers=layers)
    assert facts["hidden_error"] == pytest.approx(lost, rel=1e-3)
    small = narrow_residual(load_model(source), basis)
    prune_ffn(small, examples, 96, layers=layers)
    by_hand = prune_depth(small, layers)
    read = read_basis(tmp_path / "out")
    assert read is not None
    torch.testing.assert_close(read.double(), basis, rtol=0, atol=1e-3)
    kept = json.loads((tmp_path / "out" / "model" / "tokenizer_origin.json").read_text())["kept"]
    shaped = load_model(tmp_path / "out" / "model")
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    assert [getattr(shaped.config, name) for name in sizes] == [3, 64, 96, 380]
    ids = list(range(20))
    found, wanted = logits(shaped, ids), logits(by_hand, [kept[one] for one in ids])[:, kept]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert facts["params"] == sum(p.numel() for p in shaped.parameters()) < facts["params_before"]


def test_a_vocabulary_that_is_too_small_is_told_before_anything_is_computed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.training.recipe.load_model", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=r"student\.vocabulary = 256: the rows that are taught need"):
        run(shape(vocabulary=256), tmp_path / "out", **{MODEL: SimpleNamespace(path=whole, facts={})})


def test_it_heals_in_its_own_basis_and_converts(whole: Path, tmp_path: Path) -> None:
    from edgedistill.formats.gguf.check import compare_logits
    from edgedistill.formats.gguf.convert import convert

    entry = SimpleNamespace(path=whole, facts={})
    facts = run(shape(), tmp_path / "shaped", **{MODEL: entry})
    training = HealTable(hidden=5.0, epochs=4.0, batch_size=2).keyed("files", "rows")
    stage = Heal(
        student=SHAPED, kept=None, rows_digest="", rows=ROWS, teacher=MODEL, layers=(), training=training, seed=0
    )
    shaped = SimpleNamespace(path=tmp_path / "shaped", facts=facts)
    run(stage, tmp_path / "healed", **{MODEL: entry, SHAPED: shaped})
    log = [json.loads(line) for line in (tmp_path / "healed" / "log" / "train.jsonl").read_text().splitlines()]
    assert log[-1]["hidden"] < log[0]["hidden"] < 2
    out = tmp_path / "healed" / "model"
    converted = convert(out, tmp_path / "student.gguf", dtype="f32")
    report = compare_logits(out, converted.path, [[{"role": "user", "content": text}] for text in TEXT], texts=TEXT)
    assert report.max_diff < 0.05  # llama.cpp keeps keys and values in f16


def test_a_key_without_a_hidden_size_is_what_it_was() -> None:
    """The digest is that of the version before there was one."""
    plain = Shape(model=MODEL, layers=(0, 1), ffn=96, rows_digest="r", rows=())
    assert plain.key() == "52d553d38d74840e0fcee9cf23947d44e2d2c795731fd25ad0a764512076e1df"
    assert shape().key() != shape(hidden=32).key() != shape(hidden=None).key()
