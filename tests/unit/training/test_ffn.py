from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.refusals import NARROWABLE
from edgedistill.training.ffn import RIDGE, choose_neurons, ffn_width, prune_ffn
from edgedistill.training.shaping import prune_depth
from tests.unit.training.tiny import make_examples, make_llama


def states_of(model: Any, example: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run one row alone, with plain attention: each layer's FFN activations and output, token by token."""
    activations: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    hooks = []
    for block in model.model.layers:
        hooks.append(block.mlp.down_proj.register_forward_pre_hook(lambda _m, i: activations.append(i[0][0].double())))
        hooks.append(
            block.register_forward_hook(
                lambda _m, _i, o: outputs.append((o[0] if isinstance(o, tuple) else o).squeeze(0).double())
            )
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[*example.prompt_ids, *example.completion_ids]]))
    for hook in hooks:
        hook.remove()
    return activations, outputs


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3]])
def test_every_layer_is_fitted_to_the_teacher_on_what_the_cut_ones_leave(prefix: int, layers: list[int]) -> None:
    """Against one row at a time in float64: each output matrix is the ridge regression of the teacher's states, given
    the layers that were cut before.
    """
    whole, examples = make_llama(4), make_examples(20, prefix=prefix)
    cut = make_llama(4)
    errors = prune_ffn(cut, examples, 48, layers=layers, batch_size=6)
    narrow = prune_depth(cut, layers)
    ends = [*layers[1:], 4]
    for order, (at, end) in enumerate(zip(layers, ends, strict=True)):
        before = prune_depth(make_llama(4), layers)  # layers before this one are cut, this one is whole
        for done in range(order):
            before.model.layers[done] = narrow.model.layers[done]
        rows, wanted, moments, off, count = [], [], torch.zeros(96, 96, dtype=torch.float64), 0.0, 0
        for example in examples:
            teacher = states_of(whole, example)[1][end - 1]
            activations, outputs = states_of(before, example)
            share = teacher.norm(dim=1, keepdim=True)
            after = states_of(narrow, example)[1][order]
            off += float(((after - teacher).norm(dim=1, keepdim=True) / share).square().sum())
            count += len(teacher)
            down = whole.model.layers[at].mlp.down_proj.weight.double()
            owed = teacher - outputs[order] + activations[order] @ down.T
            rows.append(activations[order] / share)
            wanted.append(owed / share)
            moments += rows[-1].T @ rows[-1]
        ridge = RIDGE * float(moments.diagonal().mean())
        kept = [
            next(i for i in range(96) if torch.equal(whole.model.layers[at].mlp.gate_proj.weight[i], row))
            for row in narrow.model.layers[order].mlp.gate_proj.weight
        ]
        pulled = ridge**0.5 * down[:, kept].T
        system = torch.cat([torch.cat(rows)[:, kept], ridge**0.5 * torch.eye(48, dtype=torch.float64)])
        solved = torch.linalg.lstsq(system, torch.cat([*wanted, pulled])).solution.T
        found = narrow.model.layers[order].mlp.down_proj.weight.detach().double()
        torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-4)
        assert errors[order] == pytest.approx(off / count, rel=1e-3)


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
    own_moments = activations.T @ activations / 500
    cut = choose_neurons(own_moments, down, 5)
    assert {2, 3, 6} <= set(cut.kept.tolist())
    assert loss_of(own_moments, down, cut.kept, cut.down) < 1e-4


def test_at_full_width_nothing_changes() -> None:
    model, whole, examples = make_llama(2), make_llama(2), make_examples(8)
    assert prune_ffn(model, examples, 96) == pytest.approx([0, 0], abs=1e-6)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=1e-4)


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
    for block, narrow in zip(cut_alone.model.layers, fitted.model.layers, strict=True):
        kept = [row.tolist() for row in narrow.mlp.gate_proj.weight]
        gone = [at for at, row in enumerate(block.mlp.gate_proj.weight) if row.tolist() not in kept]
        assert len(gone) == 96 - 64
        block.mlp.down_proj.weight.data[:, gone] = 0
    far = []
    for model in (fitted, cut_alone):
        with torch.no_grad():
            ids = torch.tensor([[*examples[0].prompt_ids, *examples[0].completion_ids]])
            far.append(float((model(input_ids=ids).logits - whole(input_ids=ids).logits).square().mean()))
    assert far[0] < far[1]


def test_a_model_that_fails_in_the_middle_is_left_as_it_was() -> None:
    model, whole, examples = make_llama(3), make_llama(3), make_examples(8)

    def stop(done: int, _total: int, _note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_ffn(model, examples, 64, progress=stop)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)


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
