"""A narrower residual stream: what is kept is what the rows use, and where nothing is lost the model says the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.refusals import ROTATABLE
from edgedistill.training.hidden import HiddenStates
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.recipe import load_model
from edgedistill.training.residual import (
    choose_basis,
    keep_tie,
    narrow_residual,
    principal_basis,
    read_basis,
    residual_moments,
    write_basis,
)
from edgedistill.training.shaping import narrowed_config
from tests.unit.formats.gguf.conftest import TEXT, make_model
from tests.unit.training.tiny import VOCAB, make_examples

IDS = torch.arange(24)[None]


def make(family: str = "llama", *, layers: int = 3, seed: int = 0, **config: Any) -> Any:
    """A random model whose norms are not one and whose stream is 48 wide, three heads of 16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **config}))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim == 1:
                weights.copy_(
                    1 + 0.3 * torch.randn_like(weights) if "norm" in name else 0.3 * torch.randn_like(weights)
                )
            else:
                weights.normal_(0, 1.0 / weights.shape[-1] ** 0.5)
    return model.eval()


def flat(model: Any, width: int, seed: int = 3) -> torch.Tensor:
    """Bring a model's residual stream into a random subspace, in place; return its orthonormal basis [H, width].

    The final norm has one gain on each half of the channels, and the subspace is the sum of one in each: it stays there.
    """
    torch.manual_seed(seed)
    half = model.config.hidden_size // 2
    parts = (torch.linalg.qr(torch.randn(half, width // 2, dtype=torch.float64)).Q for _ in range(2))
    basis = torch.block_diag(*parts) @ torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    onto = basis @ basis.T
    with torch.no_grad():
        model.model.norm.weight[:half], model.model.norm.weight[half:] = 1.7, -0.6
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding.double() @ onto)
        for block in model.model.layers:
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.copy_(onto @ part.weight.double())
                if part.bias is not None:
                    part.bias.copy_(onto @ part.bias.double())
    return basis


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ROTATABLE)
@pytest.mark.parametrize("tied", [True, False])
def test_a_stream_that_lies_in_the_basis_gives_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = make(family, tie_word_embeddings=tied)
    basis = flat(model, 32)
    small = narrow_residual(copy.deepcopy(model), keep_tie(basis, model.model.norm.weight.detach()))
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)
    small.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads, loaded.config.head_dim) == (32, 3, 16)
    torch.testing.assert_close(logits(loaded), logits(small), rtol=0, atol=0)


def test_biases_of_what_writes_the_stream_are_projected_too() -> None:
    """At a multiple of the heads the model is a Llama still, and may have them."""
    model = make(hidden_size=48, attention_bias=True, mlp_bias=True)
    basis = flat(model, 24)
    small = narrow_residual(copy.deepcopy(model), keep_tie(basis, model.model.norm.weight.detach()))
    assert small.config.model_type == "llama"
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="a Llama with biases whose hidden size of 32 is no multiple of its 3 heads"):
        narrowed_config(model.config.to_dict(), 32)


def test_the_moments_are_those_of_the_directions_that_the_norms_see() -> None:
    """Against one row at a time in float64; a shared prefix counts in each row."""
    model, examples, layers = make(layers=4), make_examples(9), [0, 2]
    total, count = torch.zeros(48, 48, dtype=torch.float64), 0
    for one in examples:
        caught: list[torch.Tensor] = []
        norms = [
            norm
            for at in layers
            for norm in (model.model.layers[at].input_layernorm, model.model.layers[at].post_attention_layernorm)
        ]
        hooks = [
            norm.register_forward_pre_hook(lambda _m, inputs, caught=caught: caught.append(inputs[0][0].double()))
            for norm in (*norms, model.model.norm)
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([[*one.prompt_ids, *one.completion_ids]]))
        for hook in hooks:
            hook.remove()
        assert len(caught) == 5
        for states in caught:
            unit = states / states.norm(dim=-1, keepdim=True)
            total += unit.T @ unit
        count += one.length
    found = residual_moments(model, examples, layers=layers, batch_size=4)
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-5)
    assert float(found.trace()) == pytest.approx(5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32 - 1), st.data())
