"""Charts of a report as inline SVG, styled by the page for light and dark mode.

Coordinates are those of the view box. The page's script shows the values under the pointer, from
`data-chart`. `Markup.format` escapes its arguments.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from trainer.metrics.console import format_number

WIDTH, HEIGHT, WIDE = 600, 280, 1240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 36  # margins
LANE, GAP = 22, 8  # of a run's events; least distance of two marks of a kind
POINTS = 500  # of a curve that are drawn
TICKS = 5
LOG_FROM = 20.0  # times the least value: from there on the axis is logarithmic
SMOOTHED_FROM, SMOOTHED_SHARE = 60, 0.04  # points; share of them that a mean is over
COLOURS = 8  # of runs, in the page's style; then they come again, dashed
# A path around the middle of an event's mark, by kind.
GLYPHS = {
    "start": "M-4,-5L5,0L-4,5Z",
    "restart": "M-4,-5L5,0L-4,5Z",
    "save": "M-3,-3H3V3H-3Z",
    "evaluation": "M0,-5V5",
    "bad step": "M-4,-4L4,4M-4,4L4,-4",
    "rollback": "M4,-5L-5,0L4,5Z",
}
OTHER = "M0,-5L5,0L0,5L-5,0Z"
LINES_FOR = ("restart", "bad step", "rollback")  # drawn through the curves too

FIGURE = Markup(
    "<figure><figcaption>{title}<small>{kind}</small></figcaption>"
    '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" data-chart="{frame}">'
    "{parts}</svg></figure>"
)
LANES = Markup(
    '<figure class="lanes"><figcaption>{title}</figcaption><div class="key">{key}</div>'
    '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{parts}</svg></figure>'
)
KEY = Markup('<span><svg viewBox="-7 -7 14 14" width="14" height="14">{shape}</svg>{kind}</span>')
MARK = Markup(
    '<g class="mark c{colour}" data-run="{mark.run}"><title>{told}</title>'
    f'<path d="M{{x:.1f}},{TOP}V{HEIGHT - BOTTOM}"/>'
    f'<text x="{{text_x:.1f}}" y="{TOP + 8}">{{mark.kind}}</text></g>'
)
GLYPH = Markup(
    '<g class="glyph" data-run="{mark.run}" transform="translate({x:.1f},{y})">'
    '<title>{told}</title><circle r="8" class="touch"/>{shape}</g>'
)

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The values of one run by step."""

    name: str
    run: int  # number of the run, which decides the colour
    points: Sequence[Point]
    style: str = "line"  # line | smooth (faint, with its mean) | dots (dashed between dots)


@dataclass(frozen=True)
class Mark:
    """A mark at a step."""

    step: int
    run: int
    kind: str
    text: str


