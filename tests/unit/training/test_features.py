"""Features and relations: plain float64 references for values and gradients, in any layout; what training makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from edgedistill.errors import StepFailed, UsageError
from edgedistill.training import packing
from edgedistill.training.data import Example, counter_rng
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.features import Features, relations, row_means
from edgedistill.training.lora import LoraSettings
from edgedistill.training.losses import LossTerms
from edgedistill.training.objectives import FeatureTerms, even_pairs
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.selfcheck import selfcheck
from edgedistill.training.settings import plan_steps
from edgedistill.training.trainer import TrainSettings, train
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

EVERY = FeatureTerms(weight=0.5, distances=2.0, angles=3.0)
SETTINGS = TrainSettings(
    method="full", lr=2e-3, steps=4, batch_size=6, dtype="float32", schedule="constant", warmup=0.0, features=EVERY
)


def wide(layers: int = 4) -> Any:
    """A teacher of twice the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


# ── plain references, row by row ──


def plain_relations(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the relative distances of every two rows, and the angles of every three, in the order of the loops."""
    count = len(rows)
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    far = torch.stack([(rows[one] - rows[other]).norm() for one, other in pairs])
    cosines = [
        torch.dot(rows[i] - rows[j], rows[k] - rows[j]) / (rows[i] - rows[j]).norm() / (rows[k] - rows[j]).norm()
        for j in range(count)
        for i in range(count)
        for k in range(count)
        if len({i, j, k}) == 3
    ]
    return far / far.mean(), torch.stack(cosines) if cosines else far.new_zeros(1)


def plain_huber(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    gap = (one - other).abs()
    return torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()


def plain_sums(
    students: Sequence[Sequence[torch.Tensor]],
    teachers: Sequence[Sequence[torch.Tensor]],
    examples: Sequence[Example],
    terms: FeatureTerms,
    projections: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """Compute the sums from the states of each pair of layers and row [tokens, H], as the docstrings say it."""
    total = torch.zeros((), dtype=torch.float64)
    for at, (of_student, of_teacher) in enumerate(zip(students, teachers, strict=True)):
        for s, t in zip(of_student, of_teacher, strict=True):
            turned = s[1:] @ projections[at].T if projections else s[1:]
            for one, other in zip(turned, t[1:], strict=True):
                if terms.distance == "cosine":
                    total = total + 1 - torch.dot(one, other) / one.norm() / other.norm()
                else:
                    total = total + (one - other).square().sum() / other.square().sum()
    means = [
        torch.stack([row[len(one.prompt_ids) - 1 : -1].mean(0) for row, one in zip(rows, examples, strict=True)])
        for rows in (students[-1], teachers[-1])
    ]
    (far, angles), (want, want_angles) = (plain_relations(rows) for rows in means)
    return {
        "features": total / len(students),
        "distances": plain_huber(far, want) * len(examples),
        "angles": plain_huber(angles, want_angles) * len(examples),
    }


def laid_out(batch: Any, rows: Sequence[torch.Tensor], prefix: int) -> torch.Tensor:
    """Lay the states of rows out as a batch has them; what stands at padding must not matter."""
    if isinstance(batch, packing.PackedBatch):
        tail = torch.full((batch.layout.tail, rows[0].shape[1]), 7.0, dtype=rows[0].dtype)
        return torch.cat([rows[0][:prefix], *(row[prefix:] for row in rows), tail])[None]
    out = torch.full((*batch.input_ids.shape, rows[0].shape[1]), 7.0, dtype=rows[0].dtype)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_value_and_gradient_are_the_plain_ones_in_float64(distance: Any, project: bool, packed: bool) -> None:
    """The states are given, in the layout of the batch: every term, its gradient by the states and by the matrices."""
    terms = replace(EVERY, distance=distance, pairs=((3, 0), (1, 2)))
    examples = make_examples(5, prefix=4)
    teacher, student = (wide(4) if project else make_llama(4, seed=2)), make_llama(3)
    guide = Features(teacher, student, terms, seed=3)
    assert bool(guide.projections) is project
    batch = make_batch(examples, packed=packed)
    prefix = batch.layout.prefix if isinstance(batch, packing.PackedBatch) else 0
    assert prefix == (4 if packed else 0)
    rng = np.random.default_rng(0)
    shared = [rng.standard_normal((4, 64)) for _ in range(2)], [rng.standard_normal((4, 64 * (1 + project)))] * 2
    exact: list[list[list[torch.Tensor]]] = []
    for firsts in shared:  # what rows share in a flat batch is one state, so its gradient is a sum
        exact.append(
            [
                [
                    torch.from_numpy(np.concatenate([first, rng.standard_normal((one.length - 4, first.shape[1]))]))
                    for one in examples
                ]
                for first in firsts
            ]
        )
    leaves = [[row.clone().requires_grad_() for row in rows] for rows in exact[0]]
    matrices = [one.detach().double().requires_grad_() for one in guide.projections]
    want = plain_sums(leaves, exact[1], examples, terms, matrices)
    sum(terms.weights[name] * value for name, value in want.items()).backward()  # pyright: ignore

    caught = [laid_out(batch, rows, prefix).float().requires_grad_() for rows in exact[0]]
    guide._students = {0: caught[0], 2: caught[1]}
    above = [laid_out(batch, rows, prefix).float() for rows in exact[1]]
    guide._teachers = {3: above[0], 1: above[1]}
    found = guide.sums(batch, examples, read=False)
    assert set(found) == set(want)
    sum(terms.weights[name] * value for name, value in found.items()).backward()  # pyright: ignore
    for name, value in want.items():
        assert float(found[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    for layer, rows in zip(caught, leaves, strict=True):
        grads = [row.grad for row in rows]
        assert layer.grad is not None and all(one is not None for one in grads)
        if isinstance(batch, packing.PackedBatch):
            together = torch.stack([one[:4] for one in grads if one is not None]).sum(0)
            nothing = together.new_zeros((batch.layout.tail, together.shape[1]))
            expected = torch.cat([together, *(one[4:] for one in grads if one is not None), nothing])[None]
        else:
            expected = torch.zeros_like(layer, dtype=torch.float64)
            for at, one in enumerate(grads):
                assert one is not None
                expected[at, : len(one)] = one
        assert float((layer.grad - expected).norm() / expected.norm()) < 1e-5
    for matrix, plain in zip(guide.projections, matrices, strict=True):
        assert matrix.grad is not None and plain.grad is not None
        assert float((matrix.grad - plain.grad).norm() / plain.grad.norm()) < 1e-5


def states(model: Any, example: Example) -> list[torch.Tensor]:
    """Return the output of every layer for one row alone, by plain hooks: [tokens, H] each."""
    found: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: found.append(out[0])) for layer in model.model.layers]
    model.model(input_ids=torch.tensor([[*example.prompt_ids, *example.completion_ids]]))
    for hook in hooks:
        hook.remove()
    return [one.reshape(-1, one.shape[-1]) for one in found]


def by_pairs(model: Any, examples: Sequence[Example], layers: Sequence[int]) -> list[list[torch.Tensor]]:
    each = [states(model, one) for one in examples]
    return [[row[at] for row in each] for at in layers]


@pytest.mark.parametrize("packed", [True, False])
def test_models_in_any_layout_give_the_sums_of_one_row_at_a_time(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(packing, "packable", lambda _model: False)
    teacher, student, examples = wide(4), make_llama(2), make_examples(5)
    guide = Features(teacher, student, EVERY)
    guide.watch(student)
    with packed_mode(student, teacher) as can, torch.no_grad():
        assert can is packed
        batch = make_batch(examples, packed=can)
        completion_states(student, batch)
        found = guide.sums(batch, examples)
    matrices = [one.detach().double() for one in guide.projections]
    with torch.no_grad():
        of_student = by_pairs(make_llama(2).double(), examples, [0, 1])
        want = plain_sums(of_student, by_pairs(wide(4).double(), examples, [1, 3]), examples, EVERY, matrices)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in want.items()}, rel=2e-5
    )


def test_the_batch_may_lie_on_another_device_than_the_models() -> None:
    """Batches are made on the CPU: on a GPU (here the meta device stands for it) weights and matrices must follow."""
    teacher, student, examples = wide().to("meta"), make_llama(2).to("meta"), make_examples(3)
    guide = Features(teacher, student, FeatureTerms())
    guide.to("meta", torch.float32)
    guide.watch(student)
    with packed_mode(student, teacher), torch.no_grad():
        batch = make_batch(examples, packed=True)
        completion_states(student, batch)
        assert guide.sums(batch, examples)["features"].device.type == "meta"


# ── relations ──


@settings(max_examples=40, deadline=None)
@given(
    seed=strategies.integers(0, 10**6),
    rows=strategies.integers(2, 7),
    scale=strategies.floats(1e-2, 1e3),
    width=strategies.integers(1, 9),
)
def test_a_space_that_is_turned_shifted_and_scaled_has_the_same_relations(
    seed: int, rows: int, scale: float, width: int
) -> None:
    rng = counter_rng("space", seed)
    student, teacher = (
        torch.from_numpy(rng.standard_normal((rows, 5))),
        torch.from_numpy(rng.standard_normal((rows, width))),
    )
    turned, _ = torch.linalg.qr(torch.from_numpy(rng.standard_normal((width, width))))
    moved = scale * teacher @ turned + torch.from_numpy(rng.standard_normal(width))
    before, after = relations(student, teacher), relations(student, moved)
    itself = relations(moved, teacher)
    for name in ("distances", "angles"):
        assert float(after[name]) == pytest.approx(float(before[name]), abs=1e-7)
        assert float(before[name]) >= 0
        assert float(itself[name]) == pytest.approx(0, abs=1e-9)


def test_rows_that_are_alone_or_the_same_have_finite_gradients() -> None:
    rows = torch.randn(4, 8)
    rows[1] = rows[0]
    rows.requires_grad_()
    sum(relations(rows, torch.randn(4, 8)).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert rows.grad is not None and bool(rows.grad.isfinite().all())
    assert [float(one) for one in relations(rows[:1], rows[:1]).values()] == [0.0, 0.0]
    assert float(relations(rows[:2].detach(), torch.randn(2, 8))["angles"]) == 0.0
    torch.testing.assert_close(row_means(torch.tensor([[1.0], [3.0], [5.0]]), [2, 1]), torch.tensor([[2.0], [5.0]]))


def test_layers_are_paired_evenly_last_with_last() -> None:
    assert even_pairs(24, 12) == tuple((2 * at + 1, at) for at in range(12))
    assert even_pairs(18, 9)[-1] == (17, 8)
    assert even_pairs(5, 5) == tuple((at, at) for at in range(5))
    assert even_pairs(2, 4) == ((0, 0), (0, 1), (1, 2), (1, 3))


# ── training ──


def run(out: Path, above: Any, student: Any, chosen: TrainSettings, **options: Any) -> list[dict[str, Any]]:
    assert chosen.features is not None
    guide = Features(above, student, chosen.features, seed=chosen.seed)
    targets = options.pop("targets", None)
    examples = options.pop("examples", None) or make_examples(12)
    train(student, examples, targets, settings=chosen, out=out, guide=guide, **options)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(out.glob("*/*.safetensors")))


def test_one_step_is_the_plain_one_and_the_log_says_every_term(tmp_path: Path) -> None:
    """Loss, terms and gradient norms of a step in two micro-batches against the rows' own, in float64."""
    chosen = replace(SETTINGS, steps=1, micro_batch=3, freeze_embeddings=False)
    examples, student = make_examples(12), make_llama(2)
    line = run(tmp_path, wide(), make_llama(2), chosen)[0]
    rows = [examples[row] for row in plan_steps(examples, chosen)[0]]
    student, teacher = student.double(), wide().double()
    matrices = [one.detach().double() for one in Features(wide(), make_llama(2), EVERY).projections]
    matrices = [one.requires_grad_() for one in matrices]
    tokens, completion = sum(one.length - 1 for one in rows), sum(len(one.completion_ids) for one in rows)
    want = dict.fromkeys(EVERY.weights, 0.0)
    trained = [*student.parameters(), *matrices]
    for part in (rows[:3], rows[3:]):
        with torch.no_grad():
            above = by_pairs(teacher, part, [1, 3])
        sums = plain_sums(by_pairs(student, part, [0, 1]), above, part, EVERY, matrices)
        for name, value in sums.items():
            share = value / (tokens if name == "features" else len(rows))
            (EVERY.weights[name] * share).backward(retain_graph=True)
            want[name] += float(share.detach())
    norm = float(torch.nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None]))
    assert {name: line[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert line["gradient_features"] == pytest.approx(norm, rel=1e-4)
    for one in rows:
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        logits = student(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        labels = torch.tensor(one.completion_ids)
        (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / completion).backward()
    whole = float(torch.nn.utils.get_total_norm([one.grad for one in trained if one.grad is not None]))
    assert line["gradient"] == pytest.approx(whole, rel=1e-4)
    total = line["ce"] + sum(EVERY.weights[name] * value for name, value in want.items())
    assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert "gradient_kd" not in line and line["gradient_ce"] > 0


def test_features_are_the_same_however_a_step_is_cut(tmp_path: Path) -> None:
    chosen = replace(SETTINGS, features=FeatureTerms(weight=2.0), steps=3)
    logs = [
        run(tmp_path / str(micro), wide(), make_llama(2), replace(chosen, micro_batch=micro)) for micro in (None, 4, 1)
    ]
    for line, *others in zip(*logs, strict=True):
        for other in others:
            for key in ("loss", "ce", "features", "gradient"):
                assert other[key] == pytest.approx(line[key], rel=2e-4)


def test_the_student_comes_closer_in_every_term_and_only_the_model_ships(tmp_path: Path) -> None:
    chosen = replace(SETTINGS, steps=40, lr=3e-3, features=FeatureTerms(weight=1.0, distances=5.0, angles=5.0))
    lines = run(tmp_path, wide(), make_llama(2), chosen)
    for name in ("features", "distances", "angles"):
        first, last = (sum(line[name] for line in part) / 5 for part in (lines[:5], lines[-5:]))
        assert last < 0.8 * first, name
    assert set(weights(tmp_path)) <= set(make_llama(2).state_dict())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_cut_off_goes_on_with_its_matrices(tmp_path: Path, method: Any) -> None:
    chosen = replace(SETTINGS, method=method, lora=LoraSettings(rank=4), steps=6, checkpoint_steps=2)
    run(tmp_path / "whole", wide(), make_llama(2), chosen)

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", wide(), make_llama(2), chosen, progress=stop)
    (kept,) = (tmp_path / "cut" / "checkpoints").glob("*/weights.safetensors")
    from safetensors.torch import load_file

    assert {"projection.0", "projection.1"} <= set(load_file(kept))
    run(tmp_path / "cut", wide(), make_llama(2), chosen)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name


def test_they_go_with_stored_draws_and_with_a_dense_teacher_that_reads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, read = make_examples(12), []
    plainly = Features.read
    monkeypatch.setattr(Features, "read", lambda self, batch: (read.append(1), plainly(self, batch))[1])
    chosen = replace(SETTINGS, loss=LossTerms(kd=0.5, ce=0.5), steps=2, gradient_norms=1)
    soft = score(wide(), examples)
    sampled = run(tmp_path / "sampled", wide(), make_llama(2), chosen, targets=soft)
    assert len(read) == 2
    teacher = wide()
    dense = run(tmp_path / "dense", teacher, make_llama(2), chosen, teacher=DenseTeacher(teacher, VOCAB))
    assert len(read) == 2  # the dense teacher's forward was watched
    for one, other in zip(sampled[:1], dense, strict=False):
        for name in ("features", "distances", "angles", "gradient_features", "ce"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)
        assert {"gradient_kd", "gradient_ce", "gradient_features"} <= set(one)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_and_unfused_layers_change_nothing(
    tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that run as two functions are watched from outside, also where their insides are computed again."""
    chosen = replace(SETTINGS, method=method, lora=LoraSettings(rank=4), steps=2)
    plain = run(tmp_path / "plain", wide(), make_llama(2), chosen)
    again = run(tmp_path / "again", wide(), make_llama(2), replace(chosen, gradient_checkpointing=True))
    monkeypatch.setattr("edgedistill.training.fused_layer.fusable", lambda _layer: False)
    unfused = run(tmp_path / "unfused", wide(), make_llama(2), chosen)
    for one, *others in zip(plain, again, unfused, strict=True):
        for other in others:
            for name in ("loss", "features", "distances", "angles", "gradient"):
                assert other[name] == pytest.approx(one[name], rel=1e-3)


def test_a_teacher_that_flat_batches_do_not_fit_reads_padded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(SETTINGS, steps=1)
    flat = run(tmp_path / "flat", wide(), make_llama(2), chosen)
    monkeypatch.setattr(packing, "packable", lambda model: model.config.hidden_size == 64)
    padded = run(tmp_path / "padded", wide(), make_llama(2), chosen)
    for name in ("loss", "features", "distances", "angles"):
        assert padded[0][name] == pytest.approx(flat[0][name], rel=1e-4)


def test_a_trimmed_student_is_shown_the_states_of_the_same_text() -> None:
    teacher, examples = wide(), make_examples(4)
    kept = sorted({token for one in examples for token in (*one.prompt_ids, *one.completion_ids)})
    number = {token: at for at, token in enumerate(kept)}
    small = [
        Example(one.id, tuple(number[t] for t in one.prompt_ids), tuple(number[t] for t in one.completion_ids))
        for one in examples
    ]
    whole, trimmed = make_llama(2), make_llama(2, vocab=len(kept))
    trimmed.load_state_dict({**whole.state_dict(), **{
        name: whole.state_dict()[name][kept] for name in ("model.embed_tokens.weight", "lm_head.weight")
    }})  # fmt: skip
    found = []
    for student, rows, tokens in ((whole, examples, None), (trimmed, small, kept)):
        guide = Features(teacher, student, EVERY, tokens=tokens)
        guide.watch(student)
        with packed_mode(student, teacher), torch.no_grad():
            batch = make_batch(rows, packed=True)
            completion_states(student, batch)
            found.append({name: float(value) for name, value in guide.sums(batch, rows).items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_matrix_that_was_asked_for_starts_as_none_and_another_start_is_another_run() -> None:
    same = Features(make_llama(3), make_llama(3), replace(EVERY, project=True))
    assert all(torch.equal(one, torch.eye(64)) for one in same.projections)
    assert Features(make_llama(3), make_llama(3), EVERY).parameters() == {}
    assert Features(wide(), make_llama(2), replace(EVERY, weight=0.0)).parameters() == {}  # relations need none
    one, other, again = (Features(wide(), make_llama(2), EVERY, seed=seed).projections[0] for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, other)


# ── the self-check, and what is refused ──


def check(model: Any, guide: Features) -> Any:
    return selfcheck(model, make_examples(12), terms=LossTerms(), vocab_size=VOCAB, guide=guide)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_self_check_knows_the_states_and_leaves_no_hook_behind(distance: Any, tmp_path: Path) -> None:
    model, terms = make_llama(2), replace(EVERY, distance=distance)
    guide = Features(wide(), model, terms)
    report = check(model, guide)
    assert {"features", "own features"} <= set(report.differences)
    lines = train(model, make_examples(6), None, settings=replace(SETTINGS, features=terms), out=tmp_path, guide=guide)
    assert lines.steps == 4
    assert all(len(layer._forward_hooks) == 1 for layer in model.model.layers)


def test_states_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(2)
    guide = Features(wide(), model, EVERY)
    right = guide._sums
    monkeypatch.setattr(
        guide, "_sums", lambda batch, rows, *more: {k: v / len(rows) for k, v in right(batch, rows, *more).items()}
    )
    with pytest.raises(StepFailed, match="the error of the hidden states depends on how the batch is cut"):
        check(model, guide)


def test_without_a_teacher_nothing_can_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="features is set, but there is no teacher"):
        train(make_llama(2), make_examples(4), None, settings=SETTINGS, out=tmp_path)
