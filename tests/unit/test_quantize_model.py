"""``quantize MODEL`` with a type for each matrix: the choice keeps to its size, beats one type for all, and is made once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgedistill import quantize_model as quantizing
from edgedistill.devices.host import fingerprint
from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.quantize import named_after, quantize
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.quantize_model import _calibration_text, quantize_model
from edgedistill.runner import Reporter
from edgedistill.store import Entry, Store
from tests.unit.formats.gguf.conftest import TEXT, make_model

IDS = [[(7 * row + 3 * at * at) % 300 + 3 for at in range(24)] for row in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("auto") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXT * 40))
    return path


def kld(path: Path, whole: Path) -> float:
    """Return the mean KLD of a file from another one on ``IDS``, by stock llama.cpp."""

    def logprobs(of: Path) -> np.ndarray:
        llama = open_model(of)
        try:
            logits = np.concatenate([all_logits(llama, ids) for ids in IDS]).astype(np.float64)
        finally:
            llama.close()
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    p, q = logprobs(whole), logprobs(path)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_auto_keeps_to_its_size_and_loses_less_than_one_type(model: Path, text: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    make = {"targets": [], "calibration": text, "store": store, "out": tmp_path / "out"}
    whole, stock = quantize_model(str(model), types=["F16", "Q4_0"], **make)
    (auto,) = quantize_model(str(model), types=["auto"], size=stock.size + 1024, **make)
    assert stock.size * 0.9 < auto.size <= stock.size + 1024
    kinds = {tensor.type for tensor in read_info(auto.path).tensors}
    assert len(kinds - {"F32"}) > 1 and kinds <= {"F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
    assert kld(auto.path, whole.path) < 0.8 * kld(stock.path, whole.path)
    assert "predicted KLD" in auto.notes[0] and "at other sizes" in auto.notes[1]
    told = re.fullmatch(
        r"measured KLD (\S+) \[\S+, \S+\] nats a token, on \d+ of the texts .* \(\d+ tokens\)", auto.notes[2]
    )
    predicted = re.match(r"predicted KLD (\S+) ", auto.notes[0])
    assert told and predicted and 0.4 < float(told[1]) / float(predicted[1]) < 1.6

    # Another size asks the model nothing anew, the same one nothing at all.
    before = {path.name for path in (store.root / "entries").glob("*/*")}
    (larger,) = quantize_model(str(model), types=["auto"], size="140 KiB", **make)
    made = [store.load(Key(path.name)) for path in (store.root / "entries").glob("*/*") if path.name not in before]
    facts = [set(entry.facts) for entry in made if entry]
    assert len(facts) == 2 and sum("allocate" in one for one in facts) == sum("quantize" in one for one in facts) == 1
    assert auto.size < larger.size <= 140 * 1024


@pytest.mark.slow  # seven seconds; the choice itself stays
def test_what_auto_chooses_is_shown_without_a_file(model: Path, text: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgedistill",
        "quantize",
        str(model),
        "--types",
        "auto",
        "--size",
        "120 KiB",
        "--dry-run",
    ]
    command += ["--calibration", str(text), "-o", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)
    assert 100 * 1024 < one["size"] <= 120 * 1024
    assert "token_embd 1 x" in one["notes"][0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("types", "more", "said"),
    [
        (["auto"], {}, "needs a size to keep to"),
        (["auto"], {"size": "80 KiB"}, "to choose types takes text of the task"),
        (["auto"], {"size": "large"}, "--size: expected a size"),
        (["Q4_0"], {"size": "80 KiB"}, "--size is for --types auto"),
        (["Q4_0"], {"dry_run": True}, "--dry-run shows what auto chooses"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, types: list[str], more: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        quantize_model(str(model), targets=[], types=types, out=tmp_path, store=Store(tmp_path / "s"), **more)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "s" / "entries").exists() or not any((tmp_path / "s" / "entries").iterdir())


class Noted(Reporter):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def profile(path: Path, lines: str, *, format_: str = "gguf") -> str:
    path.parent.mkdir(exist_ok=True)
    engine = {"gguf": "llama.cpp", "onnx": "onnxruntime-genai"}[format_]
    path.write_text(
        f'summary = "x"\narch = "x86_64"\n[runtime]\nformat = "{format_}"\nengine = "{engine}"\nthreads = 1\ncontext = 128\n'
        f"[quantize]\n{lines}\n"
    )
    return str(path)


def test_a_file_is_called_by_the_name_of_the_profile_that_was_given_as_a_file(model: Path, tmp_path: Path) -> None:
    mine = profile(tmp_path / "mine" / "phone.toml", 'type = "Q4_0"')
    make: dict[str, Any] = {"types": [], "store": Store(tmp_path / "store"), "out": tmp_path / "out"}
    (made,) = quantize_model(str(model), targets=[mine], **make)
    assert made.path == tmp_path / "out" / "tiny-phone.gguf" and list((tmp_path / "out").iterdir()) == [made.path]
    yours = profile(tmp_path / "yours" / "phone.toml", 'type = "Q8_0"')
    with pytest.raises(UsageError, match=r"phone\.toml would both be written to .*tiny-phone\.gguf"):
        quantize_model(str(model), targets=[mine, yours], **make)


def test_a_file_that_is_a_link_is_taken_as_what_it_points_to(model: Path, tmp_path: Path) -> None:
    """A hub's cache holds its files so, by a way relative to the link."""
    whole, link = convert(model, tmp_path / "blobs" / "b1", dtype="f16").path, tmp_path / "snapshot" / "tiny.gguf"
    link.parent.mkdir()
    link.symlink_to(Path("..") / "blobs" / "b1")
    store = Store(tmp_path / "store")
    (made,) = quantize_model(str(link), targets=[], types=["Q8_0"], out=tmp_path / "out", store=store)
    assert read_info(made.path).file_type == "Q8_0"
    (kept,) = (path for path in store.root.glob("entries/*/*/model.gguf") if path.samefile(whole))
    assert not kept.is_symlink()


