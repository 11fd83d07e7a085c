"""One self-contained page of a report: no script, no request; light, dark and print by CSS; readable on a phone.

Text goes through ``h``, which escapes it, so a name from a recipe or a tag of a row cannot become markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from edgedistill import __version__
from edgedistill.report import Figure, Model, ReportData
from edgedistill.report_cells import machine_notes
from edgedistill.report_data import difficulty_sheet, filters_sheet, share, spent_notes
from edgedistill.report_plots import Line, Point, Span, bars, curves, marker, scatter, spans
from edgedistill.report_sheets import (
    FORMS,
    calibration_sheet,
    comparisons_sheet,
    details_sheet,
    differences_sheet,
    divergence_sheet,
    forgetting_sheet,
    gates_sheet,
    labels_sheet,
    missing_note,
    models_sheet,
    rounds_sheet,
    stances_sheet,
    tags_sheet,
    temper_sheet,
)
from edgedistill.report_style import STYLE
from edgedistill.report_work import caches_sheet, drafts_sheet, speeds_sheet, training_sheet, types_sheet
from edgedistill.tables import Sheet, duration
from edgedistill.target import format_size

STATES = {"hidden": "kd", "features": "features", "distances": "distances", "angles": "angles"}
"""What training logs of the hidden states, and the colours of their curves."""
SHAPES = {"teacher": "teacher", "baseline": "baselines", "student": "merged student", "artifact": "artifacts"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def h(tag: str, *children: str, cls: str = "", style: str = "") -> Html:
    """Build one element; plain strings are escaped, ``Html`` is not."""
    attributes = (f' class="{escape(cls)}"' if cls else "") + (f' style="{escape(style)}"' if style else "")
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{tag}{attributes}>{inner}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    """Put markup together; plain strings are escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(data: ReportData) -> str:
    """Return the whole page."""
    models = models_sheet(data)
    models = replace(models, notes=models.notes[:1])  # the others have a place of their own on the page
    body = [
        *_header(data),
        *_section("What each model does, weighs and costs", [_table(models)] if data.models else []),
        *_section("Accuracy against size and speed", _scatters(data)),
        *_section("Does it help?", _comparisons(data)),
        *_section("What the figures say", _findings(data)),
        *_section("Gates and limits", [_table(gates_sheet(data))] if data.gates else []),
        *_section("What each stage cost or brought", _differences(data)),
        *_section("Rounds", [_table(rounds_sheet(data))] if data.rounds else []),
        *_section("By function", _functions(data)),
        *_section("Helps, refuses, asks back", _stances(data)),
        *_section("More on the answers", _details(data)),
        *_section("What there was to learn from", _data(data)),
        *_section("Training", _training(data)),
        *_section("Quantization", [_table(types_sheet(data))] if data.fallbacks else []),
        *_section("Speed and memory", [_table(speeds_sheet(data))] if any(m.speed for m in data.models) else []),
        *_section("KV cache", [_table(caches_sheet(data))] if data.caches else []),
        *_section("Speculative decoding", [_table(drafts_sheet(data))] if data.drafts else []),
        *_section("Time per step", _times(data)),
        *_section("Where the numbers come from", _origins(data)),
    ]
    title = escape(f"{data.recipe}: edgedistill report")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>{join(body)}</main></body></html>\n"
    )


def _section(title: str, parts: Sequence[str]) -> list[Html]:
    return [h("h2", title), *(Html(part) for part in parts)] if parts else []


# ── header ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(data: ReportData) -> list[Html]:
    made = f"Student {data.student}, taught by {data.teacher}. edgedistill {__version__}"
    made += f"; newest figure of {data.created}." if data.created else "."
    head = [h("h1", data.recipe), h("p", made, cls="lede"), _verdict(data)]
    cards = [_card(data, model) for model in data.models if model.kind == "artifact"]
    if cards:
        head.append(h("div", *cards, cls="cards"))
    if data.missing:
        head.append(
            h("p", h("b", "Not in this report: ", cls="wait"), missing_note(data).removeprefix("missing: "), cls="note")
        )
    head += [h("p", h("b", "Warning: ", cls="wait"), warning, cls="note") for warning in data.warnings]
    return head


def _verdict(data: ReportData) -> Html:
    count, shipped = len(data.shipped), sum(data.shipped.values())
    missed = [
        f"{target}: {line['name']}"
        for target, lines in data.gates.items()
        for line in lines
        if line["status"] == "missed"
    ]
    unproved = len(data.unproved)
    anyway = f", {len(data.shipped_anyway)} by --ship-anyway" if data.shipped_anyway else ""
    good = shipped == count and not missed
    first = h("b", f"{shipped} of {count} artifacts packaged{anyway}. ", cls="good" if good else "bad")
    parts: list[str] = [first]
    if missed:
        parts.append(h("span", f"Missed gates: {', '.join(missed)}. ", cls="bad"))
    elif data.gates:
        parts.append("No gate missed. ")
    if unproved:
        parts.append(h("span", f"{unproved} limits unproved: this machine is not the target.", cls="wait"))
    return h("p", *parts)


