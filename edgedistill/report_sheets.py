"""The sheets of a report: what its figures say, as rows of text for the terminal and the page. What it took: ``report_work.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedistill.report import Figure, Model, ReportData
from edgedistill.report_cells import count, filled, machine_notes, signed, text
from edgedistill.report_data import difficulty_sheet, filters_sheet, labels_note, spent_notes
from edgedistill.report_work import caches_sheet, drafts_sheet, speeds_sheet, times_sheet, training_sheet, types_sheet
from edgedistill.tables import Sheet
from edgedistill.target import format_size


def models_sheet(data: ReportData, folders: Mapping[str, Path] | None = None, notes: Sequence[str] = ()) -> Sheet:
    """Lay out every model with scores, retention, size, speed and gates."""
    general = list(dict.fromkeys(name for m in data.models for name, line in m.suites.items() if line.perplexity))
    columns = ["model"]
    for suite in data.suites:
        columns += [suite, f"{suite} kept"]
    columns += [f"{name} ppl" for name in general] + ["size", "shrink", "tg128 t/s", "speed-up"]
    if data.gates:
        columns.append("gates")
    rows = []
    for model in data.models:
        row = [model.label]
        for suite in data.suites:
            line = model.suites.get(suite)
            row += [text(line.score) if line else "", text(line.retention) if line else ""]
        for suite in general:
            line = model.suites.get(suite)
            row.append(text(line.perplexity, 2) if line else "")
        row += _cost(model)
        if data.gates:
            row.append(gate_summary(data.gates.get(model.id)) if model.kind == "artifact" else "")
        rows.append(row)
    first = next((number for number, model in enumerate(data.models) if model.kind == "artifact"), 0)
    words = len(columns) - (1 if data.gates else 0)
    packages = []
    for target in data.shipped if folders is not None else ():
        packages.append(f"package of {target}: {(folders or {}).get(target, 'none')}")
    sheet = Sheet(
        title=f"{data.recipe}: {data.student} from {data.teacher}",
        columns=tuple(columns),
        rows=rows,
        right=frozenset(range(1, words)),
        rules=frozenset({first} - {0}),
        notes=[*_model_notes(data), *packages, *notes],
    )
    return filled(sheet) if rows else sheet


def _cost(model: Model) -> list[str]:
    speed = model.speed
    return [
        format_size(model.size) if model.size else "",
        f"{model.shrink:.2f}x" if model.shrink else "",
        (text(speed.tg, 1) + (" (noisy)" if speed.noise else "")) if speed else "",
        text(speed.ratio, 2) if speed else "",
    ]


def gate_summary(lines: list[dict[str, Any]] | None) -> str:
    """Count gates by status and name those that are not green."""
    if lines is None:
        return "not decided yet"
    by = {
        status: [line["name"] for line in lines if line["status"] == status]
        for status in ("green", "missed", "unproved")
    }
    parts = [f"{len(by['green'])} green"] if by["green"] else []
    parts += [f"{status}: {', '.join(by[status])}" for status in ("missed", "unproved") if by[status]]
    return "; ".join(parts) or "no gates"


def _model_notes(data: ReportData) -> list[str]:
    notes = []
    counts = {
        suite: {line.score.n for m in data.models if (line := m.suites.get(suite)) and line.score}
        for suite in data.suites
    }
    if counts:
        sizes = ", ".join(
            f"{suite} n = {'/'.join(map(str, sorted(n for n in found if n)))}" for suite, found in counts.items()
        )
        notes.append(f"[…] 95 % intervals; {sizes}; kept: score over the teacher's, paired by row")
    notes += machine_notes(data)
    whys = {line["why"] for _, line in data.unproved if line["why"]}
    if whys:
        notes.append(f"unproved: {'; '.join(sorted(whys))}")
    notes += [
        f"{target} is packaged by --ship-anyway though it misses {', '.join(names)}"
        for target, names in data.shipped_anyway.items()
    ]
    notes += verdict_notes(data)
    if data.missing:
        notes.append(missing_note(data))
    return notes


def verdict_notes(data: ReportData) -> list[str]:
    """Say in a line for each arm whether the recipe's way helped against it."""
    by: dict[str, list[str]] = {}
    for one in data.comparisons:
        what = one.suite + (", Brier score lower by" if one.measure == "brier" else "")
        by.setdefault(one.name, []).append(f"{what} {signed(one.figure)}, n = {one.figure.n}: {one.verdict}")
    return [f"against {name}: {'; '.join(lines)}" for name, lines in by.items()]


