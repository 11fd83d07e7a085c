"""The packaged recipe `classify`, reduced: shares of several answers are learnt, and the report says whether they helped."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgedistill.recipes import copy_recipe
from edgedistill.report import collect
from edgedistill.report_html import page
from edgedistill.report_sheets import labels_sheet, verdict_notes
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROWS, PROMPTS, SAMPLES = 8, 12, 4  # rows of each suite
ARM = "most frequent label"
REDUCED: dict[str, Any] = {
    **{"adapt.rows": 96, "adapt.epochs": 1.0, "heal.rows": 16, "prompts.rows": PROMPTS, "generate.samples": SAMPLES},
    **{"student.ffn": None, "distill.epochs": 1.0, "calibrate.rows": 8, "gates": {}},
}


def lines(session: Session, step: str, name: str) -> list[dict[str, Any]]:
    entry = session.store.load(session.plan.match(step)[0].key)
    assert entry is not None
    return [json.loads(line) for line in (entry.path / name).read_text().splitlines()]


def plain_label(text: str) -> str:
    """Take off what a model puts around a word."""
    return re.sub(r"[^a-z ]", "", text.lower()).strip()


def plain_macro_f1(rows: list[dict[str, Any]], names: list[str]) -> float:
    """Work out macro-F1 in the plainest way."""
    pairs = [(row["reference"], plain_label(row["text"])) for row in rows]
    each = []
    for name in names:
        hits = sum(wanted == given == name for wanted, given in pairs)
        false, missed = sum(g == name != w for w, g in pairs), sum(w == name != g for w, g in pairs)
        if hits + false + missed:
            each.append(2 * hits / (2 * hits + false + missed))
    return sum(each) / len(each)


def plain_error(rows: list[dict[str, Any]], names: list[str]) -> float:
    """Work out the expected calibration error, 15 bins, in the plainest way."""
    bins: dict[int, list[float]] = {}
    for row in rows:
        sure = max(row["details"]["probabilities"])
        right = names[row["details"]["probabilities"].index(sure)] == row["reference"]
        bins.setdefault(min(int(sure * 15), 14), []).append(sure - right)
    return sum(abs(sum(one)) for one in bins.values()) / len(rows)


def test_shares_are_learnt_and_the_report_says_whether_they_helped(tmp_path: Path, shared_store: Store) -> None:
    folder = copy_recipe("classify", tmp_path / "classify")
    for suite in ("holdout", "ood"):
        path = folder / "data" / f"{suite}.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:ROWS]))
    session = prepare(folder, overrides=REDUCED, store=Store(shared_store.root))
    plan = session.plan.only(session.plan.match("evaluate"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert Runner(plan, session.store).build().ran == []

    names = list(session.recipe.labels.names) if session.recipe.labels else []
    answers = lines(session, "generate", "rows.jsonl")
    assert len(answers) == PROMPTS * SAMPLES
    given: dict[str, Counter[str]] = {}
    for one in answers:
        label = plain_label(one["text"])
        if one["finish"] == "stop" and label in names:
            given.setdefault(one["id"], Counter())[label] += 1
    kept = lines(session, "filter", "kept.jsonl")
    weights: dict[str, dict[str, float]] = {}
    for one in kept:
        weights.setdefault(one["prompt"], {})[one["text"]] = one["weight"]
    assert weights == {
        row: {name: pytest.approx(count / counts.total()) for name, count in counts.items()}
        for row, counts in given.items()
    }
    assert any(len(shares) > 1 for shares in weights.values())  # else there is nothing to learn of shares
    of_arm = lines(session, f"filter@{ARM}", "kept.jsonl")
    assert [one["prompt"] for one in of_arm] == list(given)
    assert all(
        one["weight"] == 1 and given[one["prompt"]][one["text"]] == max(given[one["prompt"]].values()) for one in of_arm
    )

    data = collect(session)
    for name in ("teacher", "student", f"student@{ARM}", "gold-sft", "phone-midrange"):
        model = data.model(name)
        assert model is not None
        for suite in ("holdout", "ood"):
            line, rows = model.suites[suite], lines(session, f"evaluate/{name}", f"answers/{suite}.jsonl")
            assert {figure.n for figure in line.labels.values()} == {ROWS}
            assert line.score is not None and line.score.n == ROWS
            assert line.labels["macro_f1"].value == pytest.approx(plain_macro_f1(rows, names))
            assert line.labels["error"].value == pytest.approx(plain_error(rows, names), abs=1e-4)
            assert 0 <= line.labels["brier"].value <= 2
            assert sum(one["n"] for one in line.by_label.values()) == ROWS
    for one in data.comparisons:
        low, high = one.figure.low, one.figure.high
        assert low is not None and high is not None and one.figure.n == ROWS
        assert one.verdict == ("helped" if low > 0 else "hurt" if high < 0 else "undecided")
    measured = {(one.other, one.suite, one.measure) for one in data.comparisons}
    assert measured == {
        (other, suite, measure)
        for other in (f"student@{ARM}", "gold-sft")
        for suite in ("holdout", "ood")
        for measure in ("score", "brier")
    }
    named = {(row[0], row[1]) for row in labels_sheet(data).rows}
    assert named == {(model.label, suite) for model in data.models for suite in ("holdout", "ood")}
    html, told = page(data), " ".join(verdict_notes(data))
    assert "macro-F1" in html and "Brier score" in html and "Brier score lower by" in told
    assert f"of {len(given)} prompts" in html
    shown = json.loads(json.dumps(data.to_json()))["models"][0]["suites"]["holdout"]["labels"]
    assert shown.keys() == {"macro_f1", "error", "gap", "brier", "nll", "top"}
