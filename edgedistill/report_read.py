"""Reads a report from the entries of a build: each loaded once, answers paired by row, gates decided if they can be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from edgedistill.compare import flat, step_of
from edgedistill.data.verdicts import remaining, shown_in
from edgedistill.data_stats import step_figures
from edgedistill.inputs import read_reviews, sources, student_facts
from edgedistill.report import (
    Comparison,
    Difference,
    DraftLine,
    Figure,
    Model,
    ReportData,
    Round,
    SuiteLine,
)
from edgedistill.report_entries import caches, curve, fallbacks, hops, speed, stances
from edgedistill.report_reader import Reader
from edgedistill.store import Entry

if TYPE_CHECKING:
    from edgedistill.session import Session
    from edgedistill.stages.package import Package
    from edgedistill.target import Target


LABELLED = ("macro_f1", "error", "gap", "brier", "nll", "top")
"""The figures of a suite of labels (``evals/labels.py``)."""


def read(session: Session) -> ReportData:
    """Read a build's entries into a report without findings."""
    reader = Reader(session)
    models = _models(reader)
    gates, shipped = _gates(reader)
    entries = {name: reader.entry(name) for name in reader.steps}
    built = [entry for entry in entries.values() if entry]
    missing, waiting = reader.missing()
    curves = {name: curve(entry.path / "log" / "train.jsonl") for name, entry in entries.items() if entry}
    return ReportData(
        recipe=session.recipe.name,
        teacher=session.inputs.teacher.source,
        student=session.inputs.student.source + _shape(session),
        models=models,
        gates=gates,
        shipped=shipped,
        differences=_differences(reader, models),
        comparisons=_comparisons(reader),
        curves={name: lines for name, lines in curves.items() if lines},
        learnt=_learnt(session, curves),
        training={name: dict(e.facts["train"]) for name, e in entries.items() if e and "train" in e.facts},
        yields=_yields(reader),
        rounds=_rounds(reader),
        fallbacks=fallbacks(entries),
        hops=hops(entries),
        times=[
            {"step": name, "seconds": e.seconds if e else None, "created": e.created if e else "", "key": step.key}
            for step in session.plan.steps
            for name, e in [(step.id, reader.entry(step.id))]
        ],
        sources=sources(session.inputs),
        versions={k: v for e in sorted(built, key=lambda e: e.created) for k, v in e.versions.items()},
        created=max((entry.created for entry in built), default=""),
        missing=missing,
        waiting=waiting,
        warnings=list(session.plan.warnings),
        drafts=_drafts(reader),
        caches=caches({name: reader.entry(f"kv-cache/{name}") for name in session.plan.packages}),
        temper=dict(reader.facts("temper").get("temper", {})),
        data=step_figures(session, "filter", filtered) if (filtered := reader.entry("filter")) else {},
    )


def read_gates(session: Session) -> list[tuple[str, dict[str, Any]]]:
    """Return every gate of every target that can be decided, as (target, line)."""
    gates, _ = _gates(Reader(session))
    return [(target, line) for target, lines in gates.items() for line in lines]


def _shape(session: Session) -> str:
    """Say what of its model the student keeps."""
    student, facts = student_facts(session.inputs), session.inputs.student.facts
    pairs = (
        (student.layers, facts.layers, "layers"),
        (student.hidden, facts.hidden, "hidden dimensions"),
        (student.ffn, facts.ffn, "neurons of each FFN"),
        (student.vocab, facts.vocab, "tokens"),
    )
    return "".join(f", {kept:,} of {whole:,} {what}" for kept, whole, what in pairs if kept < whole)


def _yields(reader: Reader) -> dict[str, Any]:
    """Return what the filters let through, and how many of the teacher's analyses of its mistakes were right."""
    found, analysed = dict(reader.facts("filter")), reader.facts("analyse")
    if analysed:
        found["yields"] = [*found.get("yields", ()), *analysed["yields"]]
    if "review" in found and (
        entry := reader.entry("filter")
    ):  # by the verdicts of now: what is accepted builds nothing anew
        verdicts = [one for read in read_reviews(reader.session.inputs).values() for one in read.items()]
        found["review"] = remaining(shown_in(entry.path), dict(verdicts))
    augmented = [reader.facts(step.id) for step in reader.session.plan.steps if step.stage.name == "augment"]
    if found and augmented:
        found["yields"] = [line for one in augmented for line in one.get("yields", ())] + found["yields"]
    return found


