"""Export to other trainers and back: what they are told is what the recipe says, and what they train merges, or is refused."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.errors import UsageError
from edgedistill.export import TOOLS, export
from edgedistill.merge_adapter import check_adapter, merge_adapter
from edgedistill.session import Session
from tests.unit.formats.gguf.conftest import make_model
from tests.unit.made_build import make_session

yaml = pytest.importorskip("yaml")
RECIPE: dict[str, Any] = {
    "distill__lr": 2e-5,
    "distill__epochs": 2.0,
    "distill__accumulate": 2,
    "distill__schedule": "constant",
    "distill__lora": {"rank": 4, "alpha": 8, "rslora": True},
}
ROWS = [
    {"id": f"r{n}", "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
     {"role": "user", "content": f"play {n}"}], "text": f'{{"n":{n}}}', "reference": None}
    for n in range(20)
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("export") / "tiny")


def built(folder: Path, model: Path, **overrides: Any) -> Session:
    """Make a quickstart whose student before distilling, and kept rows, are there."""
    import shutil

    session = make_session(folder, keep=lambda name: False, **{**RECIPE, **overrides})
    stage: Any = session.plan.match("distill/1")[0].stage
    for key in (stage.student, stage.kept):
        out, _ = session.store.partial(key, {})
        if key == stage.kept:
            (out / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        else:
            shutil.copytree(model, out / "model")
        session.store.commit(key, stage="made", inputs={}, fields={}, facts={}, seconds=1.0, versions={})
    return session


def test_every_tool_is_told_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    session = built(tmp_path, tiny_folder)
    found = {}
    for tool in ("axolotl", "ms-swift"):
        model, rows, path = export(session, tool, tmp_path / tool)
        assert (model / "config.json").is_file() and (model / "tokenizer.json").is_file()
        text = path.read_text()
        assert "teacher's distributions (12 ids a token, weight 0.7)" in text and "edgedistill merge model" in text
        found[tool] = yaml.safe_load(text)
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        assert [line["messages"][-1]["content"] for line in lines] == [row["text"] for row in ROWS]
        assert [turn["role"] for turn in lines[0]["messages"]] == ["user", "assistant", "user", "assistant"]
        trained = [turn.get("train") for turn in lines[0]["messages"]]
        assert trained == ([False, False, False, True] if tool == "axolotl" else [None] * 4)
    axolotl, swift = found["axolotl"], found["ms-swift"]
    names = {
        "lora_r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "peft_use_rslora": "use_rslora",
        "peft_use_dora": "use_dora",
        "sequence_len": "max_length",
        "num_epochs": "num_train_epochs",
        "micro_batch_size": "per_device_train_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "learning_rate": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "warmup_steps": "warmup_steps",
        "adam_beta2": "adam_beta2",
        "max_grad_norm": "max_grad_norm",
        "optimizer": "optim",
        "seed": "seed",
    }
    assert {a: axolotl[a] for a in names} == {a: swift[b] for a, b in names.items()}
    assert axolotl["learning_rate"] == 2e-5 and (axolotl["micro_batch_size"], axolotl["warmup_steps"]) == (4, 1)
    assert axolotl["lr_scheduler"] == "constant_with_warmup" and axolotl["lora_r"] == 4
    assert (
        axolotl["eot_tokens"] == ["<|im_end|>"]
        and swift["template"] == "chatml"
        and swift["loss_scale"] == "last_round"
    )
    (data,) = axolotl["datasets"]
    assert (data["path"], data["type"], data["message_field_training"]) == ("rows.jsonl", "chat_template", "train")
    assert data["roles_to_train"] == []
    assert axolotl["lora_target_linear"] is True and swift["target_modules"] == ["all-linear"]
    with pytest.raises(UsageError, match="not empty"):
        export(session, "axolotl", tmp_path / "axolotl")
    with pytest.raises(UsageError, match="there is no such format"):
        export(session, "trl", tmp_path / "trl")


def test_the_verb_says_what_to_build_first(tmp_path: Path) -> None:
    session = make_session(tmp_path, keep=lambda name: False)
    with pytest.raises(UsageError, match="heal is not built yet") as error:
        export(session, "axolotl", tmp_path / "out")
    assert error.value.hint and "--until heal" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_full_training_has_no_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    session = built(tmp_path, tiny_folder, distill__method="full", distill__think_weight=1.0)
    found = {tool: export(session, tool, tmp_path / tool)[2].read_text() for tool in TOOLS}
    assert not any("lora_" in text for text in found.values())
    assert "'full_finetuning': True" in found["unsloth"] and 'tuner_type: "full"' in found["ms-swift"]


def test_what_the_script_trains_is_what_we_would_and_merges(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the exported script on TRL, with Unsloth's model class played by transformers and PEFT; merge its adapter."""
    pytest.importorskip("trl")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgedistill.training.recipe import load_kept

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            assert options["load_in_4bit"] is False
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(path)

        @staticmethod
        def get_peft_model(model: Any, **options: Any) -> Any:
            assert options.pop("random_state") == 0 and options.pop("use_gradient_checkpointing") is False
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))

    module: Any = types.ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel
    monkeypatch.setitem(sys.modules, "unsloth", module)
    session = built(tmp_path, tiny_folder, distill__lr=1e-2)
    folder = tmp_path / "out"
    export(session, "unsloth", folder)
    monkeypatch.chdir(folder)
    made = runpy.run_path("train.py")
    kept = session.store.entry_path(session.plan.match("distill/1")[0].stage.kept) / "kept.jsonl"  # pyright: ignore
    for row, example in zip(made["rows"], load_kept(kept, tiny_folder)[0], strict=True):
        assert row["input_ids"] == [*example.prompt_ids, *example.completion_ids]
        assert row["labels"] == [*[-100] * len(example.prompt_ids), *example.completion_ids]
    steps = made["trainer"].state
    assert steps.global_step == 6  # 2 epochs of 20 rows, 8 a step
    report = merge_adapter(str(folder / "model"), folder / "adapter", tmp_path / "merged")
    assert report.max_logit_difference < 1e-3
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tiny_folder, tmp_path / "merged")
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before[name], after[name]) and (tmp_path / "merged" / "tokenizer.json").is_file()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "play 7", "reference": "{}"}) + "\n")
    command = ["merge", str(folder / "model"), str(folder / "adapter"), "-o", str(tmp_path / "again")]
    told = CliRunner().invoke(app, [*command, "--rows", str(tmp_path / "rows.jsonl")])
    assert told.exit_code == 0, told.output
    assert "largest logit difference" in told.output and "edgedistill quantize" in told.output


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.training.lora import LoraSettings, attach

    model = attach(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), LoraSettings(rank=2))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(adapter: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_adapters_that_do_not_fit_are_refused(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    import torch

    assert check_adapter(tiny_folder, adapter)["r"] == 2
    other = make_model(tmp_path / "wider", hidden_size=128)
    with pytest.raises(
        UsageError, match=r"has the shape \[64, 2\], and model\.layers\.0\.mlp\.down_proj of .* is \[128, 128\]"
    ):
        check_adapter(other, adapter)
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"model\.layers\.1\..* is no layer of"):
        check_adapter(shallow, adapter)
    retensor(adapter, lambda found: {**found, "base_model.model.lm_head.lora_A.weight": torch.ones(2, 64)})
    with pytest.raises(UsageError, match="ties its head to its embedding"):
        check_adapter(tiny_folder, adapter)
    retensor(adapter, lambda found: {"base_model.model.model.embed_tokens.weight": torch.ones(4, 64)})
    with pytest.raises(UsageError, match="no half of a LoRA pair"):
        check_adapter(tiny_folder, adapter)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cut short"):
        check_adapter(tiny_folder, adapter)
    edit(adapter, peft_type="IA3")
    with pytest.raises(UsageError, match="a IA3 adapter; only LORA"):
        check_adapter(tiny_folder, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        check_adapter(tiny_folder, adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"adapter_config\.json: a JSON object was expected"):
        check_adapter(tiny_folder, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="is a pickle, and is not read"):
        check_adapter(tiny_folder, adapter)
    with pytest.raises(UsageError, match="not a PEFT adapter"):
        check_adapter(tiny_folder, tmp_path)


def test_the_command_line_refuses_in_one_message(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        merge_adapter(str(tiny_folder), adapter, tmp_path / "full")
    found = CliRunner().invoke(app, ["merge", str(tiny_folder), str(tmp_path / "nothing"), "-o", str(tmp_path / "out")])
    assert isinstance(found.exception, UsageError) and "adapter_config.json" in found.exception.message
    assert not (tmp_path / "out").exists()


def test_a_recipes_adapter_becomes_a_file_beside_its_own_base(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    import shutil

    from edgedistill.formats.gguf.read import read_info
    from edgedistill.lora_file import export_lora, of_recipe

    session = built(tmp_path / "recipe", tiny_folder)
    with pytest.raises(UsageError, match="the adapter is not built yet") as found:
        of_recipe(session, None)
    assert "--until merge" in found.value.hint
    with pytest.raises(UsageError, match="a recipe names its own"):
        of_recipe(session, "path:elsewhere")
    stage: Any = session.plan.match("merge")[0].stage
    retensor(adapter, lambda saved: {key: value + 0.05 * ("lora_B" in key) for key, value in saved.items()})
    out, _ = session.store.partial(stage.adapter, {})
    shutil.copytree(adapter, out / "adapter")
    session.store.commit(stage.adapter, stage="made", inputs={}, fields={}, facts={}, seconds=1.0, versions={})
    model, trained = of_recipe(session, None)
    export_lora(str(model), trained, tmp_path / "out.gguf", name="quickstart")
    assert read_info(tmp_path / "out.gguf").metadata["adapter.lora.alpha"] == 32.0
    with pytest.raises(UsageError, match='"full" trains no adapter'):
        of_recipe(built(tmp_path / "full", tiny_folder, distill__method="full"), None)
