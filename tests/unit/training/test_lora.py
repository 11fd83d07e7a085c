from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training import fast_lora
from edgedistill.training.lora import LoraSettings, attach, check_targets, merge
from edgedistill.training.packing import body
from tests.unit.training.tiny import make_llama

ROWS = [list(range(1, 20)), list(range(40, 70))]


def _adapted(tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_llama()
    model.save_pretrained(base)
    wrapped = attach(model, LoraSettings(rank=4, alpha=8, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(adapter)
    return base, adapter


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_merge_is_exact(tmp_path: Path, variant: dict[str, bool]) -> None:
    base, adapter = _adapted(tmp_path, **variant)
    report = merge(base, adapter, tmp_path / "merged", rows=ROWS)
    assert report.max_logit_difference < 1e-4
    assert report.top1_agreement == 1.0
    assert report.positions == 47  # of 49: the first token of each row is the attention sink
    assert {file.name for file in (tmp_path / "merged").iterdir()} >= {"config.json", "model.safetensors"}
    assert not list((tmp_path / "merged").glob("*.bin"))
    assert json.loads(json.dumps(report.to_json()))["dtype"] == "float32"


def test_a_row_of_one_token_is_compared_too(tmp_path: Path) -> None:
    base, adapter = _adapted(tmp_path)
    report = merge(base, adapter, tmp_path / "merged", rows=[[5], [6, 7]])
    assert report.positions == 2
    assert report.logit_scale > 0


@pytest.mark.parametrize("times", [1, 30_000])
def test_rounding_is_held_against_the_spread_of_the_logits(tmp_path: Path, times: float) -> None:
    base, adapter = _adapted(tmp_path)
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(times)
    model.save_pretrained(base)
    report = merge(base, adapter, tmp_path / "merged", rows=ROWS)
    assert (report.max_logit_difference > 1e-3) == (times > 1)
    assert report.tolerance == pytest.approx(1e-3 * max(1.0, report.logit_scale))


def test_a_forgotten_adapter_is_more_than_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _adapted(tmp_path)
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(30_000)
    model.save_pretrained(base)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(StepFailed, match="differs from base"):
        merge(base, adapter, tmp_path / "merged", rows=ROWS)


def test_merge_to_bf16_says_what_the_rounding_costs(tmp_path: Path) -> None:
    base, adapter = _adapted(tmp_path)
    report = merge(base, adapter, tmp_path / "merged", rows=ROWS, dtype="bfloat16", tolerance=10.0)
    assert 1e-4 < report.mean_logit_difference < 0.2 * report.logit_scale


def test_the_variants_are_what_they_are_called() -> None:
    plain, rank = (
        attach(make_llama(), LoraSettings(rank=16, alpha=8)),
        attach(make_llama(), LoraSettings(rank=16, alpha=8, rslora=True)),
    )
    one, other = (body(model).layers[0].mlp.up_proj.scaling["default"] for model in (plain, rank))
    assert (one, other) == (0.5, 2.0)
    dora = attach(make_llama(), LoraSettings(rank=4, dora=True))
    names = [name for name, parameter in dora.named_parameters() if parameter.requires_grad]
    assert sum("magnitude" in name for name in names) == 21
    assert fast_lora.speed_up(dora) == 0  # no plain sum: PEFT's own forward stays


def test_a_merge_that_disagrees_fails_and_leaves_nothing(tmp_path: Path) -> None:
    base, adapter = _adapted(tmp_path)
    with pytest.raises(StepFailed, match="differs from base"):
        merge(base, adapter, tmp_path / "merged", rows=ROWS, dtype="bfloat16", tolerance=1e-6)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_nan_does_not_merge(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = _adapted(tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, file)
    with pytest.raises(StepFailed, match="does not merge"):
        merge(base, adapter, tmp_path / "merged", rows=ROWS)
    with pytest.raises(UsageError, match="no token rows"):
        merge(base, adapter, tmp_path / "merged", rows=[])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_head_and_embedding_of_a_tied_model_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="ties its head to its embedding"):
        check_targets({"tie_word_embeddings": True}, ["q_proj", name])
    with pytest.raises(UsageError, match="decoder"):
        check_targets({"tie_word_embeddings": False}, ["q_proj", name])
    with pytest.raises(UsageError, match="ties its head"):
        attach(make_llama(), LoraSettings(targets=("q_proj", name)))


def test_other_targets() -> None:
    check_targets({"tie_word_embeddings": True}, "all-linear")
    check_targets({"tie_word_embeddings": True}, ["q_proj", "down_proj"])
    for bad in ([], "q_proj"):
        with pytest.raises(UsageError, match="all-linear"):
            check_targets({}, bad)
    with pytest.raises(UsageError, match=r"\['nope'\]"):
        attach(make_llama(), LoraSettings(targets=("nope",)))
    with pytest.raises(UsageError, match=r"lora\.rank = 0"):
        attach(make_llama(), LoraSettings(rank=0))


def test_all_linear_leaves_the_head_alone_and_the_seed_decides() -> None:
    one, two, other = (attach(make_llama(), LoraSettings(rank=2), seed=seed) for seed in (3, 3, 4))
    names = [name for name, value in one.named_parameters() if value.requires_grad]
    assert len(names) == 3 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in names)
    tensors = [dict(model.named_parameters()) for model in (one, two, other)]
    first = next(name for name in names if "lora_A" in name)
    assert torch.equal(tensors[0][first], tensors[1][first])
    assert not torch.equal(tensors[0][first], tensors[2][first])


def test_check_targets_needs_no_torch() -> None:
    code = (
        "import sys; from edgedistill.training.lora import check_targets;"
        "check_targets({}, 'all-linear'); assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_layer_is_the_same_layer(dtype: torch.dtype) -> None:
    model = attach(make_llama(), LoraSettings(rank=4, alpha=8)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(30).view(2, 15)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return out.logits.detach(), [one.grad.clone() for one in model.parameters() if one.grad is not None]

    plain, plain_grads = run()
    assert fast_lora.speed_up(model) == 21
    fast, fast_grads = run()
    assert len(fast_grads) == len(plain_grads) == 42
    rough = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(fast, plain, rtol=rough, atol=rough)
    for left, right in zip(fast_grads, plain_grads, strict=True):
        assert float((left - right).norm()) <= rough * float(right.norm()) + 1e-6
    fast_lora.restore(model)
    assert torch.equal(run()[0], plain)


def test_dropout_and_other_layers_keep_pefts_own_forward() -> None:
    assert fast_lora.speed_up(attach(make_llama(), LoraSettings(rank=2, dropout=0.1))) == 0