@pytest.mark.parametrize("whole", ["f32", "bf16", "f16"])
def test_f16_is_f16_whatever_the_file_was(whole: str, model: Path, tmp_path: Path) -> None:
    source = convert(model, tmp_path / "whole.gguf", dtype=whole).path
    make: dict[str, Any] = {"targets": [], "out": tmp_path / "out", "store": Store(tmp_path / "store")}
    (made,) = quantize_model(str(source), types=["F16"], **make)
    found = read_info(made.path)
    assert found.file_type == "F16" and {one.type for one in found.tensors if len(one.shape) == 2} == {"F16"}


def test_wider_types_have_the_weights_of_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """And not what is left of these in 16 bits."""
    import torch
    from safetensors.torch import load_file

    make: dict[str, Any] = {"targets": [], "out": tmp_path / "out", "store": Store(tmp_path / "store")}
    made = quantize_model(str(model), types=["F32", "BF16", "F16"], **make)
    own = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    for one, kind in zip(made, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        info = read_info(one.path)
        assert info.file_type == one.type
        np.testing.assert_array_equal(read_tensor(info, "blk.1.ffn_up.weight"), own.to(kind).float().numpy())


def test_calibration_text_begins_as_the_models_text_does(text: Path, tmp_path: Path) -> None:
    folder, store = make_model(tmp_path / "tiny", bos=True), Store(tmp_path / "store")
    quantize_model(str(folder), targets=[], types=["Q4_0"], calibration=text, out=tmp_path / "out", store=store)
    (file,) = store.root.glob("entries/*/*/tokens.json")
    rows = json.loads(file.read_text())
    assert len(rows) > 1 and all(row[0] == 1 != row[1] and len(row) <= 512 for row in rows)  # <|im_start|>, its BOS


def test_calls_of_tools_in_calibration_text_have_no_text_of_their_own(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "alarm", "arguments": {"at": "7:00"}}}]}
    turns = [{"role": "user", "content": "wake me"}, call, {"role": "tool", "content": "set"}]
    path = tmp_path / "rows.jsonl"
    for content in ({}, {"content": None}, {"content": ""}):
        turns[1] = call | content
        path.write_text(json.dumps({"messages": turns, "reference": "Done."}) + "\n")
        assert _calibration_text(path) == ("wake me\n\nset\nDone.",)


