"""How well a model names labels, and how sure it is of them: F1, calibration error and Brier score beside the accuracy.

The probability of a label is that of its tokens and the token that ends the answer, given the prompt, over the sum of all labels':
what a program that may answer with a label alone would go by. What the model writes freely is scored apart, by accuracy and F1, and
may be no label. Macro-F1 is the mean over the labels that occur, as references or as answers, as scikit-learn has it. Calibration
error: 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599), biased upwards where rows are few. Brier score: the squared error
summed over the labels, from 0 to 2 (Brier 1950). Intervals are bootstraps over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgedistill.data.labels import read_label
from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed
from edgedistill.evals.calibration import BINS
from edgedistill.evals.runners.base import Progress, Runner
from edgedistill.evals.statistics import LEVEL, RESAMPLES, Estimate, bootstrap

DIGITS = 6
"""Decimals of a probability that is kept."""


def label_probabilities(
    runner: Runner, rows: Sequence[Row], names: Sequence[str], *, progress: Progress | None = None
) -> np.ndarray:
    """Return the probability of each label given each row's prompt, normalised over the labels: float64 [rows, labels].

    Raises StepFailed where a model gives none of them any.
    """
    end = runner.end_token()
    tails = [[*runner.encode_text(name), end] for name in names]
    prompts = [runner.encode(row) for row in rows]
    found = np.empty((len(rows), len(names)))
    for at, logprobs in enumerate(runner.continued(prompts, tails)):
        if not np.isfinite(logprobs).any():
            raise StepFailed(
                f"row {rows[at].id!r}: the model gives no label any probability",
                "The model is damaged (NaN weights?): build it again.",
            )
        shares = np.exp(logprobs - np.max(logprobs))
        found[at] = shares / shares.sum()
        if progress is not None:
            progress(at + 1, len(rows), "labels")
    return found


def named(answers: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return the number of the label that each answer is, -1 where it is none: int [rows]."""
    numbers = {name: at for at, name in enumerate(names)}
    read = (read_label(answer, names) for answer in answers)
    return np.asarray([-1 if name is None else numbers[name] for name in read])


def macro_f1(wanted: np.ndarray, given: np.ndarray, count: int) -> tuple[Estimate, dict[int, dict[str, float]]]:
    """Return macro-F1 and, by label, precision, recall, f1 and the number of references; ``given`` -1 is no label."""
    labels = np.arange(count)
    is_wanted, is_given = wanted[:, None] == labels, given[:, None] == labels
    counts = np.concatenate([is_wanted & is_given, is_wanted, is_given], axis=1).astype(np.float64)  # [rows, 3 labels]

    def of(sums: np.ndarray) -> np.ndarray:
        hits, either = sums[:, :count], sums[:, count : 2 * count] + sums[:, 2 * count :]
        each = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
        return each.sum(axis=1) / np.maximum((either > 0).sum(axis=1), 1)

    rows = len(wanted)
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    low, high = np.quantile(of(drawn @ counts), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]).tolist()
    total = counts.sum(axis=0)
    value = float(of(total[None, :])[0])
    table = {}
    for at in range(count):
        hits, asked, said = (float(total[part * count + at]) for part in range(3))
        if asked or said:
            table[at] = {
                "precision": hits / said if said else 0.0,
                "recall": hits / asked if asked else 0.0,
                "f1": 2 * hits / (asked + said),
                "n": int(asked),
            }
    return Estimate(value=value, low=low, high=high, n=rows, method="bootstrap over rows"), table


def brier(probabilities: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the Brier score of each row: [rows]."""
    truth = np.arange(probabilities.shape[1]) == wanted[:, None]
    return ((probabilities - truth) ** 2).sum(axis=1)


def label_calibration(probabilities: np.ndarray, wanted: np.ndarray) -> dict[str, Estimate]:
    """Return ``error`` (expected calibration error), ``gap`` (mean confidence less the share that is right: above 0 is too sure),
    ``brier``, ``nll`` (of the reference, in nats) and ``top`` (how often the likeliest label is right).
    """
    rows, first = np.arange(len(wanted)), probabilities.argmax(axis=1)
    sure, right = probabilities[rows, first], (first == wanted).astype(np.float64)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.zeros((len(rows), BINS))
    gaps[rows, bins] = sure - right
    drawn = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    errors = np.abs(drawn @ gaps).sum(axis=1) / len(rows)
    low, high = np.quantile(errors, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]).tolist()
    error = float(np.abs(gaps.sum(axis=0)).sum() / len(rows))
    nll = -np.log(np.maximum(probabilities[rows, wanted], 10.0**-DIGITS))
    return {
        "error": Estimate(value=error, low=low, high=high, n=len(rows), method="bootstrap over rows"),
        **{
            name: bootstrap(values, lambda sample: sample.mean(axis=1), method="bootstrap of the mean")
            for name, values in (
                ("gap", sure - right),
                ("brier", brier(probabilities, wanted)),
                ("nll", nll),
                ("top", right),
            )
        },
    }


def label_figures(
    names: Sequence[str], references: Sequence[str], answers: Sequence[str], probabilities: np.ndarray | None
) -> dict[str, Any]:
    """Return what a report shows of a suite of labels, as plain values; without ``probabilities`` (a served model) F1 alone."""
    wanted, given = named(references, names), named(answers, names)
    f1, table = macro_f1(wanted, given, len(names))
    calibrated = {} if probabilities is None else label_calibration(probabilities, wanted)
    return {
        "n": len(references),
        "macro_f1": f1.to_json(),
        "unnamed": int((given < 0).sum()),
        "by_label": {names[at]: one for at, one in table.items()},
        **{name: one.to_json() for name, one in calibrated.items()},
    }