def missing_note(data: ReportData) -> str:
    """Name the steps that are not there, and count those that wait for them."""
    return f"missing: {', '.join(data.missing)}" + (
        f", and {data.waiting} steps that need them" if data.waiting else ""
    )


def all_sheets(data: ReportData) -> list[Sheet]:
    """Lay out everything; a sheet without rows is left out, that of the models never."""
    sheets = [models_sheet(data), gates_sheet(data), comparisons_sheet(data), rounds_sheet(data)]
    sheets += [differences_sheet(data), details_sheet(data), forgetting_sheet(data), divergence_sheet(data)]
    sheets += [labels_sheet(data), calibration_sheet(data), temper_sheet(data)]
    sheets += [filters_sheet(data.data, list(spent_notes(data.data))), difficulty_sheet(data.data)]
    sheets += [functions_sheet(data, suite) for suite in data.suites]
    sheets += [stances_sheet(data), *(tags_sheet(data, suite) for suite in data.suites)]
    sheets += [
        speeds_sheet(data),
        caches_sheet(data),
        drafts_sheet(data),
        training_sheet(data),
        types_sheet(data),
        times_sheet(data),
        findings_sheet(data),
    ]
    return [sheet for index, sheet in enumerate(sheets) if sheet.rows or index == 0]


def gates_sheet(data: ReportData) -> Sheet:
    """Lay out every gate and limit of every target."""
    rows = []
    for target, lines in data.gates.items():
        for line in lines:
            found = Figure.read({**line, "value": line["found"]}) if line["found"] is not None else None
            size = line["name"] in ("file_size", "peak_rss")
            bound = format_size(line["bound"]) if size else f"{line['bound']:g}"
            shown = "not measured" if found is None else format_size(found.value) if size else _short(found)
            sign = "≥" if line["at_least"] else "≤"
            rows.append([target, line["name"], f"{sign} {bound}", shown, count(line["n"]), line["status"], line["why"]])
    columns = ("target", "gate", "wanted", "found", "n", "status", "note")
    return Sheet(title="gates and limits", columns=columns, rows=rows, right=frozenset({2, 3, 4}))


def _short(figure: Figure) -> str:
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:.4g}, {figure.high:.4g}]"
    return f"{figure.value:.4g}{bounds}"


def comparisons_sheet(data: ReportData) -> Sheet:
    """Lay out whether what the recipe does helps: its student beside each arm's, paired by row."""
    rows = []
    for one in data.comparisons:
        lines = [model.suites[one.suite] if model else None for model in map(data.model, ("student", one.other))]
        brier = one.measure == "brier"
        scores = [(line.labels.get("brier") if brier else line.score) if line else None for line in lines]
        told = ", ".join(f"{key} = {_toml(value)}" for key, value in one.keys.items())
        cells = [*map(text, scores), signed(one.figure), count(one.figure.n), one.verdict, told]
        rows.append([one.name, one.suite + ", Brier (less is better)" * brier, *cells])
    columns = ("against", "suite", "this recipe", "that one", "difference", "n", "verdict", "set there")
    return filled(Sheet(title="does it help?", columns=columns, rows=rows, right=frozenset({2, 3, 4, 5})))


