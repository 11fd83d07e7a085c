"""ONNX folders: built, proved against transformers, refused where they are broken, and answered in batches."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.onnx.build import _hint, _run, build
from edgedistill.formats.onnx.check import compare, precision_of
from tests.unit.formats.gguf.conftest import make_model

pytestmark = pytest.mark.onnx

Onnx = Callable[[str], Path]

PROMPTS = [
    [{"role": "system", "content": "Answer with one function call."}, {"role": "user", "content": "Wake me at 7:45"}],
    [{"role": "user", "content": "turn the volume down to thirty percent"}],
]
ROWS = [
    Row(id=str(i), messages=({"role": "user", "content": "turn the volume down to 30 percent"[: 1 + 3 * i]},))
    for i in range(9)
]


def test_a_build_is_reported_and_leaves_nothing_else(tiny_hf: Path, tiny_onnx: Onnx, reports: dict[str, Any]) -> None:
    folder = tiny_onnx("int8")
    report, seen = reports["int8"]
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
    assert report.size == sum(report.files.values()) == sum(file.stat().st_size for file in folder.iterdir())
    assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= set(report.files)
    assert report.versions["onnxruntime-genai"][0].isdigit()
    assert json.dumps(report.to_json())
    assert [path.name for path in folder.parent.iterdir()] == ["int8"]
    assert precision_of(folder) == "int8"
    with pytest.raises(UsageError, match="exists already"):
        build(tiny_hf, folder, "int8")


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("int8", 0.1), ("int4", 3.0)])
def test_every_precision_is_proved(tiny_hf: Path, tiny_onnx: Onnx, precision: str, limit: float) -> None:
    hop = compare(tiny_hf, tiny_onnx(precision), PROMPTS)
    assert (hop.precision, hop.prompts) == (precision, 2)
    assert hop.kld < limit
    assert hop.tokens > 60
    assert json.dumps(hop.to_json())
    if precision == "fp32":
        assert hop.greedy_equal == 2
        assert hop.top1 == 1
        assert hop.max_diff < 1e-3
    else:
        assert hop.kld > 1e-6


def kinds_in(folder: Path) -> set[tuple[int, int, bool, int]]:
    """Return (bits, block, zero points, accuracy) of the products of a graph."""
    import onnx

    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    about = [({a.name: a.i for a in node.attribute}, len(node.input) > 3) for node in nodes]
    return {(a["bits"], a["block_size"], zeros, a["accuracy_level"]) for a, zeros in about}


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int4", {"block": 64, "symmetric": False, "accuracy": 1}),
        pytest.param("mixed", {}, marks=pytest.mark.slow),
        *(
            pytest.param("int4", {"block": block, "symmetric": symmetric, "accuracy": accuracy}, marks=pytest.mark.slow)
            for block in (32, 64, 128)
            for symmetric in (True, False)
            for accuracy in (1, 4)
            if (block, symmetric, accuracy) != (64, False, 1)
        ),
        pytest.param("int8", {"block": 128, "accuracy": 1}, marks=pytest.mark.slow),
        pytest.param("mixed", {"block": 64, "accuracy": 1}, marks=pytest.mark.slow),
    ],
)
def test_every_option_is_built_loaded_and_proved(
    even_hf: Path, tmp_path: Path, precision: str, options: dict[str, Any]
) -> None:
    build(even_hf, tmp_path / "out", precision, **options)
    block, symmetric, accuracy = (
        options.get(name, at) for name, at in (("block", 32), ("symmetric", True), ("accuracy", 4))
    )
    bits = {"int4": {4}, "int8": {8}, "mixed": {4, 8}}[precision]
    assert kinds_in(tmp_path / "out") == {(n, block, precision == "mixed" or not symmetric, accuracy) for n in bits}
    assert 1e-6 < compare(even_hf, tmp_path / "out", PROMPTS).kld < 3.0


@pytest.mark.slow  # seven seconds; the plain one stays
def test_a_narrower_residual_stream_is_proved_too(tmp_path: Path) -> None:
    """Its heads are together wider than what they read and write, which a Llama of the builder's kind seldom has."""
    from edgedistill.training.recipe import copy_tokenizer, encode_rows, load_model
    from edgedistill.training.residual import choose_basis, narrow_residual

    shape: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder, small = make_model(tmp_path / "whole", pre="gpt-2", **shape), tmp_path / "small"
    whole, taught = load_model(folder), [replace(row, reference=row.reference or "ok") for row in ROWS]
    narrow_residual(whole, choose_basis(whole, encode_rows(taught, folder), 64)[0]).save_pretrained(small)
    copy_tokenizer(folder, small)
    build(small, tmp_path / "out" / "fp32", "fp32")
    hop = compare(small, tmp_path / "out" / "fp32", PROMPTS)
    assert hop.greedy_equal == 2 and hop.max_diff < 1e-3


