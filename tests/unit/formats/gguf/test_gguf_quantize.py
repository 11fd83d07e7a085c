"""Quantizing gives what was asked or says what it got, the same bytes each time, and never half a file."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf import quantize as module
from edgedistill.formats.gguf.imatrix import collect, save
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.quantize import dry_run, named_after, quantize
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.formats.gguf.types import FILE_TYPES, plan_tensors

Tiny = Callable[..., Path]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def imatrix(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that collects the importance matrix of a tiny model."""

    def get(**options: object) -> Path:
        path = tiny_gguf(**options)
        out = tmp_path_factory.mktemp("imatrix") / "i.gguf"
        collect(path, [list(range(3, 90))], out, threads=2)
        return out

    return get


def test_the_fallback_is_reported_with_its_cost(tiny_gguf: Tiny, tmp_path: Path) -> None:
    seen: list[int] = []
    report = quantize(
        tiny_gguf(), tmp_path / "q.gguf", "Q4_K_M", threads=1, progress=lambda done, total, note: seen.append(done)
    )
    info = read_info(tmp_path / "q.gguf")
    types = {tensor.name: tensor.type for tensor in info.tensors}
    assert {tensor.name: tensor.got for tensor in report.tensors} == types
    assert {tensor.name: tensor.nbytes for tensor in report.tensors} == {t.name: t.nbytes for t in info.tensors}
    assert seen[-1] == len(types) and len(report.fallbacks) == 15
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.attn_q.weight"] == "Q5_0"
    words = report.warning()
    assert "15 of 20 tensors" in words and "rows of 64, 128 weights" in words and "x Q4_K to Q5_0" in words
    assert report.bpw == pytest.approx(info.bpw) and report.bpw > report.asked_bpw > 4
    assert sum(tensor.extra for tensor in report.tensors) > 0
    assert report.size == info.size and report.library["llama_cpp_python"]
    assert json.loads(json.dumps(report.to_json()))["sha256"] == report.sha256
    assert info.file_type == "Q4_K_M" and sorted(path.name for path in tmp_path.iterdir()) == ["q.gguf"]


def test_rows_that_fit_do_not_fall_back(tiny_gguf: Tiny, tmp_path: Path) -> None:
    report = quantize(tiny_gguf(**WIDE), tmp_path / "q.gguf", "Q4_K_M")
    assert not report.fallbacks and report.warning() == "" and report.bpw == report.asked_bpw


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("IQ3_XXS", "Q4_0", "BF16")),
        (WIDE, ("Q3_K_L", "Q4_K_S", "Q4_0", "Q2_K_S")),
        ({"tie_word_embeddings": False, **WIDE}, ("IQ2_M", "IQ4_XS")),
    ],
    ids=["narrow", "wide", "untied"],
)
def test_the_plan_is_llama_cpps_own(
    options: dict[str, object], names: tuple[str, ...], tiny_gguf: Tiny, imatrix: Callable[..., Path]
) -> None:
    path = tiny_gguf(num_hidden_layers=9, **options)
    shapes = {tensor.name: tensor.shape for tensor in read_info(path).tensors}
    for name in names:
        chosen = imatrix(num_hidden_layers=9, **options) if FILE_TYPES[name].imatrix == "required" else None
        want = {plan.name: plan.got for plan in plan_tensors(shapes, name, gqa=2, imatrix=chosen is not None)}
        assert {tensor.name: tensor.got for tensor in dry_run(path, name, imatrix=chosen).tensors} == want, name


