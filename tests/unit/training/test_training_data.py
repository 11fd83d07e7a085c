from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.training.data import (
    IGNORED,
    Example,
    collate,
    counter_rng,
    encode_example,
    make_batches,
    padding_share,
    token_hash,
    turn_end,
)

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=200)


@given(lengths, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_batches_hold_every_row_once_and_are_a_function_of_seed_and_epoch(
    sizes: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = make_batches(sizes, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == make_batches(sizes, batch_size=batch_size, seed=seed, epoch=epoch)


def test_batches_change_from_epoch_to_epoch_and_pad_little() -> None:
    rng = counter_rng("lengths")
    rows = [Example(str(at), tuple(range(int(rng.integers(20, 200)))), (1,) * 10) for at in range(500)]
    first = make_batches(rows, batch_size=16, seed=0, epoch=0)
    assert first != make_batches(rows, batch_size=16, seed=0, epoch=1)
    assert first != make_batches(rows, batch_size=16, seed=1, epoch=0)
    unsorted = [list(range(at, at + 16)) for at in range(0, 496, 16)]
    assert padding_share(rows, first) < 0.1 < padding_share(rows, unsorted)


def test_batch_size_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        make_batches([1, 2], batch_size=0, seed=0)


rows = st.lists(
    st.tuples(
        st.lists(st.integers(0, 99), min_size=1, max_size=9), st.lists(st.integers(0, 99), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=6,
)


@given(rows, st.sampled_from([1, 4, 16]))
def test_collate_labels_exactly_the_completions(pairs: list[tuple[list[int], list[int]]], pad_to: int) -> None:
    examples = [
        Example(str(at), tuple(prompt), tuple(completion), weight=at + 1.0)
        for at, (prompt, completion) in enumerate(pairs)
    ]
    batch = collate(examples, pad_id=7, pad_to=pad_to)
    assert batch.input_ids.shape[1] % pad_to == 0
    assert int((batch.labels != IGNORED).sum()) == sum(len(one.completion_ids) for one in examples)
    assert batch.attention_mask.sum(1).tolist() == [one.length for one in examples]
    for row, example in enumerate(examples):
        assert batch.input_ids[row, : example.length].tolist() == [*example.prompt_ids, *example.completion_ids]
        assert (batch.input_ids[row, example.length :] == 7).all()
    # The state at t predicts the label at t + 1.
    assert batch.labels[batch.rows, batch.columns + 1].tolist() == batch.targets.tolist()
    assert batch.targets.tolist() == [token for one in examples for token in one.completion_ids]
    assert batch.weights.tolist() == [one.weight for one in examples for _ in one.completion_ids]


def test_a_token_counts_by_its_rows_weight_and_its_own() -> None:
    assert Example("a", (1,), (2, 3), weight=2.0).token_weights == [2.0, 2.0]
    one = Example("a", (1,), (2, 3), weight=2.0, weights=(0.0, 1.5))
    assert collate([one]).weights.tolist() == [0.0, 3.0]
    with pytest.raises(UsageError, match="row 'a': 1 weights for 2 completion tokens"):
        Example("a", (1,), (2, 3), weights=(1.0,))
    with pytest.raises(UsageError, match="row 'a': a weight is negative"):
        Example("a", (1,), (2, 3), weights=(1.0, -1.0))


@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=12))
def test_token_hash_depends_on_where_the_completion_starts(ids: list[int]) -> None:
    hashes = {token_hash(ids[:cut], ids[cut:]) for cut in range(len(ids))}
    assert len(hashes) == len(ids)
    assert token_hash(ids[:1], ids[1:]) == Example("any", tuple(ids[:1]), tuple(ids[1:])).token_hash


def test_counter_rng_is_fixed_for_all_time() -> None:
    """A changed draw would make stored rows and resumed runs disagree: these values must never change."""
    assert counter_rng("generate", 0, "row-1", 2).random(2).tolist() == [0.001654101207621661, 0.5198517326021135]
    assert not np.allclose(counter_rng(1).random(4), counter_rng(2).random(4))


def test_encoding_uses_the_template_and_ends_the_turn(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer) == end
    messages = [{"role": "user", "content": "Wake me at 7"}]
    example = encode_example(tokenizer, messages, '{"name":"set_alarm"}', id="a")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert list(example.prompt_ids) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(example.prompt_ids) == text
    assert example.completion_ids[-1] == end
    assert tokenizer.decode(example.completion_ids[:-1]) == '{"name":"set_alarm"}'
    with pytest.raises(UsageError, match=r"row 'a': .* do not fit a context of 20"):
        encode_example(tokenizer, messages, "x" * 200, id="a", context=20)
    with pytest.raises(UsageError, match="row 'b': the completion is empty"):
        encode_example(tokenizer, messages, "", id="b")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        encode_example(tokenizer, messages, "x", id="c")
