from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.training import fused_layer, packing
from edgedistill.training.data import Example
from edgedistill.training.packing import common_prefix, completion_states, make_batch, pack, packable, packed_mode
from tests.unit.training.tiny import make_examples, make_llama


def _models() -> dict[str, Any]:
    import transformers as tf

    grouped: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    small: dict[str, Any] = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    quiet: dict[str, Any] = {
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**grouped)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**grouped, head_dim=16)),
        "mistral, window 7": lambda: tf.MistralForCausalLM(tf.MistralConfig(**grouped, sliding_window=7)),
        "gemma3, window 7": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**grouped, head_dim=16, sliding_window=7)),
        "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**grouped)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**small, **quiet)),
    }


@pytest.mark.parametrize("short", [True, False], ids=["short rows", "torch's kernel"])
@pytest.mark.parametrize("prefix", [0, 9], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("name", sorted(_models()))
def test_flat_batches_equal_padded_ones(name: str, prefix: int, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and every gradient, for each family: rows see themselves and the prefix, and nothing else."""
    for module in (packing, fused_layer):
        monkeypatch.setattr(module, "fits", lambda *_: short)
    torch.manual_seed(0)
    model = _models()[name]().eval()
    examples = make_examples(6, prefix=prefix)
    results = []
    for flat in (False, True):
        model.zero_grad()
        with packed_mode(model) as packed:
            assert packed
            batch = make_batch(examples, packed=flat)
            if isinstance(batch, packing.PackedBatch):
                assert batch.layout.tail > 0  # tokens that no row may see are part of what is compared
            else:
                model.set_attn_implementation("sdpa")
            states = completion_states(model, batch)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        results.append((states.detach(), [one.grad.clone() for one in model.parameters() if one.grad is not None]))
    (plain, plain_grads), (states, grads) = results
    torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-5)
    for left, right in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * max(1.0, float(right.abs().max())))


def test_batches_of_about_the_same_size_have_the_same_shapes() -> None:
    """oneDNN compiles a kernel for each shape of a product: ragged rows must not bring new ones in every step."""
    shapes = set()
    for lengths in ((9, 21, 30), (12, 20, 27), (10, 25, 29)):
        batch = pack([Example(str(at), (5, 6, 7, at), (8,) * length) for at, length in enumerate(lengths)])
        shapes.add((batch.input_ids.shape[1], len(batch.layout.pad_index)))
    assert shapes == {(80, 3 * 32)}


def test_a_batch_serves_models_that_group_their_heads_differently() -> None:
    """A dense teacher reads the student's batch first, and leaves its masks there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    models = [make_llama()]
    config = models[0].config.to_dict() | {"num_key_value_heads": 4}
    models.append(LlamaForCausalLM(LlamaConfig(**config)).eval())
    examples = make_examples(5, prefix=7)
    with torch.no_grad():
        shared = make_batch(examples, packed=True)
        for model in models:
            with packed_mode(model):
                states = completion_states(model, shared)
                torch.testing.assert_close(states, completion_states(model, make_batch(examples, packed=True)))


def test_the_mode_is_left_as_it_was() -> None:
    model = make_llama()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), packed_mode(model):
        assert model.config._attn_implementation == packing.ATTENTION
        raise RuntimeError
    assert model.config._attn_implementation == before
    assert "edgedistill" not in model.config.to_json_string()


def test_models_that_flat_batches_do_not_fit_are_padded() -> None:
    model = make_llama()
    model.config.model_type = "gpt_neox"
    assert not packable(model)
    with packed_mode(model) as packed:
        assert not packed
    examples = make_examples(5)
    padded = completion_states(model, make_batch(examples, packed=False))
    assert padded.shape[0] == sum(len(one.completion_ids) for one in examples)


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
def test_pack_keeps_positions_targets_and_order(pairs: list[tuple[list[int], list[int]]]) -> None:
    """Few distinct ids make long shared prefixes, identical rows and rows that begin with another."""
    examples = [Example(str(at), tuple(one), tuple(two)) for at, (one, two) in enumerate(pairs)]
    batch = pack(examples)
    flat, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    prefix = batch.layout.prefix
    assert prefix <= min(len(one.prompt_ids) for one in examples) - 1 or len(examples) == 1
    start = prefix
    for example, count in zip(examples, batch.layout.counts, strict=True):
        own = [*example.prompt_ids, *example.completion_ids]
        assert flat[:prefix] + flat[start : start + count] == own
        assert positions[start : start + count] == list(range(prefix, len(own)))
        start += count
    assert len(flat) == len(positions) == start + batch.layout.tail and len(flat) % packing.ROUND == 0
    assert batch.layout.tail < packing.ROUND and not any(positions[start:])
    assert batch.targets.tolist() == [token for one in examples for token in one.completion_ids]
    at = 0
    for example in examples:
        for shift in range(len(example.completion_ids)):
            assert positions[int(batch.index[at])] == len(example.prompt_ids) + shift - 1
            at += 1


@given(st.lists(ids, min_size=1, max_size=5))
def test_common_prefix(sequences: list[list[int]]) -> None:
    count = common_prefix(sequences)
    assert all(one[:count] == sequences[0][:count] for one in sequences)
    longer = [tuple(one[: count + 1]) for one in sequences]
    assert len(set(longer)) > 1 or any(len(one) <= count for one in sequences)
