from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.teachers.decode import decode, draw
from edgedistill.teachers.plain_decode import plain_decode
from edgedistill.teachers.protocol import Answer, Sampling, Teacher
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.data import Example, counter_rng
from edgedistill.training.packing import packed_mode
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

STOP = 1


class Tokenizer:
    """A tokenizer over ids: enough for prompts that are token ids."""

    chat_template = None
    eos_token_id = STOP

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def teacher() -> TransformersTeacher:
    return TransformersTeacher("tiny", "float32", model=make_llama(), tokenizer=Tokenizer())


def _prompts(count: int = 13, prefix: int = 4) -> list[list[int]]:
    rng = counter_rng("prompts")
    shared = rng.integers(2, VOCAB, prefix).tolist()
    return [[*shared, *rng.integers(2, VOCAB, 1 + at % 7).tolist()] for at in range(count)]


def _alone(model: Any, prompt: list[int], count: int, stop: set[int]) -> tuple[list[int], float]:
    """Decode greedily without any cache: the plainest way there is."""
    ids, total = list(prompt), 0.0
    for _ in range(count):
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], -1)
        token = int(logp.argmax())
        total += float(logp[token])
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :], total


def test_it_is_a_teacher(teacher: TransformersTeacher) -> None:
    assert isinstance(teacher, Teacher)


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_greedy_is_the_plainest_decoding(teacher: TransformersTeacher, batch_size: int | None) -> None:
    """Rows of other lengths, stops at other steps, rows that leave the batch: the same tokens and log-probabilities."""
    prompts = _prompts()
    free = [_alone(teacher.model, prompt, 12, set())[0] for prompt in prompts]
    stop = free[0][3]  # a token that some rows write at some point
    teacher.tokenizer.eos_token_id = stop
    teacher.model.generation_config.eos_token_id = None
    answers = list(teacher.generate(prompts, sampling=Sampling(max_new_tokens=12), batch_size=batch_size))
    assert sorted(one.index for one in answers) == list(range(13))
    ends = set()
    for answer in answers:
        tokens, total = _alone(teacher.model, prompts[answer.index], 12, {stop})
        assert list(answer.token_ids) == tokens
        assert answer.logprob == pytest.approx(total, abs=1e-3)
        assert answer.finish_reason == ("stop" if len(tokens) < 12 else "length")
        assert answer.text == " ".join(map(str, tokens))
        ends.add(len(tokens))
    assert len(ends) > 1


def test_the_plain_way_decodes_the_same(teacher: TransformersTeacher) -> None:
    prompts = _prompts()
    uniforms = np.stack([counter_rng(at).random(10, dtype=np.float32) for at in range(13)])
    for temperature in (0.0, 0.8):
        kwargs: dict[str, Any] = {
            "stop_ids": [STOP],
            "max_new_tokens": 10,
            "vocab_size": VOCAB,
            "temperature": temperature,
            "top_p": 0.9,
            "uniforms": uniforms,
        }
        with torch.inference_mode():
            plain = plain_decode(teacher.model, prompts, **kwargs)
            with packed_mode(teacher.model):
                flat = decode(teacher.model, prompts, **kwargs)
        assert [one.tokens for one in plain] == [one.tokens for one in flat]
        assert [one.stopped for one in plain] == [one.stopped for one in flat]
        np.testing.assert_allclose([one.logprob for one in plain], [one.logprob for one in flat], atol=1e-3)


def test_a_sliding_window_in_the_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=6,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = MistralForCausalLM(config).eval()
    prompts = _prompts(5)
    with torch.inference_mode(), packed_mode(model):
        rows = decode(model, prompts, stop_ids=[], max_new_tokens=14, vocab_size=VOCAB)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.tokens == _alone(model, prompt, 14, set())[0]


def _sampled(teacher: TransformersTeacher, ids: list[str], **kwargs: Any) -> dict[tuple[str, int], Answer]:
    prompts = {f"row-{at}": prompt for at, prompt in enumerate(_prompts())}
    sampling = Sampling(max_new_tokens=8, temperature=0.9, top_p=0.95, samples=3, seed=7)
    answers = teacher.generate([prompts[one] for one in ids], sampling=sampling, row_ids=ids, **kwargs)
    return {(one.row_id, one.sample): replace(one, index=0, logprob=0.0) for one in answers}


def test_draws_do_not_depend_on_batches_order_or_resuming(teacher: TransformersTeacher) -> None:
    names = [f"row-{at}" for at in range(13)]
    whole = _sampled(teacher, names)
    assert len(whole) == 39
    assert len({one.token_ids for one in whole.values()}) > 30
    assert _sampled(teacher, names[::-1], batch_size=4) == whole
    rest = _sampled(teacher, names[9:])
    assert rest == {key: one for key, one in whole.items() if key[0] in names[9:]}


