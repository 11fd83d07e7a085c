"""A teacher with another tokenizer: distances by rank against a plain float64 reference and TRL's, over text cut in two ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, collate, counter_rng
from edgedistill.training.dense import DenseTargets
from edgedistill.training.divergences import Divergence
from edgedistill.training.losses import HeadLoss, LossTerms, dense_divergence
from edgedistill.training.other_tokens import (
    NONE,
    OtherTeacher,
    by_position,
    by_text,
    ends_of,
    in_order,
    other_teacher,
)
from edgedistill.training.packing import make_batch
from edgedistill.training.recipe import kept_texts, load_kept, load_model
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.formats.gguf.conftest import TEXT, make_model, make_tokenizer
from tests.unit.training.test_divergences import assert_same
from tests.unit.training.tiny import VOCAB, make_examples, make_llama

ULD, GOLD = Divergence("uld"), Divergence("gold")
SETTINGS = TrainSettings(
    method="full",
    lr=1e-3,
    steps=3,
    batch_size=4,
    dtype="float32",
    schedule="constant",
    warmup=0.0,
    loss=LossTerms(kd=1.0, ce=0.0, divergence=ULD),
)


def plain(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute the distance of sorted probabilities of logits [positions, V], each of its own V: [positions]."""
    q, p = ((one / temperature).softmax(-1).sort(-1, descending=True).values for one in (teacher, student))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(one, (0, width - one.shape[-1])) for one in (q, p))
    return (q - p).abs().sum(-1)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("theirs", [190, VOCAB, 470])