@pytest.mark.slow
@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("name", FILE_TYPES)
def test_the_plan_is_llama_cpps_own_on_the_real_model(
    name: str, with_imatrix: bool, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from edgedistill.formats.gguf.convert import convert

    folder = tmp_path_factory.getbasetemp()
    path, matrix = folder / "smollm2-f16.gguf", folder / "smollm2-imatrix.gguf"
    if not path.exists():
        convert(smollm2, path)
        collect(path, [list(range(100, 200))], matrix)
    shapes = {tensor.name: tensor.shape for tensor in read_info(path).tensors}
    if name == "Q1_0" or (FILE_TYPES[name].imatrix == "required" and not with_imatrix):
        try:
            needy = any(plan.needs_imatrix for plan in plan_tensors(shapes, name, gqa=3))
        except UsageError:
            return
        if needy:
            return
    want = {plan.name: plan.got for plan in plan_tensors(shapes, name, gqa=3, imatrix=with_imatrix)}
    report = dry_run(path, name, imatrix=matrix if with_imatrix else None)
    assert {tensor.name: tensor.got for tensor in report.tensors} == want


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M"])
def test_the_bytes_are_the_same_each_time_and_for_any_threads(
    name: str, tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path
) -> None:
    matrix = imatrix(**WIDE)
    digests = {
        quantize(tiny_gguf(**WIDE), tmp_path / f"{threads}.gguf", name, imatrix=matrix, threads=threads).sha256
        for threads in (1, 2, 3)
    }
    assert len(digests) == 1


def test_the_imatrix_changes_the_weights_and_is_noted(
    tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path
) -> None:
    plain = quantize(tiny_gguf(**WIDE), tmp_path / "a.gguf", "Q4_K_S")
    better = quantize(tiny_gguf(**WIDE), tmp_path / "b.gguf", "Q4_K_S", imatrix=imatrix(**WIDE))
    assert plain.sha256 != better.sha256 and better.imatrix_entries == 14 and better.without_imatrix == ()
    assert read_info(tmp_path / "b.gguf").metadata["quantize.imatrix.entries_count"] == 14
    assert str(tmp_path).encode() not in (tmp_path / "b.gguf").read_bytes()


def test_a_missing_entry_is_told_and_a_foreign_imatrix_refused(
    tiny_gguf: Tiny, imatrix: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_gguf(**WIDE)
    save(tmp_path / "one.gguf", {"blk.0.attn_q.weight": (np.ones(256), 1)}, 1, "x")
    report = quantize(path, tmp_path / "q.gguf", "Q4_0", imatrix=tmp_path / "one.gguf")
    assert len(report.without_imatrix) == 13 and "blk.0.attn_q.weight" not in report.without_imatrix
    with pytest.raises(UsageError, match="made for another model"):
        quantize(path, tmp_path / "r.gguf", "Q4_0", imatrix=imatrix())
    save(tmp_path / "none.gguf", {"blk.7.attn_q.weight": (np.ones(256), 1)}, 1, "x")
    with pytest.raises(UsageError, match="no entry for any tensor"):
        quantize(path, tmp_path / "r.gguf", "Q4_0", imatrix=tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="which needs one in IQ2_XS"):
        quantize(path, tmp_path / "r.gguf", "IQ2_XS", imatrix=tmp_path / "one.gguf")


def test_types_of_the_two_large_matrices(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf(**WIDE, tie_word_embeddings=False)
    report = quantize(path, tmp_path / "q.gguf", "Q4_0", embedding_type="Q5_0", output_type="Q8_0")
    got = {tensor.name: tensor.got for tensor in report.tensors}
    assert (got["token_embd.weight"], got["output.weight"]) == ("Q5_0", "Q8_0")
    pure = quantize(path, tmp_path / "p.gguf", "Q4_0", pure=True)
    assert Counter(tensor.got for tensor in pure.tensors) == {"Q4_0": 16, "F32": 5}


def test_every_matrix_may_have_a_type_of_its_own(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf(**WIDE, tie_word_embeddings=False)
    matrices = [tensor.name for tensor in read_info(path).tensors if len(tensor.shape) == 2]
    kinds = ("Q4_0", "Q8_0", "Q5_K", "F16", "IQ4_NL", "Q6_K")
    types = {name: kinds[at % len(kinds)] for at, name in enumerate(matrices)}
    report = quantize(path, tmp_path / "q.gguf", named_after(types), types=types)
    written = {tensor.name: tensor.type for tensor in read_info(tmp_path / "q.gguf").tensors}
    assert {name: written[name] for name in matrices} == types
    assert not report.fallbacks and report.size == (tmp_path / "q.gguf").stat().st_size
    with pytest.raises(UsageError, match=r"has no matrix blk\.9\.ffn_up\.weight: the types were chosen for another"):
        quantize(path, tmp_path / "p.gguf", "Q4_0", types={"blk.9.ffn_up.weight": "Q4_0"})
    with pytest.raises(UsageError, match="rows of 64 do not fit Q4_K"):
        quantize(tiny_gguf(), tmp_path / "p.gguf", "Q4_0", types={"blk.0.ffn_up.weight": "Q4_K"})


def test_a_choice_of_types_goes_by_the_name_of_most() -> None:
    assert named_after({"a": "Q4_K", "b": "Q4_K", "c": "F16"}) == "Q4_K_S"
    assert named_after({"a": "F16", "b": "F16", "c": "Q5_1"}) == "Q5_1"
    assert named_after({"a": "F16"}) == "Q8_0"


def test_a_named_type_that_does_not_fit_is_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="type Q5_K does not fit token_embd") as caught:
        quantize(tiny_gguf(), tmp_path / "q.gguf", "Q4_0", embedding_type="Q5_K")
    assert "Q5_1" in caught.value.hint
    with pytest.raises(UsageError, match="output"):
        quantize(tiny_gguf(tie_word_embeddings=False), tmp_path / "q.gguf", "Q4_0", output_type="Q6_K")


def test_quantized_weights_are_near_and_nearer_with_more_bits(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf(**WIDE)
    want = read_tensor(read_info(path), "blk.1.ffn_up.weight")
    errors = []
    for name in ("Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q3_K_S", "Q2_K"):
        quantize(path, tmp_path / "q.gguf", name)
        got = read_tensor(read_info(tmp_path / "q.gguf"), "blk.1.ffn_up.weight")
        errors.append(float(np.abs(got - want).mean() / np.abs(want).mean()))
    assert errors == sorted(errors) and errors[0] < 0.01 and errors[-1] < 0.4


def test_a_quantized_source_is_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    quantize(tiny_gguf(), tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(UsageError, match=r"already quantized \(Q8_0") as caught:
        quantize(tmp_path / "q.gguf", tmp_path / "r.gguf", "Q4_0")
    assert "f16" in caught.value.hint


def test_types_that_need_an_imatrix_say_so(tiny_gguf: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="IQ2_XS needs an importance matrix"):
        quantize(tiny_gguf(**WIDE), tmp_path / "q.gguf", "IQ2_XS")
    with pytest.raises(UsageError, match="did you mean 'Q4_0'"):
        quantize(tiny_gguf(), tmp_path / "q.gguf", "q4_0")
    with pytest.raises(UsageError, match="unknown GGUF tensor type 'Q4_K_M'"):
        quantize(tiny_gguf(), tmp_path / "q.gguf", "Q4_0", output_type="Q4_K_M")


def test_a_failing_library_leaves_nothing(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_gguf(), tmp_path / "x.gguf"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"general.architecture", b"general.architectuer", 1))
    with pytest.raises(StepFailed, match="failed to quantize"):
        quantize(path, tmp_path / "q.gguf", "Q4_0")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_a_killed_worker_leaves_nothing(tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKER", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StepFailed, match="killed by SIGKILL") as caught:
        quantize(tiny_gguf(), tmp_path / "q.gguf", "Q4_0")
    assert "memory" in caught.value.hint and not list(tmp_path.iterdir())


def test_a_truncated_result_never_gets_its_name(
    tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = (
        "import json, sys; r = json.load(sys.stdin); d = open(r['src'], 'rb').read(); "
        "open(r['out'], 'wb').write(d[: len(d) // 2]); print('{\"ok\": true}')"
    )
    monkeypatch.setattr(module, "_WORKER", half)
    with pytest.raises(StepFailed, match=r"damaged file: .* cut short"):
        quantize(tiny_gguf(), tmp_path / "q.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before(tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    with pytest.raises(UsageError, match="the disk has 0 MB free"):
        quantize(tiny_gguf(), tmp_path / "q.gguf", "Q4_0")


class _Usage:
    free = 1000


def test_the_result_runs_and_stays_close(smollm2: Path, tmp_path: Path) -> None:
    from edgedistill.formats.gguf.check import kld
    from edgedistill.formats.gguf.convert import convert

    source = convert(smollm2, tmp_path / "f16.gguf").path
    report = quantize(source, tmp_path / "q.gguf", "Q8_0", threads=2)
    assert report.size / 1e6 == pytest.approx(144.8, rel=0.01) and not report.fallbacks
    text = "The alarm is set for seven in the morning. Shall I also remind you to call your sister about the party?"
    logits = []
    for path in (source, tmp_path / "q.gguf"):
        model = open_model(path, n_ctx=64, threads=1)
        logits.append(all_logits(model, model.tokenize(text.encode(), add_bos=False)))
        model.close()
    assert 0 < float(kld(*logits).mean()) < 0.03
    model = open_model(tmp_path / "q.gguf", n_ctx=128, threads=1)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    answer = model.create_chat_completion(asked, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    model.close()
    assert "Paris" in answer["choices"][0]["message"]["content"]  # type: ignore[index]
