from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgedistill.training import fused_layer, packing
from edgedistill.training.fused_layer import fusable, fused
from edgedistill.training.lora import LoraSettings, attach
from edgedistill.training.packing import body, completion_states, make_batch, packed_mode
from tests.unit.training.tiny import make_examples, make_llama


def _run(
    model: Any, monkeypatch: pytest.MonkeyPatch, *, fuse: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return the states, every gradient, and the bytes that autograd kept, each storage once."""
    kept: dict[int, int] = {}
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with monkeypatch.context() as patch:
        if not fuse:
            patch.setattr(fused_layer, "FUSABLE", frozenset())
        model.zero_grad()
        with packed_mode(model) as packed, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert packed
            states = completion_states(model, make_batch(make_examples(6, prefix=9), packed=True))
            (states * torch.linspace(-1, 1, states.numel()).view_as(states)).float().sum().backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return states.detach(), grads, sum(kept.values())


def _lora(model: Any, targets: Any = "all-linear") -> Any:
    adapted = attach(model, LoraSettings(rank=4, alpha=8, targets=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def _norms(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


MODES: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model,
    "lora": _lora,
    "lora on some": lambda model: _lora(model, ("q_proj", "v_proj", "down_proj")),
    "lora on gate alone": lambda model: _lora(model, ("gate_proj",)),
    "norms": _norms,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", list(MODES))
def test_the_two_functions_are_the_layer(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODES[mode](make_llama()).to(dtype).train()
    plain, plain_grads, plain_kept = _run(model, monkeypatch, fuse=False)
    fast, grads, kept = _run(model, monkeypatch, fuse=True)
    rough = 2e-5 if dtype == torch.float32 else 0.05
    assert float((fast - plain).norm()) <= rough * float(plain.norm())
    assert grads.keys() == plain_grads.keys()
    for name, right in plain_grads.items():
        assert float((grads[name] - right).norm()) <= rough * float(right.norm()) + 1e-6, name
    trained_whole = mode in ("full", "lora") and dtype == torch.bfloat16
    assert kept < (0.75 if trained_whole else 1.0) * plain_kept


def test_bf16_gradients_are_as_near_to_float32_as_those_of_the_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _run(make_llama().train(), monkeypatch, fuse=False)[1]
    errors = []
    for fuse in (False, True):
        found = _run(make_llama().to(torch.bfloat16).train(), monkeypatch, fuse=fuse)[1]
        errors.append(sum(float((found[name].float() - right).norm() / right.norm()) for name, right in exact.items()))
    assert errors[1] <= 1.1 * errors[0]


def test_what_is_not_exactly_such_a_layer_stays_as_it_is() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert fusable(body(LlamaForCausalLM(LlamaConfig(**shape))).layers[0])
    assert not fusable(body(LlamaForCausalLM(LlamaConfig(**shape, hidden_act="gelu"))).layers[0])
    assert not fusable(body(LlamaForCausalLM(LlamaConfig(**shape, attention_dropout=0.1))).layers[0])
    assert not fusable(body(Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8))).layers[0])  # norms on q and k
    assert not fusable(body(attach(make_llama(), LoraSettings(rank=2, dropout=0.1))).layers[0])


def test_a_switched_off_adapter_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _lora(make_llama())
    examples = make_examples(4)
    with torch.no_grad(), packed_mode(model):
        adapted = completion_states(model, make_batch(examples, packed=True))
        with model.disable_adapter():
            off = completion_states(model, make_batch(examples, packed=True))
    with torch.no_grad(), packed_mode(plain := make_llama()):
        wanted = completion_states(plain, make_batch(examples, packed=True))
    torch.testing.assert_close(off, wanted)
    assert not torch.allclose(adapted, off, atol=1e-3)


def test_layers_are_given_back_and_other_calls_take_the_old_way() -> None:
    model = make_llama()
    layers = body(model).layers
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with fused(layers) as count:
            assert count == len(layers)
            with fused(layers) as again:  # a teacher may be its own student
                assert again == 0
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)
        assert not any("forward" in layer.__dict__ for layer in layers)


def test_rows_too_long_for_it_take_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    examples = make_examples(4)
    with torch.no_grad(), packed_mode(model):
        wanted = completion_states(model, make_batch(examples, packed=True))
        for module in (packing, fused_layer):
            monkeypatch.setattr(module, "fits", lambda *_: False)
        torch.testing.assert_close(completion_states(model, make_batch(examples, packed=True)), wanted)


def test_who_watches_a_part_of_a_layer_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitting a narrow FFN reads what down_proj is given; calibration and healing watch parts as well."""
    model = make_llama()
    seen: list[torch.Tensor] = []
    watched = body(model).layers[1].mlp.down_proj
    hook = watched.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad(), packed_mode(model):
        completion_states(model, make_batch(make_examples(4), packed=True))
        assert len(seen) == 1
        hook.remove()
        completion_states(model, make_batch(make_examples(4), packed=True))
    assert len(seen) == 1


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _lora(make_llama(layers=6)).train()
    states, grads, kept = _run(model, monkeypatch, fuse=fuse)
    packing.causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
    again, regrads, less = _run(model, monkeypatch, fuse=fuse)
    torch.testing.assert_close(again, states, rtol=0, atol=0)
    assert regrads.keys() == grads.keys()
    for name, right in grads.items():
        torch.testing.assert_close(regrads[name], right)
    assert less < 0.6 * kept