def test_each_batch_is_handed_over_before_the_next(teacher: TransformersTeacher) -> None:
    batches: list[list[Answer]] = []
    seen: list[tuple[int, int]] = []
    answers = teacher.generate(
        _prompts(),
        sampling=Sampling(max_new_tokens=3),
        batch_size=5,
        on_batch=batches.append,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    first = next(answers)
    assert len(batches) == 1
    assert [first, *answers] == [one for batch in batches for one in batch]
    assert seen == [(5, 13), (10, 13), (13, 13)]
    lengths = [len(_prompts()[one.index]) for batch in batches for one in batch]
    assert lengths == sorted(lengths)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logp = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(200, 1)
    uniform = torch.linspace(0, 0.9999, 200)
    counts = torch.bincount(draw(logp, 1.0, 0.7, uniform), minlength=4) / 200
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), atol=0.01, rtol=0)
    assert set(draw(logp, 1.0, 1.0, uniform).tolist()) == {0, 1, 2, 3}
    assert set(draw(logp, 1.0, 0.01, uniform).tolist()) == {0}


@pytest.mark.parametrize("kind", ["sampled", "top-k"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_scores_are_those_of_each_row_alone(teacher: TransformersTeacher, kind: Any, batch_size: int | None) -> None:
    examples = make_examples(10)
    expected = score(teacher.model, examples, kind=kind, n=9, temperature=1.5)
    found = dict(teacher.score(examples, kind=kind, n=9, temperature=1.5, batch_size=batch_size, chunk=7))
    assert sorted(found) == list(range(10))
    for at, one in enumerate(expected):
        np.testing.assert_array_equal(found[at].offsets, one.offsets)
        np.testing.assert_array_equal(found[at].ids, one.ids)
        np.testing.assert_array_equal(found[at].counts, one.counts)
        np.testing.assert_allclose(found[at].logp, one.logp, atol=1e-4)
        np.testing.assert_allclose(found[at].normalisers, one.normalisers, atol=1e-4)


def test_padding_rows_of_the_vocabulary_are_never_written_or_scored() -> None:
    """The head has 320 rows, the tokenizer 300 ids: the rest would win every time."""
    model = make_llama(vocab=320, tied=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 100 * model.lm_head.weight[:20]
    teacher = TransformersTeacher("tiny", "float32", model=model, tokenizer=Tokenizer())
    answers = list(teacher.generate(_prompts(), sampling=Sampling(max_new_tokens=6)))
    assert max(max(one.token_ids, default=0) for one in answers) < VOCAB
    found = dict(teacher.score(make_examples(4)))
    assert max(int(one.ids.max()) for one in found.values()) < VOCAB


def test_what_does_not_fit_is_refused_by_name(teacher: TransformersTeacher) -> None:
    with pytest.raises(UsageError, match=r"row 'long': a prompt of 250 tokens and 10 new ones do not fit .* of 256"):
        list(teacher.generate([[2] * 250], sampling=Sampling(max_new_tokens=10), row_ids=["long"]))
    with pytest.raises(UsageError, match="row 'none': the prompt is empty"):
        list(teacher.generate([[]], sampling=Sampling(), row_ids=["none"]))
    with pytest.raises(UsageError, match="row 'a': 300 tokens do not fit"):
        list(teacher.score([Example("a", (2,) * 200, (3,) * 100)]))
    for n in (0, 256):
        with pytest.raises(UsageError, match=r"score\.n"):
            list(teacher.score(make_examples(1), n=n))
    with pytest.raises(UsageError, match="batch_size is 0"):
        list(teacher.generate(_prompts(), sampling=Sampling(), batch_size=0))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded as a causal language model"):
        TransformersTeacher(tmp_path)


def test_a_pickle_checkpoint_is_refused(tmp_path: Path, smollm2: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((smollm2 / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be loaded"):
        TransformersTeacher(tmp_path)


def test_the_real_model_writes_what_transformers_writes(smollm2: Path) -> None:
    """Greedy, batched, in float32, with a template and a shared system prompt."""
    teacher = TransformersTeacher(smollm2, "float32")
    questions = ["What is the capital of France?", "Name a colour.", "Say hello to Anna in one short sentence."]
    prompts = [[{"role": "user", "content": one}] for one in questions]
    answers = sorted(teacher.generate(prompts, sampling=Sampling(max_new_tokens=12)), key=lambda one: one.index)
    assert "Paris" in answers[0].text
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = teacher.encode([prompt], ["x"])
        out = teacher.model.generate(torch.tensor(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        written = out[len(ids[0]) :].tolist()
        assert list(answer.token_ids) == [one for one in written if one not in teacher.stop_ids()]