def _card(data: ReportData, model: Model) -> Html:
    rows: list[tuple[str, str]] = []
    for suite in data.suites:
        line = model.suites.get(suite)
        if line and line.score:
            kept = f", keeps {line.retention.value:.1%}" if line.retention else ""
            rows.append((suite, f"{line.score.value:.3f}{kept}"))
    if model.size:
        rows.append(("size", format_size(model.size) + (f", {model.shrink:.1f}x smaller" if model.shrink else "")))
    if model.speed:
        faster = f", {model.speed.ratio.value:.1f}x" if model.speed.ratio else ""
        rows.append(("decode", f"{model.speed.tg.value:.1f} tokens/s{faster}"))
    lines = data.gates.get(model.id)
    if lines is not None:
        by = {status: sum(line["status"] == status for line in lines) for status in ("green", "missed", "unproved")}
        rows.append(("gates", ", ".join(f"{count} {status}" for status, count in by.items() if count) or "none"))
    cells = [part for name, value in rows for part in (h("dt", name), h("dd", value))]
    state = h("span", "packaged", cls="good") if data.shipped.get(model.id) else h("span", "not packaged", cls="bad")
    if model.id in data.shipped_anyway:
        state = h("span", "packaged though a gate is missed", cls="bad")
    return h("div", h("b", model.label), state, h("dl", *cells), cls="card")


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(sheet: Sheet) -> Html:
    """Show a sheet: intervals go to a small second line, numbers to the right."""
    heads = [h("th", name, cls="r" if index in sheet.right else "") for index, name in enumerate(sheet.columns)]
    rows = []
    for number, row in enumerate(sheet.rows):
        cells = [h("td", _cell(text), cls=_class(index, text, sheet)) for index, text in enumerate(row)]
        rows.append(h("tr", *cells, cls="rule" if number in sheet.rules else ""))
    table = h("table", h("thead", h("tr", *heads)), h("tbody", *rows))
    notes = h("ul", *(h("li", note) for note in sheet.notes)) if sheet.notes else Html()
    return join([h("div", table, cls="scroll"), notes])


def _class(index: int, text: str, sheet: Sheet) -> str:
    if index in sheet.right:
        return "r"
    status = {"green": "good", "missed": "bad", "unproved": "wait", "loss": "bad", "gain": "good"}.get(text)
    return status or ("" if index == 0 else "w" if len(text) > 28 else "n")


def _cell(text: str) -> Html:
    value, bracket, rest = text.partition(" [")
    return join([value, h("small", f"[{rest}")]) if bracket and value else join([text])


def _heat(data: ReportData, suite: str) -> Html:
    """Show functions x models: the redder, the more is wrong."""
    models = [model for model in data.models if suite in model.suites and model.suites[suite].functions]
    names = list(dict.fromkeys(name for model in models for name in model.suites[suite].functions))
    heads = [h("th", "function"), *(h("th", model.label) for model in models)]
    rows = []
    for name in names:
        figures = [model.suites[suite].functions.get(name) for model in models]
        counts = {figure.n for figure in figures if figure}
        cells = [h("td", name, h("small", f"n = {'/'.join(map(str, sorted(n for n in counts if n)))}"))]
        cells += [_heat_cell(figure, n=len(counts) > 1) if figure else h("td") for figure in figures]
        rows.append(h("tr", *cells))
    table = h("table", h("thead", h("tr", *heads)), h("tbody", *rows), cls="heat")
    return h("div", table, cls="scroll")


def _heat_cell(figure: Figure, *, n: bool) -> Html:
    value, bracket, rest = figure.text(2, n=n).partition(" [")
    shade = min(1.0, max(0.0, 1 - figure.value)) * 0.75
    small = h("small", f"[{rest}") if bracket else Html()
    return h("td", value, small, style=f"background: rgba(var(--heat), {shade:.2f})")


# ── plots ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _figure(caption: str, svg: str) -> Html:
    return h("figure", h("figcaption", caption), Html(svg)) if svg else Html()


def _interval(figure: Figure, scale: float = 1.0) -> tuple[float, float] | None:
    return None if figure.low is None or figure.high is None else (figure.low * scale, figure.high * scale)


def _short_labels(data: ReportData) -> dict[str, str]:
    """Return what models are called in a plot: artifacts by their type where no two have the same, as the legend
    says.
    """
    types = [model.type for model in data.models if model.kind == "artifact"]
    short = len(set(types)) == len(types)
    return {model.id: model.type if model.kind == "artifact" and short else model.label for model in data.models}