def test_the_fused_loss_is_the_plain_one_in_float64(theirs: int, temperature: float, separate: bool) -> None:
    """Value and gradient: smaller and larger vocabularies, padded heads, positions that the teacher does not have."""
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 32, dtype=torch.float64), torch.randn(VOCAB + 16, 32, dtype=torch.float64) * 0.3
    taught, their_head = torch.randn(30, 48, dtype=torch.float64), torch.randn(theirs, 48, dtype=torch.float64) * 0.3
    labels, weights, known = torch.randint(0, VOCAB, (30,)), torch.rand(30), (torch.rand(30) > 0.2).float()
    exact = hidden.clone().requires_grad_()
    logits = (exact @ head.T)[:, :VOCAB]
    distance = plain(taught @ their_head.T, logits, temperature)
    torch.testing.assert_close(dense_divergence(taught @ their_head.T, logits, ULD, temperature), distance)
    want_kd = 0.7 * temperature**2 * (distance * weights * known).sum()
    want_ce = 0.3 * (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    (want_kd + want_ce).backward()
    states = hidden.float().requires_grad_()
    targets = DenseTargets(taught.float(), their_head.float(), None, known)
    terms = LossTerms(kd=0.7, ce=0.3, temperature=temperature, divergence=ULD)
    kd, ce = HeadLoss.apply(states, head.float(), None, labels, weights, targets, terms, VOCAB, separate, 7)
    (kd + ce).backward()
    assert_same(kd, want_kd, states, exact)


@settings(max_examples=40, deadline=None)
@given(seed=strategies.integers(0, 10**6), own=strategies.integers(2, 40), theirs=strategies.integers(2, 40))
def test_names_of_tokens_do_not_matter_and_it_is_a_distance(seed: int, own: int, theirs: int) -> None:
    rng = counter_rng("uld", seed)
    student, teacher = (torch.from_numpy(rng.standard_normal((3, size)) * 3) for size in (own, theirs))
    found = dense_divergence(teacher, student, ULD)
    renamed = teacher[:, torch.from_numpy(rng.permutation(theirs))]
    torch.testing.assert_close(dense_divergence(renamed, student, ULD), found)
    torch.testing.assert_close(dense_divergence(student, teacher, ULD), found)
    assert bool((found >= 0).all() and (found <= 2).all())
    assert float(dense_divergence(teacher, renamed, ULD).abs().max()) < 1e-12


# ── text in the tokens of both ──


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A student and a wider teacher that cuts the same text into more tokens, the kept rows in the tokens of each."""
    folder = tmp_path_factory.mktemp("pair")
    make_model(folder / "student", seed=1)
    make_model(folder / "teacher", seed=2, hidden_size=96, pre="qwen2")
    make_tokenizer(folder / "teacher", "qwen2", size=330)  # its head has rows beyond these tokens
    lines = [
        {"id": f"r{at}", "messages": [{"role": "user", "content": TEXT[at % 5]}], "text": TEXT[(at + 1) % 5][:length]}
        for at, length in enumerate((6, 12, 20, 30, 9, 17, 25, 40))
    ]
    kept = folder / "kept.jsonl"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, tokenizer = load_kept(kept, folder / "student")
    own, theirs = load_kept(kept, folder / "teacher")
    assert sum(one.length for one in own) > sum(one.length for one in examples)
    return SimpleNamespace(folder=folder, kept=kept, examples=examples, own=own, tokenizer=tokenizer, theirs=theirs)


def student_of(pair: SimpleNamespace) -> Any:
    return load_model(pair.folder / "student").eval()


def teacher_of(pair: SimpleNamespace, divergence: str = "uld") -> OtherTeacher:
    return other_teacher(
        load_model(pair.folder / "teacher"),
        divergence,
        pair.own,
        pair.examples,
        kept_texts(pair.kept),
        (pair.theirs, pair.tokenizer),
        len(pair.tokenizer),
    )


def alone(model: Any, example: Example, vocab: int) -> torch.Tensor:
    ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
    return model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1, :vocab]


@pytest.mark.parametrize("packed", [True, False])
def test_the_teacher_reads_its_own_tokens_of_the_same_rows(
    pair: SimpleNamespace, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr("edgedistill.training.other_tokens.packable", lambda _model: False)
    teacher, rows = teacher_of(pair), [5, 0, 3]
    teacher.to("cpu", torch.float32)
    found = teacher.targets(make_batch([pair.examples[row] for row in rows], packed=True), rows)
    at = 0
    for row in rows:
        with torch.no_grad():
            want = alone(teacher.teacher, pair.own[row], len(pair.theirs))
        count = len(pair.examples[row].completion_ids)
        both = min(count, len(want))
        got = found.logits(at, at + both)
        torch.testing.assert_close(got, want[:both], rtol=1e-4, atol=1e-4)
        assert found.known is not None
        assert found.known[at : at + count].tolist() == [1.0] * both + [0.0] * (count - both)
        at += count
    assert at == len(found.states)


@pytest.mark.parametrize("divergence", ["uld", "gold"])
def test_the_rows_may_lie_on_another_device_than_the_teacher(pair: SimpleNamespace, divergence: str) -> None:
    """Places and orders are made on the CPU: on a GPU (here the meta device stands for it) they must follow."""
    teacher = teacher_of(pair, divergence)
    teacher.to("meta", torch.float32)
    found = teacher.targets(make_batch(pair.examples[:2], packed=True), [0, 1])
    assert found.known is not None and found.known.device.type == "meta"
    assert found.logits(0, 2).device.type == "meta"


def test_one_step_is_the_plain_one_however_it_is_cut(pair: SimpleNamespace, tmp_path: Path) -> None:
    """Value and gradient norm of a step against each row's own forward in float64, in one batch and in two."""
    chosen = replace(SETTINGS, steps=1, batch_size=8, freeze_embeddings=False)
    student, teacher = student_of(pair).double(), load_model(pair.folder / "teacher").double()
    count = sum(len(one.completion_ids) for one in pair.examples)
    total = 0.0
    for one, other in zip(pair.examples, pair.own, strict=True):
        with torch.no_grad():
            above = alone(teacher, other, len(pair.theirs))
        below = alone(student, one, len(pair.tokenizer))
        both = min(len(above), len(below))
        loss = plain(above[:both], below[:both]).sum() / count
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.get_total_norm([one.grad for one in student.parameters() if one.grad is not None]))
    for micro in (None, 3):
        out = tmp_path / str(micro)
        train(
            student_of(pair),
            pair.examples,
            None,
            settings=replace(chosen, micro_batch=micro),
            out=out,
            vocab_size=len(pair.tokenizer),
            teacher=teacher_of(pair),
        )
        line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
        assert line["kd"] == pytest.approx(total, rel=1e-5)
        assert line["gradient"] == pytest.approx(norm, rel=1e-3)