def _toml(value: Any) -> str:
    """Write a value as one would in a recipe."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def differences_sheet(data: ReportData) -> Sheet:
    """Lay out what each stage cost or brought, paired by row."""
    labels = {model.id: model.label for model in data.models}
    rows = [
        [
            line.what,
            f"{labels[line.before]} → {labels[line.after]}",
            line.suite,
            signed(line.figure),
            count(line.figure.n),
            line.noticed or "within noise",
        ]
        for line in data.differences
    ]
    columns = ("stage", "from → to", "suite", "change of the score", "n", "")
    return Sheet(title="what each stage cost or brought", columns=columns, rows=rows, right=frozenset({3, 4}))


def rounds_sheet(data: ReportData) -> Sheet:
    """Lay out what each round asked and kept."""
    rows = []
    for one in data.rounds:
        kept = [str(count) for count in (one.kept, one.gold, one.replayed)]
        rows.append([one.step, one.kind, text(one.right), str(one.prompts), str(one.asked), text(one.good), *kept])
    columns = (
        *("round", "kind", "right before it", "prompts put", "answers", "prompts with a good one"),
        *("kept", "of these references", "taught again"),
    )
    return filled(Sheet(title="rounds", columns=columns, rows=rows, right=frozenset(range(2, 9))))


def details_sheet(data: ReportData) -> Sheet:
    """Lay out what lies behind the scores: valid JSON, the score under the grammar, cut answers, the teacher's
    errors.
    """
    rows = []
    for model in data.models:
        for suite in data.suites:
            line = model.suites.get(suite)
            if line is None or line.score is None:
                continue
            shared = "" if line.shared is None else f"{line.shared} of {line.errors}"
            gain = signed(line.grammar_gain) if line.grammar_gain else ""
            cells = [
                text(line.valid),
                text(line.grammar),
                gain,
                str(line.cut),
                shared,
                text(line.hedged),
                text(line.answered),
                line.engine,
            ]
            rows.append([model.label, suite, count(line.score.n), *cells])
    columns = (
        "model",
        "suite",
        "n",
        "valid JSON",
        "under the grammar",
        "grammar brings",
        "cut off",
        "wrong as the teacher",
        "hedged",
        "right where answered",
        "answered by",
    )
    return filled(Sheet(title="behind the scores", columns=columns, rows=rows, right=frozenset(range(2, 10))))


def forgetting_sheet(data: ReportData) -> Sheet:
    """Lay out perplexities on the suites that have one, and how many times the base model's they are; then those of the general
    rows that a training held out, before and after it.
    """
    rows = [
        [model.label, suite, line.perplexity.text(2), text(line.against_base, 2), count(line.perplexity.n)]
        for model in data.models
        for suite, line in model.suites.items()
        if line.perplexity
    ]
    for step, facts in data.training.items():
        general = facts.get("general") or {}
        for when, rise in (("before", None), ("after", "rise")) if general else ():
            found, times = _power(general[when]), _power(general[rise]) if rise else None
            rows.append([f"{when} {step}", "distill.keep", text(found, 2), text(times, 2), count(general[when]["n"])])
    columns = ("model", "suite", "perplexity", "times the base's", "n")
    return Sheet(title="what was forgotten", columns=columns, rows=rows, right=frozenset({2, 3, 4}))


def _power(estimate: Mapping[str, Any]) -> Figure | None:
    """Turn nats a token into a perplexity, a difference of them into a ratio: exp is monotone, and takes the interval along."""
    found = {key: math.exp(estimate[key]) for key in ("value", "low", "high") if estimate.get(key) is not None}
    return Figure.read({**found, "n": estimate["n"]})


def labels_sheet(data: ReportData) -> Sheet:
    """Lay out how well each model names labels, and how sure it is of them."""
    rows = []
    for model in data.models:
        for suite, line in model.suites.items():
            if line.labels:
                cells = [text(line.labels.get(name)) for name in ("macro_f1", "error", "gap", "brier", "nll")]
                found = line.labels["macro_f1"].n
                rows.append([model.label, suite, text(line.score), *cells, str(line.unnamed), count(found)])
    columns = (
        *("model", "suite", "accuracy", "macro-F1", "expected calibration error", "confidence above accuracy"),
        *("Brier score", "nats a row", "answers that are no label", "n"),
    )
    notes, taught = [], data.yields.get("labels")
    if rows and taught:
        notes.append(f"taught: {labels_note(taught)}")
    return filled(Sheet(title="labels", columns=columns, rows=rows, right=frozenset(range(2, 10)), notes=notes))


def calibration_sheet(data: ReportData) -> Sheet:
    """Lay out how sure each model is of its tokens, and how right."""
    rows = []
    for model in data.models:
        found = model.calibration
        if found:
            cells = [text(found.get(name), 4) for name in ("error", "gap", "nll")]
            rows.append([model.label, *cells, count(found["gap"].n)])
    columns = ("model", "expected calibration error", "confidence above accuracy", "nats a token", "rows")
    return Sheet(title="how sure they are", columns=columns, rows=rows, right=frozenset({1, 2, 3, 4}))


def temper_sheet(data: ReportData) -> Sheet:
    """Lay out how sure the student is and how right, before and after its temperature was folded in."""
    found, rows = data.temper, []
    for when in ("before", "after") if found else ():
        one = found[when]
        figures = {name: Figure.read(one[name]) for name in ("nll", "error", "gap")}
        cells = [text(figure, 4) for figure in figures.values()]
        rows.append([when, *cells, count(one["tokens"]), count(figures["nll"].n if figures["nll"] else None)])
    columns = ("student", "nats a token", "expected calibration error", "confidence above accuracy", "tokens", "rows")
    notes = []
    if found:
        notes.append(
            f"T = {found['temperature']:.3f}, fitted on {found['fitted_rows']} other rows and folded into the final norm"
            + ("" if found["helped"] else ": no help, so the student is as it was")
        )
    return Sheet(title="one temperature", columns=columns, rows=rows, right=frozenset(range(1, 6)), notes=notes)


def divergence_sheet(data: ReportData) -> Sheet:
    """Lay out how far each artifact's distribution is from the merged student's and the teacher's on the same
    tokens.
    """
    rows = []
    for model in data.models:
        for name, found in model.divergence.items():
            kld, top1 = found.get("kld"), found.get("top1")
            counts = [count(kld.n if kld else None), count(top1.n if top1 else None)]
            rows.append([model.label, name, text(kld, 4), counts[0], text(top1, 4), counts[1]])
    columns = ("model", "against the", "KLD, nats a token", "rows", "same first choice", "tokens")
    return Sheet(title="distributions", columns=columns, rows=rows, right=frozenset({2, 3, 4, 5}))


def functions_sheet(data: ReportData, suite: str) -> Sheet:
    """Lay out the score of each function for each model on one suite."""
    models = [model for model in data.models if suite in model.suites]
    names = list(dict.fromkeys(name for model in models for name in model.suites[suite].functions))
    rows = [[name, *(_with_n(model.suites[suite].functions.get(name)) for model in models)] for name in names]
    columns = ("function", *(model.label for model in models))
    return Sheet(title=f"{suite} by function", columns=columns, rows=rows, right=frozenset(range(1, len(columns))))


STANCES = {
    "refuses harm": ("refuse", "refuse"),
    "helps with harm": ("refuse", "help"),
    "refuses the harmless": ("help", "refuse"),
    "helps with the harmless": ("help", "help"),
    "asks back in doubt": ("ask", "ask"),
    "guesses in doubt": ("ask", "help"),
}
"""Columns of a rate: what is right, and what the answer does."""
FORMS = "read off the forms of answers: what is said in other words, or is false, counts as help"


def stances_sheet(data: ReportData) -> Sheet:
    """Lay out how often each model refuses, helps and asks back where it should, and where it should not."""
    rows = []
    for model in data.models:
        for suite, line in model.suites.items():
            found = [line.stances.get(right, {}).get(took) for right, took in STANCES.values()]
            if any(found):
                rows.append([model.label, suite, *map(_with_n, found)])
    right = frozenset(range(2, 2 + len(STANCES)))
    columns = ("model", "suite", *STANCES)
    return filled(Sheet(title="helps, refuses, asks back", columns=columns, rows=rows, right=right, notes=[FORMS]))


def tags_sheet(data: ReportData, suite: str) -> Sheet:
    """Lay out which share of each tag's rows each model takes the right way, where that is judged by stance."""
    models = [model for model in data.models if suite in model.suites and model.suites[suite].tags]
    names = sorted({name for model in models for name in model.suites[suite].tags})
    rows = [
        [name, *(_with_n(model.suites[suite].tags.get(name, {}).get("right")) for model in models)] for name in names
    ]
    columns = ("right by tag", *(model.label for model in models))
    return Sheet(title=f"{suite} by tag", columns=columns, rows=rows, right=frozenset(range(1, len(columns))))


def _with_n(figure: Figure | None) -> str:
    return figure.text(2, n=True) if figure else ""


def findings_sheet(data: ReportData) -> Sheet:
    """Lay out the symptoms that the figures show, and what mends them."""
    rows = [[found.symptom, found.figure, found.likely, found.remedy, found.key] for found in data.findings]
    return Sheet(title="what the figures say", columns=("seen", "figure", "likely", "remedy", "recipe key"), rows=rows)