def _scatters(data: ReportData) -> list[Html]:
    plots, labels = [], _short_labels(data)
    for suite in data.suites:
        sizes, speeds = [], []
        for model in data.models:
            line = model.suites.get(suite)
            if line is None or line.score is None:
                continue
            score, title = line.score, f"{model.label}: {line.score.text(3, n=True)}"
            if model.size:
                point = Point(
                    x=model.size / 2**20,
                    y=score.value,
                    y_interval=_interval(score),
                    label=labels[model.id],
                    kind=model.kind,
                    title=f"{title}, {format_size(model.size)}",
                )
                sizes.append(point)
            if model.speed:
                tg = model.speed.tg
                point = Point(
                    x=tg.value,
                    x_interval=_interval(tg),
                    y=score.value,
                    y_interval=_interval(score),
                    label=labels[model.id],
                    kind=model.kind,
                    title=f"{title}, {tg.text(1, n=True)} tokens/s",
                )
                speeds.append(point)
        score_label = f"score on {suite}"
        svg = scatter(sizes, title=f"{score_label} against file size", x_label="file, MiB", y_label=score_label)
        plots.append(_figure(f"{suite}: accuracy against size (upper left is better)", svg))
        svg = scatter(
            speeds, title=f"{score_label} against decode speed", x_label="tg128, tokens/s", y_label=score_label
        )
        plots.append(_figure(f"{suite}: accuracy against speed (upper right is better)", svg))
    plots = [plot for plot in plots if plot]
    if not plots:
        return []
    kinds = [kind for kind in SHAPES if any(model.kind == kind for model in data.models)]
    named = ", ".join(
        f"{labels[m.id]} for {m.id}" for m in data.models if m.kind == "artifact" and labels[m.id] != m.label
    )
    words = {**SHAPES, "artifact": SHAPES["artifact"] + (f": {named}" if named else "")}
    legend = [h("span", Html(f'<svg viewBox="0 0 16 16">{marker(kind, 8, 8)}</svg>'), words[kind]) for kind in kinds]
    note = (
        "Bars are 95 % intervals. A baseline far below the rest stands at the lower edge with its score. "
        "Speed only where it was measured."
    )
    return [h("div", *legend, cls="legend"), h("div", *plots, cls="plots"), h("p", note, cls="note")]


def _functions(data: ReportData) -> list[Html]:
    parts = []
    for suite in data.suites:
        if any(model.suites[suite].functions for model in data.models if suite in model.suites):
            parts += [h("h3", suite), _heat(data, suite)]
    return parts


def _data(data: ReportData) -> list[Html]:
    """Show what the filters left at what price, and of which prompts: a set without the hard ones is biased."""
    found = data.data
    if not found:
        return []
    parts: list[Html] = []
    sheet = filters_sheet(found, list(spent_notes(found)))
    if sheet.rows or sheet.notes:
        parts.append(_table(sheet))
    groups = found["difficulty"]
    recovered = any(one["before"] != one["after"] for one in groups)
    rows = [
        Span(
            label=f"{one['of']} (n = {one['prompts']})",
            values=[
                (kind, *(share(one, name)[key] for key in ("value", "low", "high")))
                for name, kind in (("before", "baseline"), ("after", "student"))[: 2 if recovered else 1]
            ],
        )
        for one in groups
    ]
    svg = spans(rows, title="share of prompts with a kept answer", x_label="share of the prompts")
    caption = "prompts with a kept answer" + (": before recovery (diamond) and after it (square)" if recovered else "")
    note = (
        "By tag and by length of the prompt, with Wilson's 95 % intervals; answers of teachers, not references. Where the groups "
        "differ, the hard prompts are missing from what is taught."
    )
    if rows:
        parts += [_figure(caption, svg), _table(replace(difficulty_sheet(found), notes=[])), h("p", note, cls="note")]
    return parts


def _stances(data: ReportData) -> list[Html]:
    sheet = stances_sheet(data)
    if not sheet.rows:
        return []
    parts = [_table(sheet), h("p", f"With n and Wilson's 95 % interval; {FORMS}.", cls="note")]
    for suite in data.suites:
        if (by_tag := tags_sheet(data, suite)).rows:
            parts += [h("h3", f"{suite}, right by tag"), _table(by_tag)]
    return parts