@pytest.mark.onnx
def test_conversations_of_its_own_are_not_for_onnx(model: Path, text: Path, tmp_path: Path) -> None:
    laptop = profile(tmp_path / "laptop.toml", 'type = "int4"\nrounding = "gptq"', format_="onnx")
    make: dict[str, Any] = {"targets": [laptop], "out": tmp_path / "out", "store": Store(tmp_path / "store")}
    with pytest.raises(UsageError, match="--general is for GGUF files"):
        quantize_model(str(model), types=[], general=4, calibration=text, **make)
    reporter = Noted()
    with pytest.raises(UsageError, match="no choice of types"):  # of the GGUF file; before anything runs
        quantize_model(
            str(model), types=["auto"], size="20 KiB", general=4, calibration=text, reporter=reporter, **make
        )
    assert f"{laptop}: --general is for GGUF files: it goes by --calibration alone" in reporter.notes


def test_a_base_model_has_no_chat_template(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "base")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    make: dict[str, Any] = {"out": tmp_path / "out", "store": Store(tmp_path / "store")}
    laptop = profile(tmp_path / "laptop.toml", 'type = "int4"', format_="onnx")
    with pytest.raises(UsageError, match="proved on chat prompts, and the model has no chat template"):
        quantize_model(str(folder), targets=[laptop], types=[], **make)
    (made,) = quantize_model(str(folder), targets=[], types=["Q4_0"], general=2, **make)
    assert read_info(made.path).chat_template == "" and read_info(made.path).file_type == "Q4_0"


def test_layers_of_a_file_may_differ(model: Path, tmp_path: Path) -> None:
    """Where they do, the header has a list with a number of each layer."""
    import gguf

    reader = gguf.GGUFReader(convert(model, tmp_path / "plain.gguf", dtype="f16").path)
    writer = gguf.GGUFWriter(tmp_path / "lists.gguf", "llama")
    for name, field in reader.fields.items():
        kind, value = field.types[0], field.contents()
        if name.endswith((".head_count", ".head_count_kv", ".feed_forward_length")):
            writer.add_array(name, [value] * 3)
        elif kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make: dict[str, Any] = {"targets": [], "types": ["Q4_0"], "store": Store(tmp_path / "store")}
    lists, plain = (
        quantize_model(str(tmp_path / f"{name}.gguf"), out=tmp_path, **make)[0].path for name in ("lists", "plain")
    )
    assert read_info(lists).of_arch("attention.head_count_kv") == [2, 2, 2]
    assert [one.type for one in read_info(lists).tensors] == [one.type for one in read_info(plain).tensors]


def test_a_missing_runtime_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = quantizing.package_version
    monkeypatch.setattr(quantizing, "package_version", lambda name: "" if "onnx" in name else here(name))
    laptop, store = profile(tmp_path / "laptop.toml", 'type = "int4"', format_="onnx"), Store(tmp_path / "store")
    with pytest.raises(UsageError, match="ONNX needs onnxruntime-genai, which is not installed") as caught:
        quantize_model(str(model), targets=[laptop], types=["Q4_0"], out=tmp_path / "out", store=store)
    assert "edgedistill[onnx]" in caught.value.hint and not list(store.all_keys())


