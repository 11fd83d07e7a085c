"""Suites: what is scored, stored and compared, with a runner that answers from a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals import likelihood
from edgedistill.evals.runners.base import Answer, Progress, continued_by_rows
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.suites import SuiteResult, compare, evaluate, load_scores


class Table:
    """A runner that answers row i with ``texts[i]``; its next-token distributions are a table by last token."""

    def __init__(self, texts: Sequence[str] = (), table: np.ndarray | None = None, shift: int = 0) -> None:
        self.texts, self.shift = texts, shift
        self.table = np.log(table if table is not None else np.full((6, 6), 1 / 6))
        self.grammars: list[str | None] = []
        self.readings = 0

    def describe(self) -> dict[str, Any]:
        return {"engine": "table"}

    def encode(self, row: Row) -> list[int]:
        return [1, 2 + self.shift]

    def pieces(self) -> list[str]:
        return [str(at) if self.shift == 0 else f"other {at}" for at in range(self.table.shape[1])]

    def encode_text(self, text: str) -> list[int]:
        return [int(c) % 6 for c in text if c.isdigit()]

    def end_token(self) -> int:
        return 0

    def answer(
        self, rows: Sequence[Row], *, max_new_tokens: int, grammar: str | None = None, progress: Progress | None = None
    ) -> list[Answer]:
        self.grammars.append(grammar)
        return [
            Answer(
                id=row.id, text=text, token_ids=tuple(map(ord, text)), seconds=0.5, finish="stop" if text else "length"
            )
            for row, text in zip(rows, self.texts, strict=True)
        ]

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        pass

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        return continued_by_rows(self, prompts, tails)

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        self.readings += 1
        for ids, wanted in zip(token_rows, positions, strict=True):
            yield self.table[[ids[p] for p in wanted]].astype(np.float32)

    def close(self) -> None:
        pass


def call(name: str, n: int) -> str:
    return json.dumps({"name": name, "arguments": {"n": n}})


ROWS = [
    Row(
        id=f"r{9 - i}",
        messages=({"role": "user", "content": str(i)},),
        reference=call("a" if i < 6 else "b", i),
        tags=("low",) if i < 3 else (),
    )
    for i in range(10)
]
RIGHT = [row.reference or "" for row in ROWS]


def answers(*wrong: int, broken: Sequence[int] = ()) -> list[str]:
    return ["" if i in broken else call("a", 99) if i in wrong else text for i, text in enumerate(RIGHT)]


def test_an_evaluation_is_scored_tabled_and_stored(tmp_path: Path) -> None:
    runner = Table(answers(0, 7, broken=[8]))
    result = evaluate(runner, ROWS, "json-exact", max_new_tokens=40, grammar="root ::= [a]")
    assert runner.grammars == ["root ::= [a]"]
    assert (result.n, result.score.value, result.score.n, result.score.method) == (10, 0.7, 10, "wilson")
    assert result.valid_json is not None
    assert result.valid_json.value == 0.9
    assert result.by_tag["low"].value == pytest.approx(2 / 3)
    assert {name: (e.value, e.n) for name, e in result.by_function.items()} == {"a": (5 / 6, 6), "b": (0.5, 4)}
    assert (result.cut, result.seconds, len(result.grammar or "")) == (1, 5.0, 64)
    assert result.rows[7].details == {"function": "b", "called": "a"}
    result.save(tmp_path)
    assert SuiteResult.load(tmp_path) == result
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result.summary()))
    (tmp_path / "answers").mkdir()
    result.save_answers(tmp_path / "answers" / "holdout.jsonl")
    assert "seconds" not in (tmp_path / "answers" / "holdout.jsonl").read_text()  # the same answers are the same bytes
    assert load_scores(tmp_path, "holdout") == [row.score for row in reversed(result.rows)]  # by id


def test_stored_evaluations_that_are_damaged(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not readable as answers"):
        load_scores(tmp_path, "holdout")
    result = evaluate(Table(answers()), ROWS, "exact")
    assert result.valid_json is None
    assert result.by_function == {}
    result.save(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[:4]))
    with pytest.raises(UsageError, match="rows are missing"):
        SuiteResult.load(tmp_path)
    (tmp_path / "answers.jsonl").write_text(lines[0][:30])
    with pytest.raises(UsageError, match="not readable"):
        SuiteResult.load(tmp_path)


def test_answers_with_odd_characters_survive(tmp_path: Path) -> None:
    odd = ["\u2028", "\ud83d", "\x00", '"\\', "日本", *RIGHT[5:]]
    result = evaluate(Table(odd), ROWS, "contains")
    result.save(tmp_path)
    assert [row.text for row in SuiteResult.load(tmp_path).rows] == odd


def test_comparing_pairs_rows_by_id() -> None:
    teacher, student = evaluate(Table(answers(0)), ROWS, "exact"), evaluate(Table(answers(0, 1, 2)), ROWS, "exact")
    found = compare(student, teacher)
    assert found.difference.value == pytest.approx(-0.2)
    assert found.retention is not None
    assert found.retention.value == pytest.approx(7 / 9)
    assert found.retention.low < 7 / 9 < found.retention.high
    assert json.loads(json.dumps(found.to_json()))["n"] == 10
    shuffled = SuiteResult(**{**student.__dict__, "rows": student.rows[::-1]})
    assert compare(shuffled, teacher).difference == found.difference
    nothing = evaluate(Table(answers(*range(10))), ROWS, "exact")
    assert compare(student, nothing).retention is None
    with pytest.raises(UsageError, match="cannot compare exact with contains"):
        compare(student, evaluate(Table(answers()), ROWS, "contains"))
    with pytest.raises(UsageError, match="different rows"):
        compare(student, evaluate(Table(answers()[:5]), ROWS[:5], "exact"))


def test_what_is_refused_before_anything_is_decoded() -> None:
    runner = Table(answers())
    bare = Row(id="bare", messages=ROWS[0].messages)
    plain = Row(id="plain", messages=ROWS[0].messages, reference="five")
    for rows, message in (
        ([], "needs rows"),
        ([*ROWS, bare], "row 'bare' has no ref"),
        ([plain], "'plain': json-exact"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(runner, rows, "json-exact")
    with pytest.raises(UsageError, match="decodes nothing"):
        evaluate(runner, ROWS, "perplexity", grammar="root ::= [a]")
    with pytest.raises(UsageError, match="unknown metric"):
        evaluate(runner, ROWS, "bleu")
    assert runner.grammars == []


DIGITS = [
    Row(
        id=str(i),
        messages=({"role": "user", "content": "x"},),
        reference="34" * (1 + i),
        tags=(("t",) if i < 2 else ()),
    )
    for i in range(5)
]


def peaked(p: float) -> np.ndarray:
    """Return a table in which 3 follows 2 and 4, 4 follows 3, each with probability p."""
    table = np.full((6, 6), (1 - p) / 5)
    for last, following in ((2, 3), (3, 4), (4, 3)):
        table[last, following] = p
    return table


def test_perplexity_is_taken_over_the_answer_only() -> None:
    found = likelihood.perplexity(Table(table=np.full((6, 6), 1 / 6)), DIGITS)
    assert found.perplexity.value == pytest.approx(6, rel=1e-6)
    assert found.tokens == sum(2 * (1 + i) + 1 for i in range(5))
    table = peaked(0.5)
    found = likelihood.perplexity(Table(table=table), DIGITS)
    # 2 -> 3 -> 4 -> 3 ... each at 0.5, then the end token at 0.1.
    total = sum(2 * (1 + i) * math.log(2) + math.log(10) for i in range(5))
    assert found.nll.value == pytest.approx(total / found.tokens, rel=1e-6)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    data = found.to_json()
    assert data["value"] == found.perplexity.value
    assert json.dumps(data)

    result = evaluate(Table(table=table), DIGITS, "perplexity")
    assert result.score == found.perplexity
    assert result.by_tag["t"].n == 2
    worse = evaluate(Table(), DIGITS, "perplexity")
    comparison = compare(result, worse)
    assert comparison.retention is None
    assert comparison.difference.value == pytest.approx(found.nll.value - math.log(6), abs=1e-6)


def test_divergence_is_the_textbooks() -> None:
    p, q = peaked(0.9), peaked(0.5)
    found = likelihood.divergence(Table(table=q), Table(table=p), DIGITS)
    each = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.02 / 0.1)
    assert found.kld.value == pytest.approx(each, rel=1e-4)
    assert found.p50 == pytest.approx(each, rel=1e-4)
    assert found.max == pytest.approx(each, rel=1e-4)
    assert found.top1.value == 1
    assert (found.rows, found.tokens) == (5, 35)
    assert json.dumps(found.to_json())
    same = likelihood.divergence(Table(table=p), Table(table=p), DIGITS)
    assert same.kld.value == same.max == 0
    moved = np.roll(p, 1, axis=1)
    assert likelihood.divergence(Table(table=moved), Table(table=p), DIGITS).top1.value == 0


def test_several_references_are_compared_in_one_reading() -> None:
    p, q = peaked(0.9), peaked(0.5)
    candidate = Table(table=q)
    together = likelihood.divergences(candidate, {"student": Table(table=p), "teacher": Table(table=q)}, DIGITS)
    assert candidate.readings == 1
    assert list(together) == ["student", "teacher"]
    assert together["student"] == likelihood.divergence(Table(table=q), Table(table=p), DIGITS)
    assert together["teacher"].kld.value == 0
    with pytest.raises(UsageError, match="different tokens"):
        likelihood.divergences(Table(), {"student": Table(), "teacher": Table(shift=1)}, DIGITS)


def test_a_teacher_with_another_tokenizer_is_left_out_where_that_may_be() -> None:
    other = Table(shift=1)
    both = {"student": Table(), "teacher": other}
    assert list(likelihood.divergences(Table(), both, DIGITS, unlike=["teacher"])) == ["student"]
    assert likelihood.divergences(Table(), {"teacher": other}, DIGITS, unlike=["teacher"]) == {}
    with pytest.raises(
        UsageError, match="different tokens"
    ):  # an artifact that reads otherwise than its student is broken
        likelihood.divergences(Table(), {"student": other, "teacher": Table()}, DIGITS, unlike=["teacher"])


def test_a_padded_vocabulary_is_cut() -> None:
    p = np.log(np.array([[0.5, 0.25, 0.25]], dtype=np.float32))
    q = np.log(np.array([[0.25, 0.125, 0.125, 0.5]], dtype=np.float32))
    kld, same = likelihood.kl_divergence(p, q)
    assert kld == pytest.approx([0.0], abs=1e-6)
    assert same.tolist() == [True]


def test_divergence_refuses_other_tokens_and_broken_models() -> None:
    with pytest.raises(UsageError, match="different tokens"):
        likelihood.divergence(Table(shift=1), Table(), DIGITS)
    with pytest.raises(UsageError, match="no rows"):
        likelihood.divergence(Table(), Table(), [])
    with pytest.raises(UsageError, match="no rows"):
        likelihood.perplexity(Table(), [])
    with pytest.raises(StepFailed, match="not finite"):
        likelihood.divergence(Table(table=np.full((6, 6), np.nan)), Table(), DIGITS)
    with pytest.raises(StepFailed, match="no probability"):
        likelihood.perplexity(Table(table=np.full((6, 6), np.nan)), DIGITS)
    bare = Row(id="bare", messages=ROWS[0].messages)
    with pytest.raises(UsageError, match="'bare' has no reference"):
        likelihood.perplexity(Table(), [bare])


def test_a_trimmed_vocabulary_is_compared_over_the_tokens_that_both_have(
    tiny_file: Path, tiny_hf: Path, rows: list[Row], tmp_path: Path
) -> None:
    """The same weights with fewer tokens are no distance away, but for first choices that are gone."""
    from edgedistill.evals.runners.transformers import TransformersRunner
    from edgedistill.formats.gguf.convert import convert
    from edgedistill.training.recipe import load_model
    from edgedistill.training.vocabulary import choose_tokens, trim_vocabulary, write_trimmed_tokenizer

    with GgufRunner(tiny_file) as full, TransformersRunner(tiny_hf, dtype="float32") as hf:
        assert full.pieces() == hf.pieces()
        taught = [row for row in rows if "percent" not in row.messages[1]["content"]]
        used = {token for row in likelihood.token_rows(full, taught) for token in row.ids}
        kept = choose_tokens(tiny_hf, used, 320)
        small = tmp_path / "small"
        trim_vocabulary(load_model(tiny_hf), kept).save_pretrained(small)
        write_trimmed_tokenizer(tiny_hf, small, kept)
        convert(small, tmp_path / "small.gguf", dtype="f32")
        with GgufRunner(tmp_path / "small.gguf") as trimmed:
            assert trimmed.pieces() == [full.pieces()[at] for at in kept]
            found = likelihood.divergence(trimmed, full, rows)
            odd = [row for row in rows if row not in taught and "percent" in row.messages[1]["content"]][:2]
            both = likelihood.divergences(trimmed, {"itself": trimmed, "whole": full}, odd)
            assert list(both) == ["itself"]  # no row that both cut alike
            with pytest.raises(UsageError, match="every row into different tokens"):
                likelihood.divergence(trimmed, full, odd)
            with pytest.raises(UsageError, match="different tokens"):  # the whole is no part of the trimmed one
                likelihood.divergence(full, trimmed, rows)
        same = likelihood.token_rows(full, rows)
        alike = [row for row in same if set(row.ids) <= set(kept.tolist())]
        assert 0 < found.rows == len(alike) < len(rows)
        assert found.kld.value < 1e-6
        first = full.logprobs([row.ids for row in alike], [row.positions for row in alike])
        gone = sum(int((~np.isin(one.argmax(axis=1), kept)).sum()) for one in first)
        assert gone > 0
        assert found.top1.value == pytest.approx(1 - gone / found.tokens)


def test_distributions_of_files(tiny_file: Path, tiny_hf: Path, rows: list[Row], tmp_path: Path) -> None:
    from edgedistill.evals.runners.transformers import TransformersRunner
    from edgedistill.formats.gguf.quantize import quantize

    small = tmp_path / "q4.gguf"
    quantize(tiny_file, small, "Q4_0", imatrix=None, threads=1)
    with (
        GgufRunner(small) as quantized,
        GgufRunner(tiny_file) as full,
        TransformersRunner(tiny_hf, dtype="float32") as hf,
    ):
        lossy = likelihood.compare_distributions(quantized, {"f16": tiny_file}, rows[:12], store=tmp_path, threads=1)[
            "f16"
        ]
        same = likelihood.compare_distributions(full, {"f16": tiny_file}, rows[:12], store=tmp_path, threads=1)["f16"]
        hop = likelihood.compare_distributions(hf, {"f16": tiny_file}, rows[:12], store=tmp_path, threads=1)["f16"]
    assert same.kld.value == 0
    assert same.top1.value == 1
    assert hop.kld.value < 1e-4
    assert lossy.kld.low > 0.005
    assert lossy.p50 <= lossy.p99 <= lossy.max
    assert lossy.top1.value < 1
