from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.training.shaping import block_influence, choose_layers, most_important, prune_depth
from tests.unit.training.tiny import make_examples, make_llama


@given(st.integers(1, 80), st.data())
def test_evenly_spaced_with_the_first_and_the_last(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    chosen = choose_layers(total, count)
    assert len(chosen) == count == len(set(chosen))
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == total - 1
    gaps = [right - left for left, right in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_ten_of_thirty() -> None:
    assert choose_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert choose_layers(4, [0, 1, 3]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (0, "has 4 layers"),
        (5, "has 4 layers"),
        ([], "0 to 3"),
        ([0, 4], "0 to 3"),
        ([2, 1], "ascending"),
        ([1, 1], "once"),
    ],
)
def test_bad_choices_are_refused(layers: int | list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_layers(4, layers)


def test_the_pruned_checkpoint_loads_and_computes_the_kept_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_llama(6)
    whole = make_llama(6)
    ids = torch.arange(12)[None]
    pruned = prune_depth(model, 3)
    assert pruned.config.num_hidden_layers == 3
    pruned.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)
        cached = loaded.generate(ids, max_new_tokens=5, do_sample=False)  # the cache is indexed by layer_idx
        free = ids
        for _ in range(5):
            free = torch.cat([free, loaded(input_ids=free, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert cached.tolist() == free.tolist()
    for new, old in enumerate([0, 2, 5]):
        torch.testing.assert_close(
            loaded.model.layers[new].mlp.up_proj.weight, whole.model.layers[old].mlp.up_proj.weight
        )


def test_per_layer_lists_of_the_config_are_cut_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=kinds,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = prune_depth(Gemma3ForCausalLM(config), [0, 2])
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == ["sliding_attention", "full_attention"]
    assert len(loaded.model.layers) == 2


def test_the_influence_of_a_block_is_how_far_it_turns_the_states() -> None:
    """Against transformers' own hidden states, row by row; a layer that adds nothing has none."""
    model = make_llama(layers=4)
    with torch.no_grad():
        for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            part.weight.zero_()
    examples = make_examples(7)
    found = block_influence(model, examples, batch_size=3)
    totals, count = torch.zeros(4, dtype=torch.float64), 0
    for one in examples:
        caught: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda _module, inputs, output, caught=caught: caught.append(
                    (1 - torch.cosine_similarity(inputs[0], output if torch.is_tensor(output) else output[0], dim=-1))[
                        0, 1:
                    ]
                )
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([[*one.prompt_ids, *one.completion_ids]]))
        for hook in hooks:
            hook.remove()
        totals += torch.stack([each.sum() for each in caught]).double()
        count += one.length - 1
    assert found == pytest.approx((totals / count).tolist(), rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert 2 not in most_important(found, 3)


def test_the_most_important_layers_come_in_their_order() -> None:
    assert most_important([0.4, 0.1, 0.3, 0.4], 3) == [0, 2, 3]
    assert most_important([0.2, 0.2, 0.2], 2) == [0, 1]
