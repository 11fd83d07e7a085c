"""Plots as inline SVG, drawn by hand: no library, no request, colours from the page's CSS so that dark mode and print
work.

A plot is 400 units wide and scales with its column, so that its text stays readable on a phone. Kinds of points differ
in shape as well as in colour. Labels are placed where they hide nothing, with a line to their point when they had to
move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 320
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 42
LABEL = 12  # height of a label's line


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model: a position with 95 % intervals where they are known; ``kind`` chooses shape and colour."""

    x: float
    y: float
    label: str
    kind: str
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; ``kind`` chooses its colour."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One line of shares: for each (kind, value, low, high), the kind choosing shape and colour."""

    label: str
    values: Sequence[tuple[str, float, float, float]]


@dataclass(frozen=True)
class _Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        share = (at - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values: 1, 2 or 5 times a power of ten; on a log scale those of them that lie inside."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            span = math.log10(self.high / self.low)
            steps = (1, 2, 3, 5, 7) if span < 1 else (1, 2, 5) if span < 2.2 else (1,)
            return [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axis(values: Sequence[float], start: float, end: float, *, zero: bool, log: bool, pad: float = 0.08) -> _Axis:
    low, high = min(values), max(values)
    if log:
        room = max(math.log(high / low) * pad, 0.05)
        return _Axis(low * math.exp(-room), high * math.exp(room), start, end, log=True)
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return _Axis(0.0 if zero else low - room, high + room, start, end)


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def text_width(text: str) -> float:
    """Estimate how wide a label is, rather too wide than too narrow: the font is whatever the reader's system has."""
    return sum(3.9 if c in " .,:;-()ijl|'" else 7.6 if c.isupper() or c in "_%mw" else 6.6 for c in text)


def _svg(body: list[str], title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _frame(
    x: _Axis, y: _Axis, x_label: str, y_label: str, *, bottom: float, form: Callable[[float], str] = _number
) -> list[str]:
    """Draw grid, ticks and axis titles."""
    body = []
    for tick in y.ticks():
        at = y(tick)
        body.append(f'<line class="grid" x1="{x.start:g}" x2="{x.end:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(
            f'<text class="tick" x="{x.start - 5:g}" y="{at + 4:.1f}" text-anchor="end">{escape(form(tick))}</text>'
        )
    for tick in x.ticks():
        at = x(tick)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:g}" y2="{y.start:g}"/>')
        body.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 15:g}" text-anchor="middle">{escape(_number(tick))}</text>'
        )
    middle = (x.start + x.end) / 2
    body.append(f'<text class="axis" x="{middle:g}" y="{bottom + 32:g}" text-anchor="middle">{escape(x_label)}</text>')
    across = (y.start + y.end) / 2
    body.append(
        f'<text class="axis" transform="translate(11 {across:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return body


def marker(kind: str, x: float, y: float) -> str:
    """Draw a point: circle teacher, diamond baseline, square student, triangle artifact."""
    if kind == "teacher":
        return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    corners = {
        "baseline": [(0, -6), (6, 0), (0, 6), (-6, 0)],
        "student": [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
    }.get(kind, [(0, -6), (5.5, 4.5), (-5.5, 4.5)])
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark {escape(kind)}" points="{path}"/>'


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Draw labelled points with error bars. The x axis is logarithmic where the values span more than three times."""
    if not points:
        return ""
    low_y = _floor(points)
    xs = [value for p in points for value in (p.x, *(p.x_interval or ()))]
    ys = [value for p in points if p.y >= low_y for value in (p.y, *(p.y_interval or ()))]
    log = min(xs) > 0 and max(xs) / min(xs) > 3
    x = _axis(xs, LEFT, WIDTH - RIGHT, zero=not log, log=log)
    y = _axis(ys, HEIGHT - BOTTOM, TOP, zero=False, log=False)
    if max(ys) <= 1:  # a share: there is nothing above 1
        y = _Axis(max(0.0, y.low), min(y.high, 1.02), y.start, y.end)
    body = _frame(x, y, x_label + (" (log scale)" if log else ""), y_label, bottom=HEIGHT - BOTTOM)
    taken: list[_Box] = []
    for p in points:
        at_x, at_y = x(p.x), y(p.y)
        if p.y < low_y:  # far below the rest: at the edge, with its value written
            at_y = HEIGHT - BOTTOM - 14
            path = f"M{at_x:.1f} {at_y:.1f}v12m-4 -4l4 4l4 -4"
            body.append(f'<path class="bar {escape(p.kind)}" fill="none" d="{path}"/>')
            taken.append((at_x - 7, at_y - 7, at_x + 7, at_y + 14))
            continue
        taken.append((at_x - 7, at_y - 7, at_x + 7, at_y + 7))
        if p.y_interval:
            low, high = y(p.y_interval[0]), y(p.y_interval[1])
            body.append(
                f'<line class="bar {escape(p.kind)}" x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
            taken.append((at_x - 2, high, at_x + 2, low))
        if p.x_interval:
            low, high = x(p.x_interval[0]), x(p.x_interval[1])
            body.append(
                f'<line class="bar {escape(p.kind)}" x1="{low:.1f}" x2="{high:.1f}" y1="{at_y:.1f}" y2="{at_y:.1f}"/>'
            )
            taken.append((low, at_y - 2, high, at_y + 2))
    anchors = [(x(p.x), y(p.y) if p.y >= low_y else HEIGHT - BOTTOM - 14.0) for p in points]
    labels = [p.label if p.y >= low_y else f"{p.label}: {p.y:.2f}" for p in points]
    spans = [
        (min(at, y(p.y_interval[1])), max(at, y(p.y_interval[0]))) if p.y_interval and p.y >= low_y else (at, at)
        for p, (_, at) in zip(points, anchors, strict=True)
    ]
    boxes = place(labels, anchors, spans, taken, (LEFT + 2, TOP - 10, WIDTH - 2, HEIGHT - BOTTOM - 1))
    for (at_x, _), (top, bottom), box in zip(anchors, spans, boxes, strict=True):
        to_x, to_y = min(max(at_x, box[0]), box[2]), (box[1] + box[3]) / 2
        from_y = min(max(to_y, top), bottom)
        to_y = min(max(from_y, box[1]), box[3])
        if math.hypot(to_x - at_x, to_y - from_y) > 12:
            body.append(f'<line class="lead" x1="{at_x:.1f}" y1="{from_y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>')
    for p, label, (at_x, at_y), box in zip(points, labels, anchors, boxes, strict=True):
        body.append(f"<g><title>{escape(p.title or p.label)}</title>{marker(p.kind, at_x, at_y)}")
        middle = (box[0] + box[2]) / 2
        body.append(
            f'<text class="label" x="{middle:.1f}" y="{box[3] - 2.5:.1f}" text-anchor="middle">'
            f"{escape(label)}</text></g>"
        )
    return _svg(body, title)


_Box = tuple[float, float, float, float]


def _gap(a: _Box, b: _Box) -> float:
    return math.hypot(max(0.0, b[0] - a[2], a[0] - b[2]), max(0.0, b[1] - a[3], a[1] - b[3]))


def _floor(points: Sequence[Point]) -> float:
    """Return the value under which a baseline is off the scale: it would press all others into a corner."""
    rest = [value for p in points if p.kind != "baseline" for value in (p.y, *(p.y_interval or ()))]
    if not rest:
        return min(p.y for p in points)
    low = min(rest)
    return low - 1.2 * max(max(rest) - low, 0.02)


def _overlap(a: _Box, b: _Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def place(
    labels: Sequence[str],
    anchors: Sequence[tuple[float, float]],
    spans: Sequence[tuple[float, float]],
    taken: Sequence[_Box],
    bounds: _Box,
) -> list[_Box]:
    """Find a box for each label: near its point or an end of its error bar (``spans``: top and bottom), inside the
    bounds, over no marker, bar or other label, and clearly nearer to its own point than to another. Each label in turn
    takes its cheapest place given the others, a few rounds long.
    """
    glyphs = [(x - 6, min(a, y - 6), x + 6, max(b, y + 6)) for (x, y), (a, b) in zip(anchors, spans, strict=True)]
    places: list[list[tuple[float, _Box]]] = []
    for own, (label, (x, y), (top, bottom)) in enumerate(zip(labels, anchors, spans, strict=True)):
        wide = text_width(label)
        middles = [(4.0, x + shift * wide / 2, at) for shift in (0, 0.8, -0.8) for at in (top - 9, bottom + 9)]
        for distance in (0, 6, 14, 24, 36, 50, 66, 84, 104):
            for step in range(16):
                dx, dy = math.cos(step * math.pi / 8), math.sin(step * math.pi / 8)
                cost = distance + (0 if step in (0, 8) else 4)
                middles.append((cost, x + dx * (9 + distance + wide / 2), y + dy * (9 + distance + LABEL / 2)))
        options = []
        for cost, middle_x, middle_y in middles:
            box = (middle_x - wide / 2, middle_y - LABEL / 2, middle_x + wide / 2, middle_y + LABEL / 2)
            if box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]:
                cost += 10 * sum(_overlap(box, other) for other in taken)
                rivals = [_gap(box, glyph) for index, glyph in enumerate(glyphs) if index != own]
                doubt = _gap(box, glyphs[own]) + 8 - min(rivals, default=math.inf)
                options.append((cost + 4 * max(0.0, doubt), box))
        clamped = min(max(x - wide / 2, bounds[0]), bounds[2] - wide)
        places.append(options or [(0.0, (clamped, y - LABEL - 8, clamped + wide, y - 8))])
    chosen = [min(options)[1] for options in places]
    for _ in range(6):
        for index, options in enumerate(places):
            others = [box for other, box in enumerate(chosen) if other != index]
            chosen[index] = min(
                (cost + 20 * sum(_overlap(box, other) for other in others), box) for cost, box in options
            )[1]
    return chosen


def curves(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> str:
    """Draw loss curves: every step faint, a running median on top. The y axis is logarithmic where a loss falls far."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    height = 230
    ys = [y for line in lines for _, y in line.points]
    log = min(ys) > 0 and max(ys) / min(ys) > 10
    x = _axis([x for line in lines for x, _ in line.points], LEFT, WIDTH - RIGHT, zero=True, log=False, pad=0.0)
    y = _axis(ys, height - BOTTOM, TOP, zero=not log and min(ys) >= 0, log=log, pad=0.04)
    body = _frame(x, y, x_label, y_label + (" (log scale)" if log else ""), bottom=height - BOTTOM)
    for line in lines:
        raw = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        body.append(f'<polyline class="raw {escape(line.kind)}" points="{raw}"/>')
    at = WIDTH - RIGHT
    for line in reversed(lines):
        smooth = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in _running_median(line.points))
        body.append(f'<polyline class="curve {escape(line.kind)}" points="{smooth}"/>')
        body.append(f'<text class="label" x="{at:g}" y="{TOP + 9}" text-anchor="end">{escape(line.label)}</text>')
        at -= text_width(line.label) + 4
        body.append(
            f'<line class="curve {escape(line.kind)}" x1="{at - 14:g}" x2="{at - 2:g}" y1="{TOP + 5}" y2="{TOP + 5}"/>'
        )
        at -= 24
    return _svg(body, title, height=height)


def _running_median(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    half = max(1, len(points) // 40)
    found = []
    for index, (at, _) in enumerate(points):
        window = sorted(value for _, value in points[max(0, index - half) : index + half + 1])
        found.append((at, window[len(window) // 2]))
    return found


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """Draw horizontal bars: (label, value, the text beside it)."""
    if not rows:
        return ""
    line, gap = 19, 8
    wide = min(190.0, max(text_width(label) for label, _, _ in rows) + gap)
    room = WIDTH - wide - max(text_width(text) for _, _, text in rows) - 2 * gap
    most = max(value for _, value, _ in rows) or 1.0
    body = []
    for index, (label, value, text) in enumerate(rows):
        top = index * line
        length = max(1.0, value / most * room)
        body.append(f'<text class="label" x="{wide - gap:g}" y="{top + 13}" text-anchor="end">{escape(label)}</text>')
        body.append(f'<rect class="span" x="{wide:g}" y="{top + 3}" width="{length:.1f}" height="{line - 6}" rx="2"/>')
        body.append(f'<text class="tick" x="{wide + length + 5:.1f}" y="{top + 13}">{escape(text)}</text>')
    return _svg(body, title, height=len(rows) * line + 2)


def spans(rows: Sequence[Span], *, title: str, x_label: str) -> str:
    """Draw shares from 0 to 1 with their intervals, a line each; several of one label one under the other."""
    if not rows:
        return ""
    step, gap = 13, 8
    wide = min(230.0, max(1.12 * text_width(row.label) for row in rows) + gap)  # wide fonts, too
    height = sum(step * len(row.values) + gap for row in rows) + BOTTOM
    x = _Axis(0.0, 1.0, wide, WIDTH - RIGHT)
    bottom = height - BOTTOM
    body = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = x(tick)
        body.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom:g}"/>')
        body.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 15:g}" text-anchor="middle">{_number(tick)}</text>')
    middle = (x.start + x.end) / 2
    body.append(f'<text class="axis" x="{middle:g}" y="{bottom + 32:g}" text-anchor="middle">{escape(x_label)}</text>')
    top = gap / 2
    for row in rows:
        half = step * len(row.values) / 2
        body.append(
            f'<text class="label" x="{wide - gap:g}" y="{top + half + 4:g}" text-anchor="end">{escape(row.label)}</text>'
        )
        for at, (kind, value, low, high) in enumerate(row.values):
            y = top + step * (at + 0.5)
            told = escape(f"{row.label}: {value:.2f} [{low:.2f}, {high:.2f}]")
            body.append(
                f'<g><title>{told}</title><line class="bar {escape(kind)}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:g}" '
                f'y2="{y:g}"/>{marker(kind, x(value), y)}</g>'
            )
        top += 2 * half + gap
    return _svg(body, title, height=height)