def test_trl_finds_the_same_distance(pair: SimpleNamespace) -> None:
    """TRL 1.16's positional ULD (a mean of means over rows), its logits shifted to the tokens that they predict."""
    trl = pytest.importorskip("trl.experimental.gold.gold_trainer")
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
    )
    student, teacher = student_of(pair), load_model(pair.folder / "teacher")
    inputs: list[Any] = []
    for model, rows, vocab in ((student, pair.examples, pair.tokenizer), (teacher, pair.own, pair.theirs)):
        batch = collate(rows)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[..., : len(vocab)]
        inputs.append((logits, batch.labels, batch.input_ids))
    (s, s_labels, s_ids), (t, t_labels, t_ids) = inputs
    want = float(trl.ULDLoss(config)(s, t, s_labels, t_labels, s_ids, t_ids))
    dense, means = teacher_of(pair), []
    dense.to("cpu", torch.float32)
    for row, one in enumerate(pair.examples):
        targets = dense.targets(make_batch([one], packed=True), [row])
        assert targets.known is not None
        with torch.no_grad():
            below = alone(student, one, len(pair.tokenizer))
        each = dense_divergence(targets.logits(0, len(below)), below, ULD) * targets.known
        means.append(float(each.sum() / targets.known.sum()))
    assert sum(means) / len(means) == pytest.approx(want, rel=1e-5)


def plain_gold(q: torch.Tensor, p: torch.Tensor, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute, from probabilities of one position each, the terms of gold: (KL of matched tokens + distance by rank of the rest,
    that of the rests as one bucket).
    """
    matched = [(own, other) for own, other in enumerate(order[: len(p)]) if other != NONE]
    value = sum((q[other] * (q[other] / p[own]).log() for own, other in matched), start=p.new_zeros(()))
    rest_p = p[[own for own, other in enumerate(order[: len(p)]) if other == NONE]]
    rest_q = q[order[len(p) :]]
    width = max(len(rest_p), len(rest_q))
    sorted_p, sorted_q = (
        torch.nn.functional.pad(one.sort(descending=True).values, (0, width - len(one))) for one in (rest_p, rest_q)
    )
    value = value + (sorted_p - sorted_q).abs().sum()
    bucket = rest_q.sum() * (rest_q.sum() / rest_p.sum()).log() if len(rest_p) and len(rest_q) else p.new_zeros(())
    return value, bucket


def shuffled(seed: int, own: int, theirs: int, matched: int) -> list[int]:
    """Return an order in which some tokens of both, drawn at random, are the same."""
    rng = counter_rng("order", seed)
    order = [NONE] * own
    chosen = rng.permutation(theirs)
    for at, other in zip(rng.permutation(own)[:matched], chosen, strict=False):
        order[at] = int(other)
    return order + sorted(set(range(theirs)) - set(order))


def arranged(logits: torch.Tensor, order: list[int]) -> torch.Tensor:
    at = torch.tensor(order)
    return logits[:, at.clamp_min(0)].masked_fill(at == NONE, -torch.inf)


@pytest.mark.parametrize(
    ("own", "theirs", "matched"), [(60, 40, 25), (40, 60, 25), (30, 50, 30), (50, 30, 30), (20, 20, 20)]
)
def test_gold_is_the_plain_one_in_float64(own: int, theirs: int, matched: int) -> None:
    """Value and gradient: some tokens in common, none left on one side, and all in common."""
    torch.manual_seed(1)
    hidden, head = torch.randn(9, 16, dtype=torch.float64), torch.randn(own, 16, dtype=torch.float64) * 0.5
    taught = torch.randn(9, theirs, dtype=torch.float64) * 2
    order, weights = shuffled(3, own, theirs, matched), torch.rand(9)
    exact = hidden.clone().requires_grad_()
    p, q = (exact @ head.T).softmax(-1), taught.softmax(-1)
    each = torch.stack([sum(plain_gold(*row, order)) for row in zip(q, p, strict=True)])  # pyright: ignore
    torch.testing.assert_close(dense_divergence(arranged(taught, order), exact @ head.T, GOLD), each)
    want = (each * weights).sum()
    want.backward()
    states = hidden.float().requires_grad_()
    columns = arranged(taught, order).float().T
    bias = torch.tensor([0.0 if one != NONE else -torch.inf for one in order])
    targets = DenseTargets(torch.eye(9), columns.masked_fill(columns.isinf(), 0.0), bias)
    terms = LossTerms(kd=1.0, ce=0.0, divergence=GOLD)
    labels = torch.zeros(9, dtype=torch.long)
    kd, _ = HeadLoss.apply(states, head.float(), None, labels, weights, targets, terms, own, False, 4)
    kd.backward()
    assert_same(kd, want, states, exact)


@settings(max_examples=40, deadline=None)
@given(
    seed=strategies.integers(0, 10**6),
    own=strategies.integers(2, 20),
    theirs=strategies.integers(2, 20),
    share=strategies.floats(0, 1),
)
def test_gold_is_never_negative_and_zero_at_home(seed: int, own: int, theirs: int, share: float) -> None:
    rng = counter_rng("gold", seed)
    student, teacher = (torch.from_numpy(rng.standard_normal((3, size)) * 3) for size in (own, theirs))
    order = shuffled(seed, own, theirs, round(share * min(own, theirs)))
    assert bool((dense_divergence(arranged(teacher, order), student, GOLD) > -1e-9).all())
    home = shuffled(seed, theirs, theirs, round(share * theirs))
    student, left = torch.empty_like(teacher), list(home[theirs:])
    for at in range(theirs):
        student[:, at] = teacher[:, home[at] if home[at] != NONE else left.pop()]
    assert float(dense_divergence(arranged(teacher, home), student, GOLD).abs().max()) < 1e-9


def test_trl_finds_the_same_hybrid_but_for_the_bucket() -> None:
    """TRL 1.16's hybrid loss of aligned positions: KL of the tokens in common + distance by rank of the rest, each unscaled."""
    trl = pytest.importorskip("trl.experimental.gold.gold_trainer")
    own, theirs = 60, 45
    order = shuffled(5, own, theirs, 30)
    names = {number: f"t{number}" for number in range(theirs)}
    vocab = {(names[other] if other != NONE else f"s{at}"): at for at, other in enumerate(order[:own])}
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=1.0,
        uld_hybrid_unmatched_weight=1.0,
        beta=0.0,
    )
    loss = trl.ULDLoss(
        config,
        SimpleNamespace(get_vocab=lambda: vocab),
        SimpleNamespace(get_vocab=lambda: {name: number for number, name in names.items()}),
    )
    torch.manual_seed(2)
    student, teacher = torch.randn(1, 8, own, dtype=torch.float64), torch.randn(1, 8, theirs, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 1, 2, 3, 4, 5, 6]])
    want = float(loss(student, teacher, labels, labels, labels.abs(), labels.abs()))
    q, p = teacher[0, 1:7].softmax(-1), student[0, 1:7].softmax(-1)
    ours = dense_divergence(arranged(teacher[0, 1:7], order), student[0, 1:7], GOLD).mean()
    bucket = torch.stack([plain_gold(*row, order)[1] for row in zip(q, p, strict=True)]).mean()
    assert float(ours - bucket) == pytest.approx(want, rel=1e-6)