@pytest.mark.parametrize(
    ("kv", "told"),
    [("auto", "no types are chosen for its KV cache"), ("q8_0", "its KV cache is not compared with f16")],
)
def test_a_cache_that_there_is_no_text_for_is_told(kv: str, told: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tiny", num_attention_heads=2, num_key_value_heads=1)
    phone = Path(profile(tmp_path / "phone.toml", 'type = "Q8_0"\n[limits]\npeak_rss = "1 GiB"'))
    phone.write_text(phone.read_text().replace("threads = 1", f'threads = 1\nkv_cache = "{kv}"'))
    reporter = Noted()
    make: dict[str, Any] = {"types": [], "out": tmp_path / "out", "store": Store(tmp_path / "store")}
    quantize_model(str(folder), targets=[str(phone)], reporter=reporter, **make)
    assert f"{phone}: no --calibration FILE to fill the context with, so {told}" in reporter.notes


def test_rounding_that_there_is_no_text_for_is_told(model: Path, tmp_path: Path) -> None:
    phone = profile(tmp_path / "phone.toml", 'type = "Q4_0"\nimatrix = true\nrounding = "gptq"')
    reporter = Noted()
    make: dict[str, Any] = {"types": [], "out": tmp_path / "out", "store": Store(tmp_path / "store")}
    quantize_model(str(model), targets=[phone], reporter=reporter, **make)
    assert f"{phone}: no --calibration FILE: rounded to the nearest value, not by gptq" in reporter.notes


def test_a_machine_without_the_memory_or_the_disk_is_told_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    make: dict[str, Any] = {"targets": [], "types": ["Q4_0"], "store": store, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        host = dataclasses.replace(fingerprint(), memory_bytes=600 << 20)  # torch alone takes more
        patch.setattr("edgedistill.plan.fingerprint", lambda: host)
        with pytest.raises(UsageError, match=r"convert needs about .* of memory; this machine has 600 MiB") as error:
            quantize_model(str(model), **make)
        assert "smaller model" in error.value.hint
    with monkeypatch.context() as patch:
        patch.setattr("edgedistill.runner.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(UsageError, match=r"of disk in .*, 1000 B are free"):
            quantize_model(str(model), **make)
    assert not list((store.root / "entries").glob("*/*"))
    quantize_model(str(model), **make)
    with monkeypatch.context() as patch:  # what is made already needs no room
        patch.setattr("edgedistill.runner.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        quantize_model(str(model), **make)


def test_a_file_that_is_larger_than_its_target_allows_is_told_before_and_after(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = profile(tmp_path / "roomy.toml", 'type = "Q8_0"\n[limits]\nfile_size = "1 MiB"')
    tight = profile(tmp_path / "tight.toml", 'type = "Q8_0"\n[limits]\nfile_size = "120 KiB"')
    least = profile(tmp_path / "least.toml", 'type = "Q8_0"\n[limits]\nfile_size = "20 KiB"')
    reporter, store = Noted(), Store(tmp_path / "store")
    make: dict[str, Any] = {"types": [], "out": tmp_path / "out", "store": store, "reporter": reporter}
    with pytest.raises(UsageError, match=r"least\.toml: limits\.file_size: no type brings this model under 20 KiB"):
        quantize_model(str(model), targets=[roomy, least], **make)
    assert not list(store.all_keys())
    fine, over = quantize_model(str(model), targets=[roomy, tight], **make)
    assert any(
        re.fullmatch(rf"{tight}: Q8_0 makes about [\d.]+ KiB, over its file_size of 120 KiB", one)
        for one in reporter.notes
    )
    assert fine.over == "" and over.path.is_file()
    assert re.fullmatch(rf"{tight}: [\d.]+ KiB is over its file_size of 120 KiB", over.over)

    from edgedistill import cli

    monkeypatch.setattr(quantizing, "quantize_model", lambda *_, **options: [fine, over][: len(options["targets"])])
    for targets, code in ([roomy], 0), ([roomy, tight], 4):
        given = [part for one in targets for part in ("-t", one)]
        monkeypatch.setattr(sys, "argv", ["edgedistill", "quantize", str(model), *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code and "tiny-roomy.gguf" in shown.out
        assert ("over its file_size" in shown.err) == bool(code)


def test_too_small_a_size_names_the_smallest(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no choice of types brings this model under 20 KiB: the smallest makes about"):
        quantize_model(
            str(model),
            targets=[],
            types=["auto"],
            size="20 KiB",
            out=tmp_path,
            calibration=text,
            store=Store(tmp_path / "s"),
        )


def test_a_model_without_text_of_the_task_writes_its_own(model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    make = {"targets": [], "store": store, "out": tmp_path / "out"}
    with pytest.raises(UsageError, match="needs an importance matrix") as caught:
        quantize_model(str(model), types=["IQ2_XS"], **make)
    assert "or --general 64" in (caught.value.hint or "")
    (file,) = quantize_model(str(model), types=["auto"], size="140 KiB", general=6, **make)
    assert file.size <= 140 * 1024
    (written,) = store.root.glob("entries/*/*/general.json")
    found = json.loads(written.read_text())
    assert len(found["tokens"]) == len(found["starts"]) == 6
    (tokens,) = store.root.glob("entries/*/*/tokens.json")
    assert json.loads(tokens.read_text()) == found["tokens"]


def test_a_second_size_makes_only_what_is_new_and_the_same_file(model: Path, text: Path, tmp_path: Path) -> None:
    profile, store = tmp_path / "profile.toml", Store(tmp_path / "store")

    def make(size: int) -> tuple[Path, dict[str, Entry]]:
        profile.write_text(
            'summary = "x"\narch = "x86_64"\n[runtime]\nformat = "gguf"\nengine = "llama.cpp"\nthreads = 1\ncontext = 128\n'
            f'[quantize]\ntype = "auto"\nimatrix = true\nrounding = "gptq"\nsize = {size}\n'
        )
        before = set(store.all_keys())
        (made,) = quantize_model(
            str(model), targets=[str(profile)], types=[], out=tmp_path / f"{size}", calibration=text, store=store
        )
        found = {entry.stage: entry for key in set(store.all_keys()) - before if (entry := store.load(key))}
        return made.path, found

    _, first = make(130_000)
    path, second = make(110_000)
    assert set(second) == {"allocate", "quantize"}
    before, after = (of["quantize"].facts["quantize"] for of in (first, second))
    assert (before["rounding"]["passes"], after["rounding"]["passes"]) == (1, 0)
    assert 0 < after["reused"] < len(after["tensors"])
    types = json.loads((second["allocate"].path / "types.json").read_text())
    quantize(
        first["convert"].path / "model.gguf",
        tmp_path / "alone.gguf",
        named_after(types),
        imatrix=first["sensitivity"].path / "imatrix.gguf",
        types=types,
        feedback=json.loads((first["calibrate-text"].path / "tokens.json").read_text()),
    )
    assert (tmp_path / "alone.gguf").read_bytes() == path.read_bytes()


def test_text_that_no_type_is_calibrated_on_is_told_and_not_run(model: Path, text: Path, tmp_path: Path) -> None:
    laptop, reporter = profile(tmp_path / "laptop.toml", 'type = "Q8_0"\nimatrix = true'), Noted()
    store = Store(tmp_path / "store")
    make: dict[str, Any] = {"out": tmp_path / "out", "store": store, "reporter": reporter}
    quantize_model(str(model), targets=[laptop], types=["Q8_0", "F16"], calibration=text, general=2, **make)
    assert {entry.stage for key in store.all_keys() if (entry := store.load(key))} == {"base", "convert", "quantize"}
    assert reporter.notes == [
        f"left out: --calibration {text} and --general, since no importance matrix is read by {laptop}, Q8_0, F16"
    ]
    reporter.notes.clear()
    quantize_model(str(model), targets=[laptop], types=[], **make)
    assert reporter.notes == []  # nor does it cost accuracy that there is none

    rounded = profile(tmp_path / "rounded.toml", 'type = "Q8_0"\nimatrix = true\nrounding = "gptq"')
    quantize_model(str(model), targets=[rounded], types=["F16"], calibration=text, **make)
    assert list(store.root.glob("entries/*/*/tokens.json")) and reporter.notes == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", '[{"prompt": "wake me", "reference": "Done."}, {"prompt": "and you?"}]'),
        ("rows.csv", 'prompt,reference\nwake me,Done.\n"and you?",\n'),
        ("rows.tsv", "prompt\treference\nwake me\tDone.\nand you?\t\n"),
    ],
)
def test_tables_and_lists_are_calibrated_on_as_rows(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert _calibration_text(path) == ("wake me\nDone.", "and you?\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", '{"a": [1, 2]}', r"rows\.json:1: no messages"),
        ("rows.json", '[{"prompt": "a"},', r"rows\.json:1: malformed JSON"),
        ("rows.json", '"words"', r"rows\.json:1: a row must be a JSON object, not a string"),
        ("rows.json", "[]", r"rows\.json: no rows"),
        ("rows.csv", "a;b\n1;2\n", r"rows\.csv:1: the columns are separated by semicolons"),
        ("rows.csv", "prompt,reference\nwake me\n", r"rows\.csv:2: 1 cells, and the header names 2 columns"),
        ("rows.csv", "", r"rows\.csv: no rows"),
        ("text.txt", " \n", r"text\.txt: empty"),
        ("text.txt", b"\xff\xfe\x00", r"text\.txt: cannot be read as text"),
        ("rows.xlsx", b"PK\x03\x04\x14\x00\xe2", r"rows\.xlsx: cannot be read as text \(not UTF-8 at byte 6\)"),
        ("missing.json", None, r"missing\.json: no such file"),
        ("missing.txt", None, r"missing\.txt: cannot be read as text \(No such file or directory\)"),
    ],
)
def test_calibration_that_cannot_be_read_is_refused_by_file(
    name: str, content: str | bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as caught:
        _calibration_text(path)
    assert caught.value.hint


def test_what_fails_in_a_step_is_said_once(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"cut")
    command = [sys.executable, "-m", "edgedistill", "quantize", str(folder), "--types", "Q8_0", "-o", str(tmp_path)]
    environment = {**os.environ, "EDGEDISTILL_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "not a safetensors file" in done.stderr
