from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.draws import (
    invert,
    join_targets,
    slice_targets,
    sparse_from_logits,
    stored_temperatures,
    uniforms,
)
from edgedistill.training.targets import (
    SparseTargets,
    TargetsHeader,
    TargetsWriter,
    read_header,
    read_targets,
    reweight,
    tokenizer_hash,
)
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score, zipf_logits


def _sampled(logits: torch.Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> SparseTargets:
    uniform = torch.from_numpy(uniforms(seed, "row", len(logits), n))
    return sparse_from_logits(logits, kind="sampled", n=n, temperature=temperature, uniform=uniform)


def _dense(targets: SparseTargets, temperature: float) -> np.ndarray:
    out = np.zeros((targets.positions, VOCAB))
    np.add.at(out, (targets.rows, targets.ids), targets.probabilities(temperature))
    return out


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_are_unbiased(temperature: float) -> None:
    """200 x 64 draws a position: every frequency lies within its standard error (5.5 of them, 300 ids)."""
    logits = zipf_logits(1).repeat(200, 1)
    n = 64
    p = torch.softmax(logits[0].double() / temperature, -1).numpy()
    mean = _dense(_sampled(logits, n, temperature), temperature).mean(0)
    error = np.sqrt(p * (1 - p) / (200 * n))
    assert (np.abs(mean - p) / error).max() < 5.5


def test_variance_of_the_estimate_is_that_of_n_draws() -> None:
    """E |estimate - p|^2 = (1 - sum p^2) / n."""
    logits = zipf_logits(400)
    for n in (4, 12):
        estimate = _dense(_sampled(logits, n), 1.0)
        p = torch.softmax(logits.double(), -1).numpy()
        measured = ((estimate - p) ** 2).sum(1).mean()
        expected = (1 - (p**2).sum(1).mean()) / n
        assert measured == pytest.approx(expected, rel=0.1)


def test_draws_depend_on_seed_and_row_only() -> None:
    assert (uniforms(0, "a", 4, 3) == uniforms(0, "a", 4, 3)).all()
    assert (uniforms(0, "a", 4, 3) != uniforms(0, "b", 4, 3)).any()
    assert (uniforms(0, "a", 4, 3) != uniforms(1, "a", 4, 3)).any()
    logits = zipf_logits(40)
    uniform = torch.from_numpy(uniforms(0, "row", 40, 12))
    whole = sparse_from_logits(logits, kind="sampled", n=12, temperature=1.0, uniform=uniform)
    parts = [
        sparse_from_logits(logits[at : at + 7], kind="sampled", n=12, temperature=1.0, uniform=uniform[at : at + 7])
        for at in range(0, 40, 7)
    ]
    joined = join_targets(parts)
    for name in ("offsets", "ids", "counts", "logp", "normalisers"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    cut = slice_targets(whole, 7, 14)
    for name in ("offsets", "ids", "counts", "logp", "normalisers"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(parts[1], name))


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=400),
    st.lists(st.floats(0, 0.9999998807907104, width=32), min_size=1, max_size=5),
)
def test_inversion_finds_an_id_that_has_probability(weights: list[float], points: list[float]) -> None:
    p = torch.tensor([weights]) + 0.0
    if float(p.sum()) < 1e-3:
        p[0, len(weights) // 2] = 1.0
    drawn = invert(p, torch.tensor([points]))
    assert ((drawn >= 0) & (drawn < len(weights))).all()
    cumulative = p[0].double().cumsum(0)
    for point, at in zip(points, drawn[0].tolist(), strict=True):
        goal = point * float(cumulative[-1])
        slack = 1e-4 * float(cumulative[-1])
        assert float(cumulative[at]) >= goal - slack
        assert float(cumulative[at] - p[0, at].double()) <= goal + slack


def test_normalisers_are_exact() -> None:
    logits = zipf_logits(6) * 1.7
    targets = _sampled(logits, 12, temperature=1.3)
    logp = torch.log_softmax(logits.double(), -1)
    assert targets.temperatures == stored_temperatures(1.3)
    assert targets.temperatures[-1] == 1.3
    for t in targets.temperatures:
        found = targets.normaliser(t)
        assert found is not None
        np.testing.assert_allclose(found, torch.logsumexp(logp / t, -1).numpy(), atol=2e-4)
    assert (targets.normaliser(1.0) == 0).all()  # pyright: ignore[reportOptionalMemberAccess]
    assert targets.normaliser(1.77) is None
    kept = logp.numpy()[targets.rows, targets.ids]
    np.testing.assert_allclose(targets.logp, kept, atol=1e-4)


def test_a_hopeless_id_is_not_drawn_and_extremes_stay_finite() -> None:
    logits = torch.full((3, VOCAB), -1e4)
    logits[:, 17] = 50.0
    targets = _sampled(logits, 12)
    assert targets.ids.tolist() == [17, 17, 17]
    assert targets.counts.tolist() == [12, 12, 12]
    assert np.isfinite(targets.normalisers).all()
    np.testing.assert_allclose(targets.logp, 0, atol=1e-6)


def test_top_k_is_exact_at_stored_temperatures_and_refuses_others() -> None:
    logits = zipf_logits(5)
    targets = sparse_from_logits(logits, kind="top-k", n=8, temperature=1.25)
    for temperature in (1.0, 1.25, 2.0):
        p = torch.softmax(logits.double() / temperature, -1).numpy()
        best = np.sort(p, 1)[:, ::-1][:, :8]
        np.testing.assert_allclose(targets.probabilities(temperature).reshape(5, 8), best, rtol=1e-3)
    with pytest.raises(UsageError, match=r"no normaliser for temperature 1\.9"):
        targets.probabilities(1.9)
    with pytest.raises(UsageError, match="only sampled targets"):
        reweight(targets, 1.25, 1.0)


@given(st.integers(0, 1000), st.floats(0.55, 1.5), st.integers(1, 40))
def test_reweighting_keeps_the_mass_and_an_honest_sample_size(seed: int, goal: float, n: int) -> None:
    targets = _sampled(zipf_logits(4, seed=seed), n, 1.0, seed)
    weighted, effective = reweight(targets, 1.0, goal)
    np.testing.assert_allclose(np.add.reduceat(weighted.counts, weighted.offsets[:-1]), n, rtol=1e-4)
    assert 1.0 - 1e-6 <= effective <= n + 1e-6
    assert weighted.temperature == goal
    same, all_of_it = reweight(targets, 1.0, 1.0)
    np.testing.assert_allclose(same.counts, targets.counts, rtol=1e-6)
    assert all_of_it == pytest.approx(n)


def test_reweighting_comes_near_the_other_temperature_and_refuses_to_go_far() -> None:
    logits = zipf_logits(300)
    drawn = _sampled(logits, 200, 1.5)
    p = torch.softmax(logits.double(), -1).numpy()
    at_goal = _dense(reweight(drawn, 1.5, 1.0)[0], 1.0)
    as_drawn = _dense(drawn, 1.5)
    assert np.abs(at_goal.mean(0) - p.mean(0)).sum() < 0.1
    best = p.argmax(1)
    rows = np.arange(300)
    assert abs(at_goal[rows, best].mean() - p[rows, best].mean()) < 0.01
    assert abs(as_drawn[rows, best].mean() - p[rows, best].mean()) > 0.05
    assert drawn.probabilities(1.0).sum() == pytest.approx(300, rel=1e-4)
    with pytest.raises(UsageError, match=r"drawn at temperature 1\.5 cannot be re-weighted to 0\.9"):
        reweight(drawn, 1.5, 0.9)
    with pytest.raises(UsageError, match=r"were drawn at temperature 1\.5, not 1"):
        reweight(drawn, 1.0, 1.2)


def _header(**changes: object) -> TargetsHeader:
    header = TargetsHeader(
        kind="sampled",
        n=12,
        temperature=1.0,
        temperatures=stored_temperatures(1.0),
        vocab_size=VOCAB,
        tokenizer="a" * 64,
        teacher="rev",
        seed=0,
    )
    return replace(header, **changes)  # pyright: ignore[reportArgumentType]


def _top_sampled(logits: torch.Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> SparseTargets:
    uniform = torch.from_numpy(uniforms(seed, "row", len(logits), n))
    return sparse_from_logits(logits, kind="top-sampled", n=n, temperature=temperature, uniform=uniform)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_best_ids_are_exact_and_the_rest_unbiased(temperature: float) -> None:
    logits = zipf_logits(1).repeat(400, 1)
    n = 48
    p = torch.softmax(logits[0].double() / temperature, -1).numpy()
    estimate = _dense(_top_sampled(logits, n, temperature), temperature)
    np.testing.assert_allclose(estimate.sum(1), 1, rtol=1e-4)
    best = p.argsort()[::-1][:32]
    np.testing.assert_allclose(estimate[:, best], np.tile(p[best], (400, 1)), rtol=2e-3)
    rest = np.delete(np.arange(VOCAB), best)
    share = p[rest] / p[rest].sum()
    error = p[rest].sum() * np.sqrt(share * (1 - share) / (400 * 16))
    assert (np.abs(estimate[:, rest].mean(0) - p[rest]) / error).max() < 5.5


def test_exact_best_ids_make_the_estimate_better_where_they_hold_most() -> None:
    """1 / rank^2: the best 8 hold 0.93. (1 / rank: 0.43, and the estimates are as good as each other.)"""
    logits = 2 * zipf_logits(400)
    p = torch.softmax(logits.double(), -1).numpy()
    errors = [((_dense(make(logits, 12), 1.0) - p) ** 2).sum(1).mean() for make in (_top_sampled, _sampled)]
    assert errors[0] < 0.2 * errors[1]


def test_top_sampled_where_nothing_is_left_to_draw() -> None:
    logits = torch.full((3, VOCAB), -1e4)
    logits[:, 17] = 50.0
    targets = _top_sampled(logits, 12)
    assert targets.positions == 3
    found = _dense(targets, 1.0)
    np.testing.assert_allclose(found[:, 17], 1, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert np.isfinite(targets.logp).all()


@given(st.integers(0, 1000), st.integers(3, 40), st.sampled_from([0.75, 1.0, 1.25]))
def test_top_sampled_weights_add_up_and_reach_near_temperatures(seed: int, n: int, goal: float) -> None:
    targets = _top_sampled(zipf_logits(4, seed=seed), n, 1.0, seed)
    draws = targets.as_draws()
    assert draws.kind == "sampled"
    np.testing.assert_allclose(np.add.reduceat(draws.counts, draws.offsets[:-1]), n, rtol=1e-3)
    np.testing.assert_allclose(np.add.reduceat(targets.probabilities(goal), targets.offsets[:-1]), 1, rtol=1e-4)
    assert _sampled(zipf_logits(1), 5).as_draws().kind == "sampled"


@pytest.mark.parametrize("kind", ["sampled", "top-k", "top-sampled"])
@pytest.mark.parametrize("vocab_size", [VOCAB, 152_064])
def test_parquet_round_trip(tmp_path: Path, kind: str, vocab_size: int) -> None:
    examples = make_examples(30)
    soft = score(make_llama(), examples, kind=kind)  # pyright: ignore[reportArgumentType]
    path = tmp_path / "targets.parquet"
    header = _header(kind=kind, vocab_size=vocab_size)
    with TargetsWriter(path, header) as writer:
        for example, one in reversed(list(zip(examples, soft, strict=True))):
            writer.write(example, one)
    assert read_header(path) == header
    assert [file.name for file in tmp_path.iterdir()] == ["targets.parquet"]
    back = read_targets(path, examples, tokenizer="a" * 64)
    for one, other in zip(soft, back, strict=True):
        np.testing.assert_array_equal(one.offsets, other.offsets)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_allclose(one.logp, other.logp, rtol=1e-3)
        np.testing.assert_allclose(one.normalisers, other.normalisers, rtol=1e-3, atol=1e-3)


def test_rows_are_tied_to_their_tokens_and_tokenizer(tmp_path: Path) -> None:
    examples = make_examples(3)
    path = tmp_path / "targets.parquet"
    with TargetsWriter(path, _header()) as writer:
        for example, one in zip(examples, score(make_llama(), examples), strict=True):
            writer.write(example, one)
    moved = replace(examples[1], completion_ids=(*examples[1].completion_ids[:-1], 0))
    with pytest.raises(UsageError, match=r"row 'row-1' has no soft targets: its tokens are not the ones"):
        read_targets(path, [examples[0], moved])
    with pytest.raises(UsageError, match=r"row 'new' has no soft targets: it was not scored"):
        read_targets(path, [Example("new", (1,), (2,))])
    with pytest.raises(UsageError, match="scored with tokenizer aaaaaaaaaaaa, the student has bbbbbbbbbbbb"):
        read_targets(path, examples, tokenizer="b" * 64)
    renamed = [replace(one, id=f"other-{one.id}") for one in examples]  # the tokens decide, not the name
    assert len(read_targets([path], renamed)) == 3


def test_a_file_that_is_none_or_half_written_is_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"not parquet"), ("empty", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not a file of soft targets"):
            read_header(path)
    with pytest.raises(UsageError, match="not a file of soft targets"):
        read_header(tmp_path / "missing")
    example = make_examples(1)[0]
    with pytest.raises(RuntimeError), TargetsWriter(tmp_path / "half", _header()) as writer:
        writer.write(example, score(make_llama(), [example])[0])
        raise RuntimeError
    assert not (tmp_path / "half").exists()
    with pytest.raises(UsageError, match="at most 255"):
        TargetsWriter(tmp_path / "many", _header(n=256))


def test_a_mismatched_row_is_refused(tmp_path: Path) -> None:
    one, two = make_examples(2)
    soft = score(make_llama(), [one])[0]
    longer = replace(two, completion_ids=(1,) * 20)
    with TargetsWriter(tmp_path / "targets", _header()) as writer:
        with pytest.raises(UsageError, match="of 20 tokens"):
            writer.write(longer, soft)
        with pytest.raises(UsageError, match="another kind or temperature"):
            writer.write(one, replace(soft, temperature=2.0))


def test_a_token_costs_under_48_bytes_on_disk(tmp_path: Path, smollm2: Path) -> None:
    """n = 12 over prose, whose distributions are the wide ones, and a vocabulary of 49,152."""
    from edgedistill.teachers.transformers import TransformersTeacher

    teacher = TransformersTeacher(smollm2)
    chat = resources.files("edgedistill.recipes").joinpath("quickstart/data/general.jsonl").read_text()
    ids = teacher.tokenizer.encode(PROSE + chat, add_special_tokens=False)[:1500]
    examples = [
        Example(str(at), tuple(ids[at : at + 4]), tuple(ids[at + 4 : at + 64])) for at in range(0, len(ids), 64)
    ]
    examples = [one for one in examples if len(one.completion_ids) > 8]
    path = tmp_path / "targets.parquet"
    header = _header(vocab_size=teacher.vocab_size, tokenizer=teacher.tokenizer_hash)
    with TargetsWriter(path, header) as writer:
        for at, one in teacher.score(examples, n=12):
            writer.write(examples[at], one)
    tokens = sum(len(one.completion_ids) for one in examples)
    unique = np.mean([len(one.ids) / one.positions for one in read_targets(path, examples)])
    assert unique > 3, "the text is too easy to measure on"
    assert path.stat().st_size / tokens < 48


PROSE = """
The lighthouse keeper had not spoken to another person for eleven weeks when the boat came. It came at noon, against
the tide, with a brown sail that he did not know, and a woman at the tiller who waved as if they had parted the day
before. He put down the lamp oil. On the mainland they would be cutting barley now; here the only harvest was of wreckage,
planks and rope and once a crate of oranges, which he had rationed until the last of them turned green. She threw him a
line. He caught it badly. "You are Thomas Wray," she said, and it was not a question. Behind her, under canvas, something
large shifted its weight and sighed. Chemists distinguish between accuracy and precision: a balance that always reads
half a gram too much is precise but not accurate, while one whose readings scatter around the true value is accurate on
average and useless for a single weighing. The same holds for clocks, for thermometers, and for witnesses in court. In
1847 the council voted, nine against seven, to pave the road to the harbour, on condition that the owners of the three
warehouses paid for the drains; two of them refused, and the question was still open when the railway made it pointless.
"""


def test_the_tokenizers_hash_ignores_the_last_call(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    before = tokenizer_hash(tokenizer)
    tokenizer(["one", "two three four"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != before