def test_gold_compares_where_both_have_read_the_same_text(pair: SimpleNamespace) -> None:
    """Every place against the decoded text before it, with the finer and with the coarser tokens as the student's."""
    texts = kept_texts(pair.kept)
    coarse, fine = (pair.examples, pair.tokenizer), (pair.own, pair.theirs)
    shares = []
    for (examples, tokenizer), (own, theirs) in ((coarse, fine), (fine, coarse)):
        found = compared = 0
        for example, other, text in zip(examples, own, texts, strict=True):
            places = by_text(ends_of(tokenizer, text), ends_of(theirs, text))
            assert len(places) == len(example.completion_ids)
            assert places[0] == 0 and places[-1] == len(other.completion_ids) - 1  # the last is the end of the turn
            before = {theirs.decode(other.completion_ids[:at]) for at in range(len(other.completion_ids))}
            for at, place in enumerate(places):
                read = tokenizer.decode(example.completion_ids[:at])
                if place != NONE:
                    assert text.startswith(read) and read == theirs.decode(other.completion_ids[:place])
                else:
                    assert read not in before or "\ufffd" in read
                found, compared = found + (place != NONE), compared + 1
        shares.append(found / compared)
    assert shares[1] < shares[0] == 1.0  # every place of the coarser is one of the finer
    assert teacher_of(pair, "gold").places[0] == by_text(
        ends_of(pair.tokenizer, texts[0]), ends_of(pair.theirs, texts[0])
    )


