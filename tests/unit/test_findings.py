"""Symptoms: each is told where its figure shows it beyond chance, and not where it might be chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgedistill.recipe import Recipe
from edgedistill.report import CacheLine, Figure, Finding, ReportData, SuiteLine, collect
from edgedistill.report_findings import diagnose
from tests.unit.made_build import make_session


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return collect(make_session(tmp_path_factory.mktemp("findings")))


def figure(value: float, width: float, n: int = 100) -> Figure:
    return Figure(value=value, low=value - width, high=value + width, n=n)


def told(data: ReportData, part: str) -> list[Finding]:
    return [one for one in diagnose(data) if part in one.symptom]


def with_model(data: ReportData, name: str, **changes: Any) -> ReportData:
    return replace(data, models=[replace(one, **changes) if one.id == name else one for one in data.models])


def with_suite(data: ReportData, name: str, suite: str, **changes: Any) -> ReportData:
    model = data.model(name)
    assert model
    return with_model(data, name, suites={**model.suites, suite: replace(model.suites[suite], **changes)})


def test_confident_and_wrong_needs_an_interval_above_the_threshold(built: ReportData) -> None:
    assert not told(built, "surer of its tokens")
    sure = {"error": figure(0.09, 0.02, 64), "gap": figure(0.08, 0.03, 64), "nll": figure(0.3, 0.1, 64)}
    (found,) = told(with_model(built, "student", calibration=sure), "surer of its tokens")
    assert "+0.080 [+0.050, +0.110], n = 64 rows of holdout" in found.figure and "0.090 [0.070, 0.110]" in found.figure
    assert "the teacher's gap: +0.010" in found.figure and found.likely == "calibration was lost on the way"
    assert "distill.loss.temperature" in found.key
    same = with_model(built, "teacher", calibration=sure)
    assert "as well" in told(with_model(same, "student", calibration=sure), "surer of its tokens")[0].likely
    wide = {**sure, "gap": figure(0.08, 0.07, 64)}
    assert not told(with_model(built, "student", calibration=wide), "surer of its tokens")


def test_the_loss_of_training_is_held_against_that_of_new_text(built: ReportData) -> None:
    assert built.learnt and built.learnt.n == 11  # a tenth of 110 steps
    student = built.model("student")
    assert student and student.calibration["nll"].value == 0.08
    learnt = replace(built, learnt=figure(0.04, 0.01, 11))
    assert not told(learnt, "poor on new text")
    worse = with_model(learnt, "student", calibration={**student.calibration, "nll": figure(0.12, 0.03, 64)})
    (found,) = told(worse, "poor on new text")
    assert "0.040 [0.030, 0.050], n = 11 steps" in found.figure and "n = 64 rows of holdout" in found.figure
    assert not told(replace(worse, learnt=None), "poor on new text")


def test_form_without_content_is_by_the_interval_of_what_is_kept(built: ReportData) -> None:
    lost = with_suite(built, "student", "ood", retention=figure(0.6, 0.1, 120))
    (found,) = told(lost, "form without its content on ood")
    assert "n = 120" in found.figure and "rationale" in found.key
    assert not told(with_suite(built, "student", "ood", retention=figure(0.8, 0.1, 120)), "form without")


def test_the_teachers_errors_are_told_from_rows_that_are_hard(built: ReportData) -> None:
    assert not told(built, "own errors come back")
    shared = with_suite(built, "student", "ood", errors=40, shared=32)
    shared = with_suite(shared, "gold-sft", "ood", errors=40, shared=8)
    (found,) = told(shared, "own errors come back on ood")
    assert "0.80 [0.65, 0.90], n = 40" in found.figure and "references alone: 0.20" in found.figure
    assert not told(
        with_suite(shared, "gold-sft", "ood", shared=30), "own errors come back"
    )  # so does who never saw them
    assert not told(with_suite(shared, "student", "ood", errors=8, shared=6), "own errors come back")  # too few to tell


def test_few_empty_blocks_may_be_chance(built: ReportData) -> None:
    def thinking(n: int) -> SuiteLine:
        return told(with_suite(built, "student", "ood", thinking={"n": n, "blocks": 1.0, "empty": 0.3}), "thinks less")  # pyright: ignore

    assert thinking(200) and not thinking(10)


def test_every_key_that_is_named_exists(built: ReportData) -> None:
    """A remedy that the recipe refuses as unknown is no remedy."""
    data = with_suite(built, "student", "ood", errors=40, shared=39, retention=figure(0.4, 0.1), cut=90)
    data = with_suite(data, "gold-sft", "ood", errors=40, shared=1)
    data = with_suite(data, "student", "holdout", retention=figure(0.6, 0.05))
    sure = {name: figure(0.5, 0.1) for name in ("error", "gap", "nll")}
    data = replace(with_model(data, "student", calibration=sure), learnt=figure(0.1, 0.01))
    found = diagnose(data)
    assert len(found) >= 8
    named = {
        word.strip("[],;")
        for one in found
        for word in one.key.replace("otherwise", " ").split()
        if "." in word and '"' not in word
    }
    for name in named - {"gates.min_speedup;"}:
        model: Any = Recipe
        for part in name.split("."):
            if part in (*data.gates, "holdout", "ood", "general"):
                continue
            fields = getattr(model, "model_fields", {})
            assert part in fields, name
            annotation = fields[part].annotation
            nested = [one for one in (annotation, *getattr(annotation, "__args__", ())) if hasattr(one, "model_fields")]
            model = nested[0] if nested else model


def test_a_cache_is_told_where_it_loses_more_than_rounding(built: ReportData) -> None:
    def line(kld: Figure | None, rounding: Figure | None) -> CacheLine:
        return CacheLine(target="phone", types="q4_0", peak_rss={}, context=2048, kld=kld, rounding=rounding)

    (found,) = told(
        replace(built, caches=[line(figure(0.08, 0.02, 8), figure(0.01, 0.01, 8))]), "the KV cache of phone"
    )
    assert "KLD 0.0800 [0.0600, 0.1000] nats a token from f16 at 2048 tokens in q4_0, n = 8 rows" in found.figure
    for other in (line(figure(0.03, 0.015, 8), figure(0.01, 0.01, 8)), line(None, None)):
        assert not told(replace(built, caches=[other]), "the KV cache of phone")