class Axis:
    """A scale from values to one coordinate; logarithmic where they span orders of magnitude."""

    def __init__(self, values: Sequence[float], begin: float, end: float, log: bool = False):
        low, high = min(values, default=0.0), max(values, default=1.0)
        self.log = log and low > 0 and high > LOG_FROM * low
        if low == high:
            low, high = low - (abs(low) or 1.0) / 20, high + (abs(high) or 1.0) / 20
        self.low, self.high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        at = math.log10(value) if self.log else value
        share = (at - self.low) / ((self.high - self.low) or 1.0)
        return self.begin + share * (self.end - self.begin)

    def axis_ticks(self) -> list[float]:
        """Round values within."""
        if not self.log:
            return round_values(self.low, self.high)
        first, last = math.ceil(self.low), math.floor(self.high)
        every = max(1, (last - first) // TICKS)
        decades = [10.0**power for power in range(first, last + 1, every)]
        if len(decades) > 1:
            return decades
        return [
            n * 10.0**p
            for p in range(first - 1, last + 1)
            for n in (1, 2, 5)
            if self.low <= math.log10(n * 10.0**p) <= self.high
        ]


def round_values(low: float, high: float) -> list[float]:
    """About TICKS multiples of 1, 2 or 5 times a power of ten, between two values."""
    rough = (high - low) / TICKS
    if not (rough > 0 and math.isfinite(rough)):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
    first = math.ceil(low / size - 1e-9)
    return [n * size for n in range(first, math.floor(high / size + 1e-9) + 1)]


def curve_figure(
    title: str,
    curves: Sequence[Curve],
    marks: Sequence[Mark],
    steps: tuple[int, int],
    scale: str = "",
) -> Markup:
    """Return a figure of curves over steps; empty if there are no points.

    `scale` of the values: `log` for large ranges, `zero` to start at zero, empty to fit.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return Markup()
    across = Axis(steps, LEFT, WIDTH - RIGHT)
    values = [value for curve in drawn for _, value in curve.points]
    values += [0.0] * (scale == "zero")
    up = Axis(values, HEIGHT - BOTTOM, TOP + 6, log=scale == "log")
    lines = [_mark_line(mark, across) for mark in marks if mark.kind in LINES_FOR]
    parts = [_grid_svg(across, up), *lines, *(_curve_svg(curve, across, up) for curve in drawn)]
    told = [
        {"name": c.name, "run": c.run, "points": round_points(thin_points(c.points))} for c in drawn
    ]
    frame = {
        "x": [across.low, across.high],
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "curves": told,
    }
    kind = ", logarithmic" if up.log else ""
    return FIGURE.format(
        title=title,
        kind=kind,
        width=WIDTH,
        height=HEIGHT,
        frame=json.dumps(frame, separators=(",", ":")),
        parts=_joined(parts),
    )


def event_lanes(
    title: str, names: Sequence[str], marks: Sequence[Mark], steps: tuple[int, int]
) -> Markup:
    """Return a figure of events by step, one lane per run; empty if there are none."""
    if not marks:
        return Markup()
    across = Axis(steps, LEFT, WIDE - RIGHT)
    height = TOP + LANE * len(names)
    parts = []
    for run in range(len(names)):
        y = TOP + LANE * (run + 0.5)
        parts.append(_stroke("axis", f"M{LEFT},{y}H{WIDE - RIGHT}"))
        label = '<text class="c{}" x="{}" y="{}" text-anchor="end">●<title>{}</title></text>'
        parts.append(Markup(label).format(run % COLOURS, LEFT - 12, y + 4, names[run]))
        parts += [
            _mark_glyph(mark, across(mark.step), y) for mark in spread_marks(marks, run, across)
        ]
    parts.append(_steps_below(across, height))
    kinds = list(dict.fromkeys(mark.kind for mark in marks))
    return LANES.format(
        title=title,
        key=_joined(KEY.format(shape=_glyph_shape(kind), kind=kind) for kind in kinds),
        width=WIDE,
        height=height + BOTTOM - 4,
        parts=_joined(parts),
    )


def spread_marks(marks: Sequence[Mark], run: int, across: Axis) -> list[Mark]:
    """Return the marks of a run without those that would overlap the previous one of their kind."""
    found: list[Mark] = []
    last: dict[str, float] = {}
    for mark in sorted((m for m in marks if m.run == run), key=lambda m: m.step):
        at = across(mark.step)
        if mark.kind in LINES_FOR or at - last.get(mark.kind, -math.inf) >= GAP:
            found.append(mark)
            last[mark.kind] = at
    return found


def thin_points(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Thin a curve to the minimum and maximum of each interval, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    edges = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    found: list[Point] = []
    for begin, end in pairwise(edges):
        part = points[begin:end]
        extremes = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(extremes)
    return found


def smooth_points(points: Sequence[Point]) -> list[Point]:
    """Return the moving average of a curve over a small fraction of its points."""
    reach = max(1, round(len(points) * SMOOTHED_SHARE / 2))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)  # as far on both sides, so that no end is pulled
        found.append((step, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return found


def round_points(points: Sequence[Point]) -> list[list[float]]:
    """Round values to the digits that are shown."""
    return [[step, float(f"{value:.5g}")] for step, value in points]


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup().join(parts)


def _curve_svg(curve: Curve, across: Axis, up: Axis) -> Markup:
    parts = [_path_svg(curve.points, across, up, "dotted" if curve.style == "dots" else "")]
    if curve.style == "dots":
        spot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>')
        parts += [spot.format(across(x), up(y)) for x, y in thin_points(curve.points, 60)]
    elif curve.style == "smooth" and len(curve.points) >= SMOOTHED_FROM:
        faint = _path_svg(curve.points, across, up, "faint")
        parts = [faint, _path_svg(smooth_points(curve.points), across, up, "")]
    dashed = " dashed" if curve.run >= COLOURS else ""
    group = Markup('<g class="curve c{}{}" data-run="{}">{}</g>')
    return group.format(curve.run % COLOURS, dashed, curve.run, _joined(parts))


def _path_svg(points: Sequence[Point], across: Axis, up: Axis, look: str) -> Markup:
    places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in thin_points(points))
    return Markup('<polyline class="{}" points="{}"/>').format(look, places)


def _grid_svg(across: Axis, up: Axis) -> Markup:
    parts = []
    for value in up.axis_ticks():
        y = up(value)
        parts.append(_stroke("grid", f"M{LEFT},{y:.1f}H{WIDTH - RIGHT}"))
        parts.append(_text(LEFT - 7, y + 4, "end", format_tick(value)))
    return _joined([*parts, _steps_below(across, HEIGHT - BOTTOM)])


def _steps_below(across: Axis, y: float) -> Markup:
    parts = [_stroke("axis", f"M{across.begin},{y:.1f}H{across.end}")]
    for value in across.axis_ticks():
        x = across(value)
        parts.append(_stroke("axis", f"M{x:.1f},{y:.1f}v4"))
        parts.append(_text(x, y + 17, "middle", format_tick(value)))
    parts.append(_text((across.begin + across.end) / 2, y + 31, "middle", "step"))
    return _joined(parts)


def _stroke(look: str, path: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(look, path)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    shown = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return shown.format(x, y, anchor, text)


def _mark_line(mark: Mark, across: Axis) -> Markup:
    x = across(mark.step)
    return MARK.format(
        mark=mark, colour=mark.run % COLOURS, told=_mark_tooltip(mark), x=x, text_x=x + 3
    )


def _mark_glyph(mark: Mark, x: float, y: float) -> Markup:
    return GLYPH.format(
        mark=mark, told=_mark_tooltip(mark), x=x, y=y, shape=_glyph_shape(mark.kind)
    )


def _glyph_shape(kind: str) -> Markup:
    look = kind.replace(" ", "-") if kind in GLYPHS else "other"
    return _stroke(look, GLYPHS.get(kind, OTHER))


def _mark_tooltip(mark: Mark) -> str:
    return f"step {mark.step}: {mark.kind}\n{mark.text}"


def format_tick(value: float) -> str:
    """Format a round value as short as possible."""
    return format_number(value) if abs(value) >= 1000 else f"{value:.4g}"