def test_parts_of_one_character_are_not_compared() -> None:
    assert by_text([1, 2, 2, 2, 3, 4], [1, 2, 3, 4]) == [0, 1, NONE, NONE, 2, 3]
    assert by_text([3, 5, 6], [1, 3, 6, 7]) == [0, 2, NONE]
    assert by_text([2, 2, 3], [2, 2, 3]) == [0, NONE, 2]


def test_tokens_are_the_same_by_their_spelling_and_the_ends_of_turns_by_their_place(pair: SimpleNamespace) -> None:
    size = len(pair.theirs)
    order = in_order(pair.tokenizer, len(pair.tokenizer), pair.theirs, size)
    assert sorted(one for one in order if one != NONE) == list(range(size))
    names, others = (
        pair.tokenizer.convert_ids_to_tokens(range(len(pair.tokenizer))),
        pair.theirs.convert_ids_to_tokens(range(size)),
    )
    for name, other in zip(names, order, strict=False):
        assert (others[other] == name) if other != NONE else (name not in others)

    def fake(tokens: list[str], end: int) -> Any:
        return SimpleNamespace(convert_ids_to_tokens=lambda ids: [tokens[at] for at in ids], _edgedistill_turn_end=end)

    byte_level, pieces = fake(["<e>", "\u0120the", "a", "b"], 0), fake(["a", "\u2581the", "<end>", "c", "<e>"], 2)
    assert in_order(byte_level, 4, pieces, 5) == [2, 1, 0, NONE, 3, 4]


def test_one_step_of_gold_is_the_plain_one(pair: SimpleNamespace, tmp_path: Path) -> None:
    """The logged value against each row's own forward in float64, places found by decoding."""
    student, teacher = student_of(pair).double(), load_model(pair.folder / "teacher").double()
    order = in_order(pair.tokenizer, len(pair.tokenizer), pair.theirs, len(pair.theirs))
    texts, total, count = kept_texts(pair.kept), 0.0, 0
    for one, other, text in zip(pair.examples, pair.own, texts, strict=True):
        with torch.no_grad():
            q = alone(teacher, other, len(pair.theirs)).softmax(-1)
            p = alone(student, one, len(pair.tokenizer)).softmax(-1)
        for at, place in enumerate(by_text(ends_of(pair.tokenizer, text), ends_of(pair.theirs, text))):
            total += float(sum(plain_gold(q[place], p[at], order))) if place != NONE else 0.0
        count += len(one.completion_ids)
    chosen = replace(SETTINGS, steps=1, batch_size=8, micro_batch=3, loss=LossTerms(kd=1.0, ce=0.0, divergence=GOLD))
    train(
        student_of(pair),
        pair.examples,
        None,
        settings=chosen,
        out=tmp_path,
        vocab_size=len(pair.tokenizer),
        teacher=teacher_of(pair, "gold"),
    )
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["kd"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("divergence", [ULD, GOLD])
def test_it_comes_closer(pair: SimpleNamespace, tmp_path: Path, divergence: Divergence) -> None:
    terms = LossTerms(kd=1.0, ce=0.0, divergence=divergence)
    train(
        student_of(pair),
        pair.examples,
        None,
        settings=replace(SETTINGS, steps=30, lr=3e-3, batch_size=8, loss=terms),
        out=tmp_path,
        vocab_size=len(pair.tokenizer),
        teacher=teacher_of(pair, divergence.name),
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["kd"] for line in lines[-5:]) < 0.7 * sum(line["kd"] for line in lines[:5])


def test_a_student_that_is_its_teacher_has_no_distance(tmp_path: Path) -> None:
    examples = make_examples(6)
    teacher = OtherTeacher(make_llama(2), VOCAB, examples, [by_position(one, one) for one in examples])
    chosen = replace(SETTINGS, steps=1, batch_size=6)
    assert abs(train(make_llama(2), examples, None, settings=chosen, out=tmp_path, teacher=teacher).kd) < 1e-5


def test_tokens_are_compared_by_their_numbers_and_rows_by_their_names(pair: SimpleNamespace) -> None:
    two, five = Example("a", (1,), (1, 2)), Example("a", (1,), (1, 2, 3, 4, 5))
    assert by_position(two, five) == [0, 1]
    assert by_position(five, two) == [0, 1, NONE, NONE, NONE]
    pair = SimpleNamespace(**{**vars(pair), "own": pair.own[1:]})
    with pytest.raises(UsageError, match="not the student's"):
        teacher_of(pair)