def _models(reader: Reader) -> list[Model]:
    """List teacher, baselines, arms, merged student and artifacts: those that are evaluated, measured or written so far."""
    session, base = reader.session, reader.session.recipe.baselines
    of_teacher = "F16"
    if session.recipe.teacher.backend == "llama_cpp":
        of_teacher = session.inputs.teacher.facts.quantized_from or of_teacher
    rows = [
        ("teacher", "teacher, served", "teacher", "", "")
        if session.inputs.server
        else ("teacher", f"teacher {of_teacher.replace('F16', 'f16')}", "teacher", of_teacher, "convert/teacher"),
        ("base", "base, untaught", "baseline", "", ""),
        *(  # of the teacher's shape: its file is there whether or not the recipe asks for this baseline
            [("base-few-shot", f"base, {base.few_shot} examples", "baseline", "F16", "convert/teacher")]
            if base.few_shot
            else ()
        ),
        (
            "quantized-teacher",
            f"teacher {base.quantized_teacher}",
            "baseline",
            base.quantized_teacher or "",
            "quantize/teacher",
        ),
        ("gold-sft", "student, gold only", "baseline", "F16", "convert/gold-sft"),
        *(  # an arm with another teacher
            (step_of("teacher", arm), f"teacher, {arm}", "baseline", "", "")
            for arm in session.recipe.compare
            if step_of("evaluate/teacher", arm) in reader.steps
        ),
        *(
            (step_of("student", arm), f"student, {arm}", "baseline", "F16", step_of("convert/student", arm))
            for arm in session.recipe.compare
        ),
        ("before-rounds", "student before the rounds", "baseline", "F16", "convert/before-rounds"),
        *(
            (step_of("student", link), f"student f16, {link}", "student", "F16", step_of("convert/student", link))
            for link in dict(_link_targets(session))
        ),
        ("student", "student f16", "student", "F16", "convert/student"),
    ]
    ships = [(target.name, "", target) for target in session.inputs.targets]
    ships += [
        (step_of(one.name, link), f", {link}", one) for link, targets in _link_targets(session) for one in targets
    ]
    for name, link, target in ships:
        type_ = target.quantize.type
        onnx = target.runtime.format == "onnx" and "onnx" not in target.name
        label = f"{target.name} {'ONNX ' * onnx}{type_}{link}"
        rows.append((name, label, "artifact", type_, f"quantize/{name}"))
    reference, found = reader.size("convert/teacher"), []
    for name, label, kind, type_, file in rows:
        size, facts = reader.size(file), reader.facts(f"evaluate/{name}")
        answered = facts.get("suites", {})
        suites = {
            suite: _suite(reader, name, suite, answered[suite]) for suite in session.recipe.suites if suite in answered
        }
        measured = speed(reader.facts(f"measure/{name}"))
        if size is None and not suites and measured is None:
            continue
        divergence = {
            against: {key: f for key in ("kld", "top1") if (f := Figure.read(value.get(key)))}
            for against, value in facts.get("likelihood", {}).items()
        }
        shrink = reference / size if reference and size and name != "teacher" else None
        found.append(
            Model(
                id=name,
                label=label,
                kind=kind,
                type=type_,
                size=size,
                shrink=shrink,
                suites=suites,
                divergence=divergence,
                speed=measured,
                calibration=_calibration(reader, name),
            )
        )
    return found


def _link_targets(session: Session) -> list[tuple[str, tuple[Target, ...]]]:
    """Return the links of the chain that ship, by the name that their steps have after the @, with their targets."""
    return [(f"link-{at}", targets) for at, targets in enumerate(session.inputs.link_targets, 1) if targets]


