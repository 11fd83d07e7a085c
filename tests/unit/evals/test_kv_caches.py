"""KV caches of other types than f16: what the runner makes of them, and what they cost where the context is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals import kv_cache
from edgedistill.evals.kv_cache import LAST, compare_caches, long_rows, rows_for
from edgedistill.evals.runners.gguf import GgufRunner
from tests.unit.formats.gguf.conftest import make_model

CONTEXT = 320
TEXTS = [[(7 * row + 3 * at * at) % 300 + 3 for at in range(90 + row)] for row in range(9)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose heads have 32 dimensions: a block of the quantized types."""
    from edgedistill.formats.gguf.convert import convert

    folder = tmp_path_factory.mktemp("kv")
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return convert(make_model(folder / "hf", max_position_embeddings=CONTEXT, **heads), folder / "m.gguf").path


def test_rows_fill_the_context_and_begin_with_different_texts() -> None:
    texts = [[1, 1, 1], [], [2, 2], [3, 3, 3, 3], [4]]
    assert long_rows(texts, 6, 2) == [[1, 1, 1, 2, 2, 3], [3, 3, 3, 3, 4, 1]]
    assert long_rows([[5, 6]], 5, 2) == [[5, 6, 5, 6, 5]] * 2
    with pytest.raises(UsageError, match="no text to fill the context with"):
        long_rows([[]], 6, 2)
    assert [rows_for(context) for context in (128, 2048, 4096, 131072)] == [16, 8, 4, 4]


def by_the_binding(file: Path, rows: list[list[int]], **options: Any) -> np.ndarray:
    """Return log-probabilities after the last tokens of each row, by llama-cpp-python's own ``Llama``."""
    from edgedistill.formats.gguf.model_io import all_logits, open_model

    model = open_model(file, n_ctx=1024, flash_attn=True, **options)
    logits = np.stack([all_logits(model, row, start=len(row) - LAST) for row in rows]).astype(np.float64)
    model.close()
    return logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)


def test_the_cost_of_a_cache_is_what_the_binding_shows(file: Path) -> None:
    rows = long_rows(TEXTS, CONTEXT, rows_for(CONTEXT))
    p = by_the_binding(file, rows)
    found = {}
    for kv, numbers in ((("q8_0", "q8_0"), (8, 8)), (("q8_0", "q4_0"), (8, 2)), (("q4_0", "q4_0"), (2, 2))):
        q = by_the_binding(file, rows, type_k=numbers[0], type_v=numbers[1])
        wanted = (np.exp(p) * (p - q)).sum(2)
        found[kv] = compare_caches(file, TEXTS, 4096, kv, threads=2)
        kld = found[kv]["kld"]
        assert kld["value"] == pytest.approx(wanted.mean(), rel=0.02)
        error = wanted.mean(1).std(ddof=1) / len(rows) ** 0.5
        assert found[kv]["standard_error"] == pytest.approx(error, rel=0.05)
        assert kld["low"] < kld["value"] < kld["high"]
        assert found[kv]["top1"]["value"] == pytest.approx((p.argmax(2) == q.argmax(2)).mean(), abs=0.01)
        # What is promised is longer than what the model knows: the model's own context is filled.
        assert (found[kv]["context"], found[kv]["rows"], found[kv]["tokens"]) == (CONTEXT, len(rows), LAST * len(rows))
        assert found[kv]["text"] == sum(map(len, TEXTS)) < CONTEXT * len(rows)
    eight, mixed, four = (one["kld"]["value"] for one in found.values())
    assert 0 < eight < mixed < four
    assert found[("q4_0", "q4_0")]["rounding"]["value"] < four


def test_answers_and_likelihoods_are_of_the_cache_that_was_asked_for(file: Path) -> None:
    rows = [Row(id=f"r{at}", messages=({"role": "user", "content": "go " * (40 + at)},)) for at in range(6)]
    with GgufRunner(file, threads=2) as plain, GgufRunner(file, threads=2, kv=("q4_0", "q4_0")) as small:
        assert small._cell_bytes() * 3.5 < plain._cell_bytes() == 2 * 32 * 2 * 2
        assert (small.describe()["kv_cache"], "kv_cache" in plain.describe()) == ("q4_0", False)
        ids = [plain.encode(row) for row in rows]
        positions = [range(len(one) - 9, len(one)) for one in ids]
        pairs = zip(plain.logprobs(ids, positions), small.logprobs(ids, positions), strict=True)
        assert all(1e-4 < np.abs(one - other).max() < 3 for one, other in pairs)
        answers = small.answer(rows, max_new_tokens=8)
    assert [answer.id for answer in answers] == [row.id for row in rows]


def test_heads_that_no_block_fits_are_told_with_the_key(tiny_file: Path) -> None:
    runner = GgufRunner(tiny_file, threads=1, kv=("q8_0", "q8_0"))  # heads of 16 dimensions
    with runner, pytest.raises(StepFailed, match="with a KV cache in q8_0") as found:
        list(runner.logprobs([[1, 2, 3]], [[2]]))
    assert 'runtime.kv_cache = "f16"' in found.value.hint


@pytest.mark.slow
def test_the_real_model_loses_little_by_eight_bits_and_much_by_four(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys lose more by few bits than values do: the order in which "auto" tries types rests on it."""
    monkeypatch.setattr(kv_cache, "MAX_ROWS", 6)
    with GgufRunner(smollm2_gguf) as runner:
        text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
        texts = [runner.encode_text(text[at : at + 900]) for at in range(0, 27_000, 900)]
    kinds = (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q8_0"), ("q4_0", "q4_0"))
    found = [compare_caches(smollm2_gguf, texts, 256, kv) for kv in kinds]
    eight, values, keys, four = (one["kld"]["value"] for one in found)
    # The weights are quantized, so rounding alone moves distributions: eight bits are not to be told from that.
    assert eight < 2 * found[0]["rounding"]["value"]
    assert eight < values < keys < four * 1.1 and four > 3 * eight
    assert found[0]["top1"]["low"] > found[3]["top1"]["high"]
