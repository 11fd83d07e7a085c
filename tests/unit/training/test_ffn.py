from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.inputs import NARROWABLE
from edgedistill.training import ffn
from edgedistill.training.ffn import RIDGE, choose_neurons, ffn_width, prune_ffn, second_moments
from edgedistill.training.shaping import prune_depth
from tests.unit.training.tiny import make_examples, make_llama


def naive_moments(model: Any, examples: Any, layer: int) -> torch.Tensor:
    """One row at a time, plain attention, token by token: what the packed pass must give."""
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer]
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, i: seen.update(a=i[0])),
        block.register_forward_hook(lambda _m, _i, o: seen.update(y=o[0] if isinstance(o, tuple) else o)),
    ]
    total, count = torch.zeros(96, 96, dtype=torch.float64), 0
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([[*example.prompt_ids, *example.completion_ids]]))
            for a, y in zip(seen["a"].reshape(-1, 96).double(), seen["y"].reshape(-1, 64).double(), strict=True):
                total += torch.outer(a, a) / y.square().sum()
                count += 1
    for hook in hooks:
        hook.remove()
    return total / count


@pytest.mark.parametrize("prefix", [0, 5])
def test_second_moments_are_those_of_one_row_at_a_time(prefix: int) -> None:
    model, examples = make_llama(3), make_examples(20, prefix=prefix)
    found = second_moments(model, examples, [0, 2], batch_size=6)
    assert sorted(found) == [0, 2]
    for layer in (0, 2):
        torch.testing.assert_close(found[layer].double(), naive_moments(model, examples, layer), rtol=1e-4, atol=1e-6)


def loss_of(moments: torch.Tensor, down: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor) -> float:
    change = down.clone()
    change[:, kept] -= fitted
    return float((change @ moments * change).sum() / (down @ moments * down).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(0, 2**32 - 1), st.data())
def test_the_fit_is_the_least_squares_one(count: int, seed: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(200, count, generator=generator)
    down = torch.randn(7, count, generator=generator)
    moments = activations.T @ activations / 200
    cut = choose_neurons(moments, down, width)
    assert len(cut.kept) == width == len(set(cut.kept.tolist()))
    assert cut.kept.tolist() == sorted(cut.kept.tolist())
    assert cut.lost == pytest.approx(loss_of(moments, down, cut.kept, cut.down), abs=1e-5)
    # ridge regression of the whole output on the kept activations, solved as stacked equations in float64
    ridge = RIDGE * float(moments.diagonal().mean())
    inner = activations[:, cut.kept].double()
    system = torch.cat([inner / 200**0.5, ridge**0.5 * torch.eye(width, dtype=torch.float64)])
    # the ridge pulls the kept columns towards themselves, not towards nothing
    pulled = ridge**0.5 * down[:, cut.kept].T.double()
    wanted = torch.cat([(activations.double() @ down.T.double()) / 200**0.5, pulled])
    torch.testing.assert_close(cut.down.double(), torch.linalg.lstsq(system, wanted).solution.T, rtol=1e-3, atol=1e-3)


def test_neurons_that_others_can_do_go_first() -> None:
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(500, 4, generator=generator)
    # 4, 5: copies of 0 and 1; 6: small but its own
    activations = torch.cat([own, own[:, :2], 0.2 * torch.randn(500, 1, generator=generator)], 1)
    down = torch.randn(5, 7, generator=generator)
    cut = choose_neurons(activations.T @ activations / 500, down, 5)
    assert {2, 3, 6} <= set(cut.kept.tolist())
    assert cut.lost < 1e-4


def test_at_full_width_nothing_changes() -> None:
    model, whole, examples = make_llama(2), make_llama(2), make_examples(8)
    assert prune_ffn(model, examples, 96) == pytest.approx([0, 0], abs=1e-9)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_the_narrow_checkpoint_loads_and_answers_as_before_it_was_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_llama(6)
    lost = prune_ffn(model, make_examples(12), 64, layers=[0, 2, 5])
    assert len(lost) == 3
    assert all(0 < one < 1 for one in lost)
    narrow = prune_depth(model, [0, 2, 5])
    narrow.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.intermediate_size, loaded.config.num_hidden_layers) == (64, 3)
    assert loaded.model.layers[1].mlp.gate_proj.weight.shape == (64, 64)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, narrow(input_ids=ids).logits)


def test_the_fit_is_nearer_to_the_whole_model_than_the_cut_alone() -> None:
    examples = make_examples(40)
    whole, fitted, cut_alone = make_llama(3), make_llama(3), make_llama(3)
    prune_ffn(fitted, examples, 64)
    for layer, block in enumerate(cut_alone.model.layers):
        cut = choose_neurons(second_moments(whole, examples, [layer])[layer], block.mlp.down_proj.weight.detach(), 64)
        gone = [at for at in range(96) if at not in set(cut.kept.tolist())]
        block.mlp.down_proj.weight.data[:, gone] = 0
    far = []
    for model in (fitted, cut_alone):
        with torch.no_grad():
            ids = torch.tensor([[*examples[0].prompt_ids, *examples[0].completion_ids]])
            far.append(float((model(input_ids=ids).logits - whole(input_ids=ids).logits).square().mean()))
    assert far[0] < far[1]


def test_layers_that_do_not_fit_into_memory_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart, examples = make_llama(4), make_llama(4), make_examples(10)
    prune_ffn(together, examples, 32)
    monkeypatch.setattr(ffn, "HELD_BYTES", 4 * 96**2)
    prune_ffn(apart, examples, 32)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text", "smollm3"])
def test_the_other_architectures_that_plan_lets_through(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    assert kind in NARROWABLE
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    assert all(0 < one < 1 for one in prune_ffn(model, make_examples(12), 64))
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.intermediate_size == 64
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_layer_that_never_fires_is_cut_too() -> None:
    cut = choose_neurons(torch.zeros(8, 8), torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), 4)
    assert len(cut.kept) == 4
    assert torch.isfinite(cut.down).all()
    assert cut.lost == 0


def test_what_cannot_be_cut_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, examples = make_llama(2), make_examples(4)
    assert ffn_width(model) == 96
    for width in (0, 97):
        with pytest.raises(UsageError, match="has 96 neurons"):
            prune_ffn(model, examples, width)
    with pytest.raises(UsageError, match="no rows"):
        prune_ffn(model, [], 32)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(UsageError, match="cannot be made narrower"):
        prune_ffn(gpt, examples, 32)