def _calibration(reader: Reader, name: str) -> dict[str, Figure]:
    """Return how sure a model is: an artifact's own figures, or those that an artifact's evaluation took of its reference."""
    (model, _, link), artifacts = name.partition("@"), reader.session.plan.packages
    for artifact in [name] if name in artifacts else [one for one in artifacts if one.partition("@")[2] == link]:
        likelihood = reader.facts(f"evaluate/{artifact}").get("likelihood", {})
        of = next(iter(likelihood.values()), {}) if name == artifact else likelihood.get(model, {})
        found = of.get("calibration", {}).get("candidate" if name == artifact else "reference", {})
        if found:
            return {key: f for key in ("error", "gap", "nll") if (f := Figure.read(found.get(key)))}
    return {}


def last_link(curves: Iterable[str]) -> str:
    """Return the id of the step that trained the student that ships."""
    links = [step for step in curves if re.fullmatch(r"distill/\d+", step)]
    return max(links, key=lambda step: int(step.partition("/")[2]), default="distill/1")


def _learnt(session: Session, curves: Mapping[str, list[dict[str, float]]]) -> Figure | None:
    """Return the cross-entropy of the last tenth of the training, where the text is what the suites' references are: checked
    against references, every token counting the same.
    """
    recipe = session.recipe
    if recipe.distill.think_weight != 1.0 or not any(one.kind == "reference" for one in recipe.filter):
        return None
    lines = curves.get(last_link(curves), ())
    losses = [line["ce"] for line in lines if line.get("ce") and not line.get("eased")]  # of rows in no order
    tenth = losses[-(len(losses) // 10) :] if len(losses) >= 30 else []
    if not tenth:
        return None
    from edgedistill.evals.statistics import mean

    return Figure.read(mean(tenth))


def _base(reader: Reader, name: str) -> str:
    """Return whose evaluation is that of what a model was before it was cut and taught."""
    session = reader.session
    same = session.inputs.student.digest == session.inputs.teacher.digest
    if not same and name not in ("teacher", "quantized-teacher", "base-few-shot"):
        return "base"
    if session.recipe.baselines.few_shot:
        return "base-few-shot"
    return "base" if same and session.recipe.adapt else "teacher" if session.recipe.adapt is None else ""


def _suite(reader: Reader, name: str, suite: str, facts: Mapping[str, Any]) -> SuiteLine:
    if facts.get("perplexity"):
        from edgedistill.evals.statistics import perplexity_over

        base = reader.facts(f"evaluate/{_base(reader, name)}").get("suites", {}).get(suite, {}).get("perplexity")
        whole = base or reader.facts("evaluate/teacher").get("suites", {}).get(suite, {}).get("perplexity")
        mine = Figure.read(perplexity_over(facts["perplexity"], whole))
        assert mine is not None
        return SuiteLine(metric="perplexity", perplexity=mine, against_base=_over(mine, Figure.read(base)))
    from edgedistill.evals.statistics import paired_difference, retention

    kept = gain = None
    if name != "teacher" and (pair := reader.paired((name, suite), ("teacher", suite))) and sum(pair[1]) > 0:
        kept = retention(*pair)
    under, mine = facts.get("grammar"), reader.answers(name, suite)
    if isinstance(under, Mapping) and (pair := reader.paired((name, f"{suite}.grammar"), (name, suite))):
        gain = paired_difference(*pair)
    teacher = reader.answers("teacher", suite) or {}
    errors = [row for row, (score, _) in mine.items() if score < 1] if mine else []
    shared = sum(teacher.get(row, (1.0, ""))[0] < 1 and teacher[row][1] == (mine or {})[row][1] for row in errors)
    runner = facts.get("runner", {})
    hedged, answered = _hedges(reader, mine)
    by_kind, by_tag = stances(facts)
    return SuiteLine(
        metric=str(facts.get("metric", "")),
        score=Figure.read(facts.get("score")),
        retention=Figure.read(kept),
        valid=Figure.read(facts.get("valid_json")),
        grammar=Figure.read(under["score"]) if isinstance(under, Mapping) else None,
        grammar_gain=Figure.read(gain),
        functions={key: f for key, value in facts.get("by_function", {}).items() if (f := Figure.read(value))},
        cut=int(facts.get("cut", 0)),
        errors=len(errors) if mine else None,
        shared=shared if mine and teacher and name != "teacher" else None,
        hedged=hedged,
        answered=answered,
        labels={key: f for key in LABELLED if (f := Figure.read(facts.get("labels", {}).get(key)))},
        by_label=dict(facts.get("labels", {}).get("by_label", {})),
        unnamed=int(facts.get("labels", {}).get("unnamed", 0)),
        thinking=facts.get("thinking"),
        stances=by_kind,
        tags=by_tag,
        engine=" ".join(str(v) for v in (runner.get("engine"), runner.get("dtype")) if v),
    )


def _hedges(reader: Reader, answers: Mapping[str, tuple[float, str]] | None) -> tuple[Figure | None, Figure | None]:
    """Return the share of rows that a model does not answer but hedges, and its score on the others."""
    from edgedistill.evals.statistics import mean

    hedge = reader.session.recipe.hedge
    if hedge is None or not answers:
        return None, None
    rest = [score for score, text in answers.values() if text.strip() != hedge.strip()]
    hedged = [0.0] * len(rest) + [1.0] * (len(answers) - len(rest))
    return Figure.read(mean(hedged)), Figure.read(mean(rest)) if rest else None


def _over(mine: Figure, base: Figure | None) -> Figure | None:
    if base is None:
        return None
    bounds = None not in (mine.low, mine.high, base.low, base.high)
    low, high = (mine.low / base.high, mine.high / base.low) if bounds else (None, None)  # type: ignore[operator]
    return Figure(value=mine.value / base.value, low=low, high=high, n=mine.n, method="unpaired, widest")


def _gates(reader: Reader) -> tuple[dict[str, list[dict[str, Any]]], dict[str, bool]]:
    """Return target -> lines, from its package, or decided now where a missed gate kept the package from being
    written.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    shipped: dict[str, bool] = {}
    for target in reader.session.plan.packages:
        entry = reader.entry(f"package/{target}")
        shipped[target] = entry is not None
        lines = list(entry.facts["gates"]) if entry else _decide(reader, target)
        if lines is not None:
            found[target] = lines
    return found, shipped


def _decide(reader: Reader, target: str) -> list[dict[str, Any]] | None:
    from edgedistill.gates import check_gates

    stage: Package = reader.steps[f"package/{target}"].stage  # type: ignore[assignment]
    names = {key: step.id for step in reader.steps.values() for key in [step.key]}
    keys = (
        stage.evaluation,
        stage.measurement,
        stage.teacher,
        stage.student,
        stage.reference,
        stage.model,
        stage.kv_cache,
    )
    entries = {key: reader.entry(names[key]) for key in keys if key}
    if None in entries.values():
        return None
    size = reader.size(names[stage.model]) or 0
    known: dict[Any, Entry] = {key: entry for key, entry in entries.items() if entry}
    return check_gates(
        gates=stage.gates,
        limits=stage.target["limits"],
        size=size,
        reference_size=reader.size(names[stage.reference]) if stage.reference else None,
        evaluation=known[stage.evaluation].path,
        measurement=known[stage.measurement].facts,
        teacher=known[stage.teacher].path,
        student=known[stage.student].path if stage.student else None,
        unproved=stage.unproved,
        kv_cache=known[stage.kv_cache].facts["kv_cache"] if stage.kv_cache else None,
    ).to_json()


def _drafts(reader: Reader) -> list[DraftLine]:
    """Read what each draft model brings, and whether it ships."""
    from edgedistill.gates import draft_refused

    found = []
    for target in reader.session.inputs.targets:
        facts, stage = reader.facts(f"speculate/{target.name}"), f"quantize/draft-{target.name}"
        own, whole = reader.size(stage), reader.size(f"quantize/{target.name}")
        if not facts or own is None or whole is None:
            continue
        measured = facts["drafting"]
        package = cast("Package", reader.steps[f"package/{target.name}"].stage)
        figures = {name: Figure.read(measured[name]) for name in ("acceptance", "tokens_per_check", "answer", "decode")}
        found.append(
            DraftLine(
                target=target.name,
                size=own,
                tokens=facts["tokens"],
                verdict=measured["verdict"],
                refused=draft_refused(measured, target.limits.model_dump(), own + whole),
                unproved=package.unproved,
                ties=measured["ties"],
                noise=tuple(measured["noise"]),
                **{name: figure for name, figure in figures.items() if figure},
            )
        )
    return found


def _differences(reader: Reader, models: Iterable[Model]) -> list[Difference]:
    """Attribute the loss to the stages, each as a paired difference of two evaluations of the same rows."""
    by_id = {model.id: model for model in models}
    shaped, rounds = "shape" in reader.steps, len(reader.session.recipe.round)
    pairs = [
        ("adapting the teacher, against the base with examples in its prompt", "base-few-shot", "teacher"),
        ("quantizing the teacher alone", "teacher", "quantized-teacher"),
        (
            "pruning, distilling, merging, converting" if shaped else "distilling, merging, converting",
            "teacher",
            "student",
        ),
        (f"soft targets{' and rounds' if rounds else ''}, against gold only", "gold-sft", "student"),
        ("the round" if rounds == 1 else f"{rounds} rounds", "before-rounds", "student"),
    ]
    for target in reader.session.inputs.targets:
        verb = "exporting to ONNX and quantizing" if target.runtime.format == "onnx" else "quantizing"
        pairs.append((f"{verb} to {target.quantize.type}", "student", target.name))
    for link, targets in _link_targets(reader.session):
        student = step_of("student", link)
        pairs.append((f"distilling down to {link}", "teacher", student))
        pairs += [(f"{link}: making {one.quantize.type} of it", student, step_of(one.name, link)) for one in targets]
    found = []
    for what, before, after in pairs:
        for suite in by_id[after].suites if before in by_id and after in by_id else ():
            pair = reader.paired((after, suite), (before, suite))
            if pair is None:
                continue
            from edgedistill.evals.statistics import paired_difference

            estimate = paired_difference(*pair)
            noticed = "loss" if estimate.high < 0 else "gain" if estimate.low > 0 else ""
            figure = Figure.read(estimate)
            assert figure is not None
            line = Difference(what=what, before=before, after=after, suite=suite, figure=figure, noticed=noticed)
            found.append(line)
    return found


def _comparisons(reader: Reader) -> list[Comparison]:
    """Compare the student with every arm, the one of references only and the one before the rounds, on every suite with a score."""
    from edgedistill.evals.statistics import paired_difference

    others = [(arm, step_of("student", arm), flat(keys)) for arm, keys in reader.session.recipe.compare.items()]
    others += [("references only", "gold-sft", {})] if reader.session.recipe.baselines.gold_sft else []
    others += [("the student before the rounds", "before-rounds", {})] if reader.session.recipe.round else []
    found = []
    for name, other, keys in others:
        for suite in reader.session.recipe.suites:
            if pair := reader.paired(("student", suite), (other, suite)):
                estimate = paired_difference(*pair)
                figure = Figure.read(estimate)
                assert figure is not None
                found.append(
                    Comparison(name=name, other=other, keys=keys, suite=suite, figure=figure, verdict=estimate.verdict)
                )
            mine, theirs = reader.briers("student", suite), reader.briers(other, suite)
            if mine and mine.keys() == theirs.keys():
                estimate = paired_difference([theirs[row] for row in mine], list(mine.values()))
                figure = Figure.read(estimate)
                assert figure is not None
                found.append(
                    Comparison(
                        name=name, other=other, keys=keys, suite=suite, figure=figure, verdict=estimate.verdict,
                        measure="brier",
                    )
                )  # fmt: skip
    return found


def _rounds(reader: Reader) -> list[Round]:
    """Return what each round that is built asked and kept."""
    from edgedistill.evals.statistics import proportion

    found = []
    for number, one in enumerate(reader.session.recipe.round, 1):
        step = f"round-{number}"
        if not (facts := reader.facts(f"filter/{step}")):
            continue
        judged = reader.facts(f"evaluate/{step}").get("suites", {}).get("prompts", {})
        counts = {key: facts[key] for key in ("prompts", "asked", "kept", "gold", "replayed")}
        good = Figure.read(proportion(facts["good"], facts["prompts"])) if facts["prompts"] else None
        found.append(Round(step=step, kind=one.kind, **counts, good=good, right=Figure.read(judged.get("score"))))
    return found