def test_another_model_is_refused(tiny_onnx: Onnx, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", pre="gpt-2", hidden_size=96, num_attention_heads=6, head_dim=16, seed=1)
    for precision in ("fp32", "int4"):
        with pytest.raises(StepFailed, match="this is another model"):
            compare(other, tiny_onnx(precision), PROMPTS)


def test_another_tokenizer_or_template_is_refused(tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_hf, changed)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant\n", "assistant: ")
    (changed / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(StepFailed, match="renders the chat template"):
        compare(changed, tiny_onnx("fp32"), PROMPTS)
    shutil.rmtree(changed)
    shutil.copytree(tiny_hf, changed)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StepFailed, match="other tokens than transformers"):
        compare(changed, tiny_onnx("fp32"), PROMPTS)
    with pytest.raises(UsageError, match="there are none"):
        compare(tiny_hf, tiny_onnx("fp32"), [])


def test_a_damaged_folder_does_not_pass(tiny_hf: Path, tiny_onnx: Onnx, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_onnx("int8"), broken)
    data = broken / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(StepFailed, match="cannot load"):
        compare(tiny_hf, broken, PROMPTS)
    (broken / "model.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match="no readable ONNX model"):
        compare(tiny_hf, broken, PROMPTS)


def test_what_cannot_be_built(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no precision 'fp16'"):
        build(tiny_hf, tmp_path / "out", "fp16")
    with pytest.raises(UsageError, match=r"needs config\.json"):
        build(tmp_path, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_builder_shows_the_end_of_its_log() -> None:
    script = (
        "import sys; print('\\n'.join(f'line {i}' for i in range(99)), '\\rold\\rnew', file=sys.stderr); sys.exit(3)"
    )
    with pytest.raises(StepFailed, match="exited with 3") as caught:
        _run([sys.executable, "-c", script], 2, None)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["line 74", "line 75"]
    assert lines[-1] == "new"
    assert "families" in caught.value.hint
    assert _hint("OSError: No space left on device", 10**12).startswith("Free disk space")
    assert _hint("ModuleNotFoundError: No module named 'onnx_ir'", 10**12) == "pip install 'edgedistill[onnx]'"


@pytest.mark.slow
def test_a_family_that_the_builder_does_not_know(tiny_hf: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_hf, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"], "model_type": "bert"}))
    with pytest.raises(StepFailed, match="The end of its log"):
        build(unknown, tmp_path / "out", "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unknown"]


def test_without_the_extra(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("onnxruntime_genai"):
            raise ImportError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="ONNX needs onnxruntime_genai") as caught:
        build(tiny_hf, tmp_path / "out", "int8")
    assert caught.value.hint == "pip install 'edgedistill[onnx]'"


def test_batched_answers_are_those_of_one_row_at_a_time(tiny_onnx: Onnx, tiny_hf: Path) -> None:
    from edgedistill.evals.runners import open_runner
    from edgedistill.evals.runners.onnx import OnnxRunner
    from edgedistill.evals.runners.transformers import TransformersRunner

    with (
        OnnxRunner(tiny_onnx("fp32"), threads=1, batch=4) as runner,
        TransformersRunner(tiny_hf, dtype="float32") as hf,
    ):
        answers = runner.answer(ROWS, max_new_tokens=10)
        alone = [runner.answer([row], max_new_tokens=10)[0] for row in ROWS]
        theirs = hf.answer(ROWS, max_new_tokens=10)
        assert [a.id for a in answers] == [row.id for row in ROWS]
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone] == [a.token_ids for a in theirs]
        assert [a.finish for a in answers] == [a.finish for a in theirs]
        assert runner.end_token() == hf.end_token() == 2
        ids = [runner.encode(row) for row in ROWS]
        assert ids == [hf.encode(row) for row in ROWS]
        positions = [range(len(tokens) - 3, len(tokens)) for tokens in ids]
        for mine, other in zip(runner.logprobs(ids, positions), hf.logprobs(ids, positions), strict=True):
            assert mine.shape[0] == 3
            assert np.abs(mine[:, : other.shape[1]] - other).max() < 1e-3
        assert runner.describe()["engine"] == "onnxruntime-genai"
        assert runner.answer([], max_new_tokens=3) == []
        with pytest.raises(UsageError, match="GBNF"):
            runner.answer(ROWS, max_new_tokens=10, grammar="root ::= [a]")
        long = Row(id="long", messages=({"role": "user", "content": "7" * 300},))
        with pytest.raises(UsageError, match="row 'long'"):
            runner.answer([long], max_new_tokens=10)
        near = Row(id="near", messages=({"role": "user", "content": "7" * (250 - len(ids[0]))},))
        (cut,) = runner.answer([near], max_new_tokens=50)
        assert cut.finish in ("context", "stop")
        assert cut.tokens < 10
        with pytest.raises(UsageError, match="context 256"):
            runner.logits([1] * 257)
        with pytest.MonkeyPatch.context() as patch:
            # What the runtime gives for a batch whose last answer ends before its limit: no end token after it.
            patch.setattr(runner, "generate", lambda prompts, _limit: [[5, 6], [5, 2, 2]][: len(prompts)])
            ended = runner.answer(ROWS[:2], max_new_tokens=4)
            assert [(a.finish, len(a.token_ids)) for a in ended] == [("stop", 2), ("stop", 1)]
            patch.setattr(runner, "generate", lambda _prompts, limit: [[5] * limit])
            assert runner.answer(ROWS[:1], max_new_tokens=4)[0].finish == "length"
    with open_runner(tiny_onnx("int8")) as opened:  # type: ignore[attr-defined]
        assert isinstance(opened, OnnxRunner)


def test_divergence_of_precisions(tiny_onnx: Onnx, tiny_hf: Path) -> None:
    from edgedistill.evals.likelihood import divergence
    from edgedistill.evals.runners.onnx import OnnxRunner
    from edgedistill.evals.runners.transformers import TransformersRunner

    rows = [Row(id=row.id, messages=row.messages, reference="the next song 7:45") for row in ROWS[:4]]
    klds = {}
    with TransformersRunner(tiny_hf, dtype="float32") as reference:
        for precision in ("fp32", "int8", "int4"):
            with OnnxRunner(tiny_onnx(precision)) as runner:
                klds[precision] = divergence(runner, reference, rows).kld.value
    assert klds["fp32"] < 1e-6 < klds["int8"] < klds["int4"]
