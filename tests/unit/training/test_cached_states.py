"""Stored hidden states: what comes back is what the teacher gave, in any layout, and training sees no difference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from edgedistill.errors import UsageError
from edgedistill.training.cached_states import (
    CachedFeatures,
    CachedStates,
    join_rows,
    split_rows,
    teachers_hashes,
    write_states,
)
from edgedistill.training.data import Example
from edgedistill.training.features import Features
from edgedistill.training.losses import LossTerms
from edgedistill.training.objectives import FeatureTerms
from edgedistill.training.packing import PackedBatch, completion_states, make_batch, packed_mode
from edgedistill.training.selfcheck import selfcheck
from edgedistill.training.trainer import train
from edgedistill.training.vocabulary import ORIGIN
from tests.unit.training.test_features import EVERY, SETTINGS, wide
from tests.unit.training.tiny import VOCAB, make_examples, make_llama

PAIRS = ((1, 0), (3, 1))
OWN = "hash of the teacher's tokenizer"


def store(folder: Path, examples: list[Example], layers: tuple[int, ...] = (1, 3)) -> CachedStates:
    """Store the states of ``wide`` in two shards."""
    folder.mkdir(exist_ok=True)
    half = len(examples) // 2
    for at, part in enumerate((examples[:half], examples[half:])):
        write_states(folder / f"{at:05d}.safetensors", wide(), part, layers, tokenizer=OWN, batch_tokens=40)
    return CachedStates(folder)


def guide_of(states: CachedStates, examples: list[Example], student: Any, terms: FeatureTerms) -> CachedFeatures:
    keys = teachers_hashes(examples, Path("no checkpoint"), states, tokenizer=OWN)
    return CachedFeatures(states, keys, student, terms, PAIRS)


@given(strategies.lists(strategies.integers(0, 6), min_size=1, max_size=5), strategies.booleans(), strategies.data())
def test_rows_are_cut_out_and_laid_out_again(sizes: list[int], packed: bool, data: Any) -> None:
    shared = tuple(data.draw(strategies.lists(strategies.integers(0, 3), max_size=4)))
    examples = [Example(str(at), (*shared, at), tuple(range(size + 1))) for at, size in enumerate(sizes)]
    batch = make_batch(examples, packed=packed)
    states = torch.randn(*batch.input_ids.shape, 3)
    rows = split_rows(batch, states)
    assert [len(row) for row in rows] == [one.length for one in examples]
    laid = join_rows(batch, rows)
    for row, again in zip(rows, split_rows(batch, laid), strict=True):
        assert torch.equal(row, again)
    if isinstance(batch, PackedBatch):
        real = laid.shape[1] - batch.layout.tail
        assert torch.equal(laid[:, :real], states[:, :real]) and not laid[:, real:].any()


@pytest.mark.parametrize("packed", [True, False])
def test_stored_states_are_compared_as_the_teachers_own(tmp_path: Path, packed: bool) -> None:
    examples, student, teacher = make_examples(10), make_llama(2), wide()
    states = store(tmp_path, examples)
    assert (states.layers, states.width) == ([1, 3], 128)
    terms = replace(EVERY, pairs=PAIRS)
    live, cached = Features(teacher, student, terms), guide_of(states, examples, student, terms)
    part = [examples[at] for at in (7, 2, 9)]
    found = []
    for guide in (live, cached):
        guide.watch(student)
        with torch.no_grad(), packed_mode(student, teacher) if packed else nullcontext():
            batch = make_batch(part, packed=packed)
            completion_states(student, batch)
            if guide is live:
                guide.read(batch)
            found.append({name: float(one) for name, one in guide.sums(batch, part, read=False).items()})
    assert found[0].keys() == found[1].keys() == {"features", "distances", "angles"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=5e-3), name  # bf16
    for at, one in enumerate(examples):
        with torch.no_grad():
            ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
            plain = teacher(input_ids=ids, output_hidden_states=True).hidden_states[2][0]  # behind layer 1
        own = states.row(one.token_hash, 1).float()
        assert torch.allclose(own, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())), at


def test_it_trains_as_with_the_teacher_in_memory(tmp_path: Path) -> None:
    examples = make_examples()
    chosen = replace(SETTINGS, features=replace(EVERY, pairs=PAIRS), loss=LossTerms(kd=0.0, ce=1.0))
    states = store(tmp_path / "states", examples)
    students = [make_llama(2), make_llama(2)]
    guides = [
        Features(wide(), students[0], replace(EVERY, pairs=PAIRS)),
        guide_of(states, examples, students[1], replace(EVERY, pairs=PAIRS)),
    ]
    results = []
    for at, (student, guide) in enumerate(zip(students, guides, strict=True)):
        checks = selfcheck(student, examples, None, terms=chosen.loss, vocab_size=VOCAB, guide=guide)
        assert {"features", "own features"} <= set(checks.differences)
        results.append(train(student, examples, None, settings=chosen, out=tmp_path / str(at), guide=guide))
    live, cached = results
    assert cached.loss == pytest.approx(live.loss, rel=1e-2)
    assert (cached.tokens, cached.steps) == (live.tokens, live.steps)


def test_a_trimmed_students_rows_are_found_by_the_teachers_numbers(tmp_path: Path) -> None:
    import json

    examples = make_examples(6)
    states = store(tmp_path / "states", examples)
    kept = sorted({token for one in examples for token in (*one.prompt_ids, *one.completion_ids)})
    numbers = {token: at for at, token in enumerate(kept)}
    own = [
        Example(
            one.id, tuple(map(numbers.__getitem__, one.prompt_ids)), tuple(map(numbers.__getitem__, one.completion_ids))
        )
        for one in examples
    ]
    (tmp_path / ORIGIN).write_text(json.dumps({"tokenizer": OWN, "kept": kept}))
    other = Example("other", own[0].prompt_ids, (*own[0].completion_ids, 0))  # cut into other pieces: not stored
    keys = teachers_hashes([*own, other], tmp_path, states, tokenizer="of the trimmed one")
    assert keys == {mine.token_hash: theirs.token_hash for mine, theirs in zip(own, examples, strict=True)}
    with pytest.raises(UsageError, match="no row has stored hidden states") as error:
        teachers_hashes([other], tmp_path, states, tokenizer="of the trimmed one")
    assert "student.vocabulary" in str(error.value.hint)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    examples = make_examples(4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "00000.partial").write_bytes(b"cut off")
    with pytest.raises(UsageError, match="no hidden states are stored"):
        CachedStates(tmp_path / "empty")
    states = store(tmp_path / "states", examples, layers=(1,))
    with pytest.raises(UsageError, match=r"layers \[3\] are not stored"):
        guide_of(states, examples, make_llama(2), EVERY)


def test_a_shard_takes_two_bytes_a_value(tmp_path: Path) -> None:
    examples = make_examples(40)
    size = write_states(tmp_path / "0.safetensors", wide(), examples, (0, 1, 2), tokenizer=OWN)
    values = 3 * 128 * sum(one.length for one in examples)
    assert 2 * values < size < 2 * values + 4096
    assert np.isfinite(CachedStates(tmp_path).row(examples[3].token_hash, 2).float().numpy()).all()
