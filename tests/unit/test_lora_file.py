"""Adapters as GGUF LoRA files: llama.cpp with base and file computes what transformers and PEFT do, or nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import Key
from edgedistill.formats.gguf import lora
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.read import read_info
from edgedistill.lora_file import export_lora, of_recipe
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.made_build import make_session

IDS = [[(7 * row + 3 * at * at) % 300 + 3 for at in range(20 + row)] for row in range(3)]
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that makes a model of a family and a trained-looking adapter on it: (model, adapter)."""

    def made(family: str = "llama", *, config: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Path]:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = make_model(tmp_path / family, family, **(config or {}))
        given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(**given)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights.normal_(0, 0.05)
        model.save_pretrained(tmp_path / f"{family}-adapter")
        return folder, tmp_path / f"{family}-adapter"

    return made


def by_peft(model: Path, adapter: Path) -> list[np.ndarray]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    both: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    with torch.inference_mode():
        return [both.eval()(torch.tensor([row])).logits[0].numpy() for row in IDS]


def by_llama_cpp(base: Path, file: Path) -> list[np.ndarray]:
    model = open_model(base, n_ctx=64, lora_path=str(file))
    found = [all_logits(model, row) for row in IDS]
    model.close()
    return found


@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("llama", {}, {}),  # 4 heads, 2 of keys: rows of B are reordered, by another count for each
        ("llama", {}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}}),
        ("qwen2", {}, {}),
        ("gpt2", {"n_inner": 128, "activation_function": "gelu_new"}, {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_base_and_file_compute_what_peft_does(
    make: Make, tmp_path: Path, family: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    model, adapter = make(family, config=config, **options)
    said = export_lora(str(model), adapter, tmp_path / "out.gguf")
    base = convert(model, tmp_path / "base.gguf", dtype="f16").path
    want, got = by_peft(model, adapter), by_llama_cpp(base, tmp_path / "out.gguf")
    spread = float(np.std(want[0]))
    # The base here is in f16: it alone is about a hundredth of the spread away.
    assert max(float(np.abs(a - b).max()) for a, b in zip(want, got, strict=True)) < 0.1 * spread
    assert re.search(r"first choices agree (100\.0|99\.\d)% \(n = \d+ positions\)", said[1])
    assert not list(tmp_path.glob(".base-*")) and not list(tmp_path.glob("*.partial"))


def test_the_file_is_as_llama_cpp_documents_it(make: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model, adapter = make()
    export_lora(str(model), adapter, tmp_path / "out.gguf", name="alarms")
    info = read_info(tmp_path / "out.gguf")
    wanted = {
        "general.type": "adapter", "general.architecture": "llama", "general.name": "alarms", "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }  # fmt: skip
    assert {key: info.metadata[key] for key in wanted} == wanted
    shapes = {tensor.name: tensor.shape for tensor in info.tensors}
    assert len(shapes) == 2 * 7 * 2
    assert shapes["blk.1.attn_k.weight.lora_a"] == (4, 64) and shapes["blk.1.attn_k.weight.lora_b"] == (32, 4)
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (4, 128) and shapes["blk.0.ffn_down.weight.lora_b"] == (64, 4)

    from edgedistill.formats.gguf.read import read_tensor

    saved = load_file(adapter / "adapter_model.safetensors")
    rows = saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    turned = read_tensor(info, "blk.0.attn_q.weight.lora_b")
    # A head has 16 rows: transformers' halves 0..7 and 8..15 become pairs (0, 8), (1, 9), ...
    assert np.array_equal(turned[:4], rows[[0, 8, 1, 9]]) and np.array_equal(turned[16:18], rows[[16, 24]])
    values = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert np.array_equal(read_tensor(info, "blk.0.attn_v.weight.lora_b"), saved[values])


def test_rows_in_the_wrong_order_are_found_and_no_file_is_left(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill.formats.gguf import convert as converter

    model, adapter = make(target_modules=["k_proj"])
    places = converter.places
    forgotten = lambda folder: {name: (to, lambda rows: rows) for name, (to, _) in places(folder).items()}  # noqa: E731
    monkeypatch.setattr(converter, "places", forgotten)
    with pytest.raises(StepFailed, match=r"llama\.cpp makes something else of it than PEFT"):
        export_lora(str(model), adapter, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.partial"))


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_file_has_no_place_for_is_refused_in_words(make: Make, tmp_path: Path) -> None:
    model, adapter = make(target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out.gguf"
    for key, value, why in (
        ("lora_bias", True, "its pairs have biases"),
        ("alora_invocation_tokens", [1, 2], "an activated LoRA"),
        ("lora_alpha", 0, "lora_alpha is 0"),
        ("peft_type", "IA3", "only LORA"),
    ):
        kept = (adapter / "adapter_config.json").read_text()
        edit(adapter, **{key: value})
        with pytest.raises(UsageError, match=why):
            export_lora(str(model), adapter, out)
        (adapter / "adapter_config.json").write_text(kept)
    out.write_bytes(b"")
    with pytest.raises(UsageError, match="is there already"):
        export_lora(str(model), adapter, out)
    with pytest.raises(UsageError, match=r"x\.gguf: cannot be written \(File exists\)"):
        export_lora(str(model), adapter, out / "x.gguf")
    out.unlink()
    with pytest.raises(UsageError, match=r"a \.gguf file") as found:
        export_lora(str(model), adapter, tmp_path / "out.bin")
    assert found.value.hint.endswith("out.gguf")
    assert not out.exists()


def test_dora_is_refused(make: Make, tmp_path: Path) -> None:
    model, adapter = make(use_dora=True)
    with pytest.raises(UsageError, match=r"a DoRA adapter: llama\.cpp adds low-rank pairs") as found:
        export_lora(str(model), adapter, tmp_path / "out.gguf")
    assert "edgedistill merge" in found.value.hint


def test_a_tied_embedding_is_refused(make: Make, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    model, adapter = make(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UsageError, match="no half of a LoRA pair on a linear layer"):
        export_lora(str(model), adapter, tmp_path / "out.gguf")
    path = adapter / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{half}.weight": np.ones((4, 64), np.float32) for half in "AB"}
    save_file(head, path)
    with pytest.raises(UsageError, match="ties its head to its embedding"):
        export_lora(str(model), adapter, tmp_path / "out.gguf")


def test_an_adapter_that_does_nothing_proves_nothing(make: Make, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model, adapter = make()
    path = adapter / "adapter_model.safetensors"
    save_file({k: v * (0 if "lora_B" in k else 1) for k, v in load_file(path).items()}, path)
    with pytest.raises(UsageError, match="nothing is proved"):
        export_lora(str(model), adapter, tmp_path / "out.gguf")
    assert lora.SEEN * 1e-3 < 1  # what is far enough to be seen is far below what an adapter does


def test_the_command_line(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = make(target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "play 7", "reference": "{}"}) + "\n")
    command = ["export", str(adapter), "--to", "gguf-lora"]
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, UsageError) and "--base MODEL" in found.exception.hint
    told = CliRunner().invoke(app, [*command, "--base", str(model), "--rows", "rows.jsonl"])
    assert told.exit_code == 0, told.output
    assert "llama-server -m BASE.gguf --lora llama-adapter-lora.gguf" in told.output
    assert read_info(tmp_path / "llama-adapter-lora.gguf").metadata["general.name"] == "llama-adapter"
    wrong = CliRunner().invoke(app, [*command, "--base", str(model), "--set", "distill.lr=1e-4"])
    assert isinstance(wrong.exception, UsageError) and "--set is for a recipe" in wrong.exception.message
    wrong = CliRunner().invoke(app, ["export", "--to", "unsloth", "--base", str(model)])
    assert isinstance(wrong.exception, UsageError) and "--to gguf-lora" in wrong.exception.message


FITTED = {"files": ["data/train.jsonl"], "skip": 1200, "rows": 200}


@pytest.mark.parametrize("helped", [None, False, True])
def test_an_adapter_does_not_hold_a_temperature(helped: bool | None, tmp_path: Path) -> None:
    session = make_session(tmp_path, keep=lambda name: False, temperature=FITTED)

    def put(key: Key, folder: str, facts: dict[str, Any]) -> None:
        out, _ = session.store.partial(key, {})
        (out / folder).mkdir()
        session.store.commit(key, stage="made", inputs={}, fields={}, facts=facts, seconds=1.0, versions={})

    stage: Any = session.plan.match("merge")[0].stage
    put(stage.student, "model", {})
    put(stage.adapter, "adapter", {})
    if helped is not None:
        temper = {"temperature": 1.25, "helped": helped}
        put(session.plan.match("temper")[0].key, "model", {"temper": temper})
    if helped is False:  # the student stayed as it was
        assert of_recipe(session, None)[1].name == "adapter"
        return
    with pytest.raises(UsageError) as caught:
        of_recipe(session, None)
    if helped is None:
        assert "not known yet whether the student has a temperature" in caught.value.message
        assert caught.value.hint == f"edgedistill build {session.path} --until temper"
    else:
        assert "T = 1.25" in caught.value.message and "final norm" in caught.value.message
        assert "[temperature]" in caught.value.hint