def test_no_other_directions_hold_more(size: int, seed: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(30, size, generator=generator, dtype=torch.float64) * torch.rand(size, generator=generator)
    moments = states.T @ states
    basis = principal_basis(moments, width)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width, dtype=torch.float64))
    other = torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64)).Q
    held = (states @ basis).square().sum()
    assert held >= (states @ other).square().sum() - 1e-9
    assert held >= moments.diagonal().topk(width).values.sum() - 1e-9  # nor any choice of channels
    torch.testing.assert_close(basis, principal_basis(moments, width), rtol=0, atol=0)


@pytest.mark.parametrize("width", [32, 48])
def test_the_chosen_basis_loses_less_than_channels_and_keeps_the_tie(width: int) -> None:
    """Against the head untied: what the final norm does in the span is what it did there before; at the full width all of it."""
    model, examples = make(), make_examples(12)
    basis, lost = choose_basis(model, examples, width)
    small = narrow_residual(copy.deepcopy(model), basis)
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    open_ = narrow_residual(untied, basis)
    onto = basis.T @ torch.diag(model.model.norm.weight.detach().double()) @ basis
    torch.testing.assert_close(onto - torch.diag(onto.diagonal()), torch.zeros_like(onto), atol=1e-6, rtol=0)
    if width == 48:
        assert lost == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(open_), logits(model), rtol=1e-4, atol=1e-4)
        return
    moments = residual_moments(model, examples)
    channels = moments.diagonal().topk(width).values.sum() / moments.trace()
    assert 0 < lost < 1 - float(channels)
    off = [(logits(one) - logits(model)).square().mean() for one in (small, open_)]
    assert off[0] < 1.3 * off[1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="the hidden size of this model is 48"):
        choose_basis(make(), make_examples(2), 64)
    with pytest.raises(UsageError, match="no rows to choose the directions by"):
        choose_basis(make(), [], 32)


def far(teacher: Any, student: Any, basis: torch.Tensor | None) -> float:
    guide = HiddenStates(copy.deepcopy(teacher), range(3), basis=None if basis is None else basis.float())
    guide.to("cpu", torch.float32)
    guide.watch(student)
    with packed_mode(student), torch.no_grad():
        batch = make_batch(make_examples(6), packed=True)
        completion_states(student, batch)
        return float(guide.error(batch))


def test_hidden_states_are_compared_in_the_students_basis(tmp_path: Path) -> None:
    teacher = make()
    basis = flat(teacher, 32)
    student = narrow_residual(copy.deepcopy(teacher), basis)
    write_basis(basis, tmp_path)
    read = read_basis(tmp_path)
    assert far(teacher, student, read) == pytest.approx(0, abs=1e-6)
    assert far(teacher, student, torch.linalg.qr(torch.randn(48, 32)).Q) > 0.1
    assert read_basis(tmp_path / "elsewhere") is None
    with pytest.raises(UsageError, match="layers of width 32, the teacher's kept layers are 3 of width 48"):
        far(teacher, student, None)


@pytest.mark.parametrize("family", ROTATABLE)
def test_llama_cpp_reads_it_as_transformers_does_and_gives_it_back(family: str, tmp_path: Path) -> None:
    from edgedistill.data.prompts import Row
    from edgedistill.formats.gguf.check import compare_logits
    from edgedistill.formats.gguf.convert import convert
    from edgedistill.formats.gguf.dequantize import gguf_to_hf
    from edgedistill.training.recipe import copy_tokenizer, encode_rows

    shape: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder, out = make_model(tmp_path / "whole", family, **shape), tmp_path / "small"
    rows = [
        Row(id=str(at), messages=({"role": "user", "content": text},), reference="ok") for at, text in enumerate(TEXT)
    ]
    whole = load_model(folder)
    small = narrow_residual(whole, choose_basis(whole, encode_rows(rows, folder), 64)[0])
    small.save_pretrained(out)
    copy_tokenizer(folder, out)
    converted = convert(out, tmp_path / "small.gguf", dtype="f32")
    report = compare_logits(out, converted.path, [[{"role": "user", "content": text}] for text in TEXT], texts=TEXT)
    assert report.max_diff < 0.05  # llama.cpp keeps keys and values in f16
    gguf_to_hf(converted.path, tmp_path / "again")
    torch.testing.assert_close(logits(load_model(tmp_path / "again").eval()), logits(small), rtol=0, atol=1e-5)
