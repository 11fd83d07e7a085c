"""Macro-F1, calibration error and Brier score of labels, against figures worked out by hand and the runners' own likelihoods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.prompts import Row
from edgedistill.evals.labels import brier, label_calibration, label_figures, label_probabilities, macro_f1
from edgedistill.evals.metrics import find_metric
from edgedistill.evals.runners import open_runner
from edgedistill.evals.runners.base import continued_by_rows
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.suites import evaluate

NAMES = ("billing", "delivery", "log in", "never used")


def test_macro_f1_by_hand() -> None:
    references = ["billing"] * 4 + ["delivery"] * 3 + ["log in"]
    answers = ["billing", "Billing.", "delivery", "no idea", "delivery", "billing", "DELIVERY", "delivery"]
    # billing: 2 hits of 4 wanted, 3 given: 4/7. delivery: 2 of 3, 4 given: 4/7. log in: 0. never used: no part of it.
    found = label_figures(NAMES, references, answers, None)
    assert found["macro_f1"]["value"] == pytest.approx((4 / 7 + 4 / 7 + 0) / 3)
    assert (found["n"], found["macro_f1"]["n"], found["unnamed"]) == (8, 8, 1)
    assert found["macro_f1"]["low"] < found["macro_f1"]["value"] < found["macro_f1"]["high"]
    assert found["by_label"]["delivery"] == {"precision": 0.5, "recall": 2 / 3, "f1": pytest.approx(4 / 7), "n": 3}
    assert found["by_label"]["log in"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert list(found["by_label"]) == list(NAMES[:3])
    assert "error" not in found  # a served model shows no probabilities


def test_the_interval_of_macro_f1_is_that_of_resampled_rows() -> None:
    rng = np.random.default_rng(5)
    wanted, given = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    given = np.where(rng.random(200) < 0.6, wanted, given)
    found, _ = macro_f1(wanted, given, 3)
    drawn = []
    for _ in range(600):
        rows = rng.integers(0, 200, 200)
        w, g = wanted[rows], given[rows]
        drawn.append(np.mean([2 * np.sum((w == k) & (g == k)) / (np.sum(w == k) + np.sum(g == k)) for k in range(3)]))
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.012)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.012)


def test_calibration_by_hand() -> None:
    table = np.array([[0.7, 0.2, 0.1], [0.7, 0.1, 0.2], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]])
    wanted = np.array([0, 1, 1, 2])
    assert brier(table, wanted).tolist() == pytest.approx([0.14, 1.34, 0.42, 0.24])
    found = label_calibration(table, wanted)
    # 0.7 twice, one right: |1.4 - 1| ; 0.5, right: |0.5 - 1| ; 0.6, right: |0.6 - 1| ; over 4 rows
    assert found["error"].value == pytest.approx((0.4 + 0.5 + 0.4) / 4)
    assert found["gap"].value == pytest.approx((0.7 + 0.7 + 0.5 + 0.6 - 3) / 4)
    assert found["brier"].value == pytest.approx((0.14 + 1.34 + 0.42 + 0.24) / 4)
    assert found["nll"].value == pytest.approx(-(math.log(0.7) + math.log(0.1) + math.log(0.5) + math.log(0.6)) / 4)
    assert found["top"].value == 0.75
    assert all(one.n == 4 and one.low <= one.value <= one.high for one in found.values())


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
def test_a_label_is_as_likely_as_its_tokens(engine: str, tiny_hf: Path, tiny_file: Path, rows: list[Row]) -> None:
    """What follows a prompt that is read once, against whole rows of prompt and label: another way through the engine."""
    runner: Any = GgufRunner(tiny_file, parallel=2) if engine == "llama.cpp" else open_runner(tiny_hf)
    try:
        prompts = [runner.encode(row) for row in rows[:6]]
        tails = [[*runner.encode_text(text), runner.end_token()] for text in ("play", "play music", "no", "a b c d e")]
        tails.append([runner.end_token()])
        found = np.stack(list(runner.continued(prompts, tails)))
        whole = np.stack(list(continued_by_rows(runner, prompts, tails)))
        assert found == pytest.approx(whole, rel=2e-3, abs=0.05)
        names = ("play", "play music", "no")
        probabilities = label_probabilities(runner, rows[:6], names)
        wanted = np.exp(whole[:, :3]) / np.exp(whole[:, :3]).sum(1, keepdims=True)
        assert probabilities == pytest.approx(wanted, abs=0.02)
        assert probabilities.std(axis=0).max() > 1e-3  # the prompts tell
    finally:
        runner.close()


def test_a_suite_of_labels_has_them_in_its_summary_and_its_answers(
    tiny_file: Path, rows: list[Row], tmp_path: Path
) -> None:
    suite = [Row(id=row.id, messages=row.messages, reference=NAMES[at % 3]) for at, row in enumerate(rows[:8])]
    with GgufRunner(tiny_file) as runner:
        result = evaluate(runner, suite, find_metric("label"), max_new_tokens=4, labels=NAMES)
        plain = evaluate(runner, suite, find_metric("label"), max_new_tokens=4)
    summary = result.summary()
    assert "labels" not in plain.summary()
    assert summary["labels"]["n"] == summary["labels"]["brier"]["n"] == 8
    result.save_answers(tmp_path / "answers.jsonl")
    for line in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()):
        assert len(line["details"]["probabilities"]) == len(NAMES)
        assert sum(line["details"]["probabilities"]) == pytest.approx(1.0, abs=1e-5)