def _training(data: ReportData) -> list[Html]:
    plots = []
    for step, lines in data.curves.items():
        soft = any(line.get("kd") for line in lines)
        guided = [key for key in STATES if any(line.get(key) for line in lines)]
        shown = []
        for key in [*(("loss", "kd", "ce") if soft else ("ce",) if guided else ("loss",)), *guided]:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            shown.append(Line(label=key, kind=STATES.get(key, key), points=points))
        unit = "nats a token, error of states and relations" if guided else "nats a token"
        svg = curves(shown, title=f"loss of {step}", x_label="optimiser step", y_label=unit)
        plots.append(_figure(step, svg))
    parts = [h("div", *plots, cls="plots")] if plots else []
    sheet = training_sheet(data)
    return [*parts, _table(sheet)] if sheet.rows else parts


def _times(data: ReportData) -> list[Html]:
    rows = [
        (line["step"], line["seconds"], duration(line["seconds"])) for line in data.times if line["seconds"] is not None
    ]
    if not rows:
        return []
    shown = [row for row in rows if row[1] >= 0.5]
    total = sum(seconds for _, seconds, _ in rows)
    note = f"{duration(total)} in all, as each step took when it last ran."
    if len(shown) < len(rows):
        note += f" {len(rows) - len(shown)} steps under 0.5 s are not drawn."
    return [_figure(f"{len(rows)} steps", bars(shown, title="time per step")), h("p", note, cls="note")]


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _findings(data: ReportData) -> list[Html]:
    if not data.findings:
        return [h("p", "No known symptom shows.", cls="note")] if data.suites else []
    found = []
    for one in data.findings:
        found.append(h("dt", one.symptom))
        found.append(h("dd", one.figure, h("small", f"Likely: {one.likely}. Try: {one.remedy}."), h("code", one.key)))
    return [h("dl", *found, cls="found")]


def _comparisons(data: ReportData) -> list[Html]:
    if not data.comparisons:
        return []
    note = (
        "Score of this recipe's student minus that of the same build with those keys, on the same rows. Helped, or hurt: the 95 % "
        "interval leaves out 0. One seed: the interval knows of the rows, not of another training run."
    )
    return [_table(comparisons_sheet(data)), h("p", note, cls="note")]


def _differences(data: ReportData) -> list[Html]:
    if not data.differences:
        return []
    note = (
        "Score after the stage minus before, on the same rows, so below 0 is a loss. A loss or gain is named where the "
        "95 % interval leaves out 0."
    )
    parts = [_table(differences_sheet(data)), h("p", note, cls="note")]
    if data.hops:
        told = [
            f"{step}: " + ", ".join(f"{key} {_plain(value)}" for key, value in hop.items())
            for step, hop in data.hops.items()
        ]
        parts += [h("h3", "Checks on the hops between formats"), h("ul", *(h("li", line) for line in told))]
    return parts


def _plain(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _details(data: ReportData) -> list[Html]:
    notes = {
        details_sheet: "Wrong as the teacher: wrong answers that are the teacher's, word for word.",
        forgetting_sheet: "Perplexity of the references. Its ratio to the base model's is unpaired, hence wide; that of "
        "distill.keep is to the student before training, paired by row.",
        temper_sheet: "On rows that neither student nor temperature was fitted on; greedy answers are the same.",
        divergence_sheet: "On the same tokens: mean KL divergence, and how often both choose the same next token.",
        labels_sheet: "Probabilities of the labels given the prompt, over their sum; macro-F1 is of what is written freely. "
        "Intervals are bootstraps over rows; the calibration error is biased upwards where rows are few. Below 0 is too modest",
        calibration_sheet: "On the references of the first scored suite, token by token; below 0 is too modest.",
    }
    parts = []
    for make, note in notes.items():
        sheet = make(data)
        if sheet.rows:
            parts += [
                h("h3", sheet.title.capitalize()),
                _table(sheet),
                h("p", ". ".join([*sheet.notes, note]), cls="note"),
            ]
    return parts


def _origins(data: ReportData) -> list[Html]:
    lines = [
        "Scores: one greedy answer a row. Intervals of 95 %: Wilson for a share, Tango for paired differences, Nam and "
        "Blackwelder for "
        "retention, bootstrap for graded scores and medians.",
        "Size: the model's files. Shrink and speed-up are against the teacher's f16 GGUF; a speed-up is taken turn by "
        "turn in one session.",
        *machine_notes(data),
        *(f"Unproved on {target}: {line['name']} ({line['why']})." for target, line in data.unproved),
    ]
    for source in data.sources:
        licence = f", licence {source['licence'] or 'unknown'}" if "licence" in source else ""
        origin = f", dequantized from {source['quantized_from']}" if source.get("quantized_from") else ""
        lines.append(
            f"{source['role'].capitalize()}: {source['source']}, revision {source['revision']}, "
            f"sha256 {source['digest'][:16]}…{licence}{origin}."
        )
    if data.versions:
        lines.append("Built with " + ", ".join(f"{name} {version}" for name, version in data.versions.items()) + ".")
    return [h("ul", *(h("li", line) for line in lines))]
