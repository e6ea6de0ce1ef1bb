"""Plot of a pipeline's step: what each rank computed when, and where it was idle."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from parallel.pipeline.schedules import SCHEDULES, bubble_formula
from parallel.pipeline.simulator import KINDS, Span, bubble_fraction

COLOURS = {"F": "#3F6FA8", "B": "#E8923A", "I": "#C25B78", "W": "#7FB290"}
WAITING, EDGE, DARK, LIGHT = "#E3E3E3", "#FFFFFF", "#1F1F1F", "#FFFFFF"
PALER = 0.42  # of white in the colours of a rank's last stage; its first has none
POINTS_PER_INCH = 72
NARROW, WIDE, INCHES_PER_FORWARD = 8.0, 24.0, 0.16
INCHES_PER_RANK, INCHES_AROUND = 0.46, 1.35
INCHES_BESIDE = 1.0  # labels of the ranks
ROW = 0.86  # of a rank's height; the rest is between rows
SMALLEST_FONT, LARGEST_FONT = 5.0, 9.0
DIGIT = 0.7  # a digit and its share of the margin, of a font's size
BRIGHT = 0.5  # from this luminance on a number is dark


def timeline_title(spans: Sequence[Span], schedule: str) -> str:
    """Return the plot's title: the measured bubble, and the schedule's formula."""
    ranks, stages, micro_batches = (
        len({getattr(span, name) for span in spans}) for name in ("rank", "stage", "micro_batch")
    )
    per_rank = stages // ranks
    each = f" × {per_rank} stages" if per_rank > 1 else ""
    parts = [f"{schedule}: {ranks} ranks{each}, {micro_batches} micro-batches"]
    parts.append(f"bubble {100 * bubble_fraction(spans):.1f} %")
    if schedule in SCHEDULES:
        formula = bubble_formula(schedule, ranks, micro_batches, per_rank)
        parts.append(f"by formula {100 * formula:.1f} %")
    return ", ".join(parts)


def draw_timeline(spans: Sequence[Span], path: Path, title: str) -> None:
    """Draw the spans of a step, in seconds, to a .png or .svg file."""
    timeline_figure(spans, title).savefig(path, dpi=160)


def timeline_figure(spans: Sequence[Span], title: str) -> Figure:
    """Build the figure that `draw_timeline` saves, without a window system or pyplot state."""
    stages: dict[int, list[int]] = {}
    for rank, stage in sorted({(span.rank, span.stage) for span in spans}):
        stages.setdefault(rank, []).append(stage)
    begin = min(span.start for span in spans)
    milliseconds = 1e3 * (max(span.end for span in spans) - begin)
    forward = 1e3 * median(span.end - span.start for span in spans if span.kind == "F")
    # As wide as the numbers in the boxes of forwards need, within reason.
    width = INCHES_BESIDE + INCHES_PER_FORWARD * milliseconds / forward
    width = min(WIDE, max(NARROW, width))
    height = INCHES_AROUND + INCHES_PER_RANK * len(stages)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    rows = {rank: row for row, rank in enumerate(stages)}
    for row in rows.values():
        axes.broken_barh([(0, milliseconds)], (row - ROW / 2, ROW), color=WAITING, zorder=0)
    points = POINTS_PER_INCH * (width - INCHES_BESIDE) / milliseconds
    digits = len(str(max(span.micro_batch for span in spans)))
    font = min(LARGEST_FONT, _font_size(forward * points, digits))  # one size for most boxes
    for span in spans:
        own = stages[span.rank]
        paler = PALER * own.index(span.stage) / max(1, len(own) - 1)
        _draw_action(axes, span, rows[span.rank], begin, paler, points, font)
    _draw_frame(axes, stages, milliseconds, title)
    _draw_legend(figure, {span.kind for span in spans}, stages)
    return figure


def _font_size(points: float, digits: int) -> float:
    """Return the font size at which a number fits into a box."""
    return points / (DIGIT * digits)


def _draw_action(
    axes: Axes, span: Span, row: int, begin: float, paler: float, points: float, font: float
) -> None:
    """Draw an action's box, with its micro-batch if it fits; `points` per millisecond."""
    start, duration = 1e3 * (span.start - begin), 1e3 * (span.end - span.start)
    colour = tuple(part + paler * (1 - part) for part in to_rgb(COLOURS[span.kind]))
    # White lines between boxes, but none that hides the boxes themselves.
    line = min(0.6, 0.1 * duration * points)
    box = Rectangle((start, row - ROW / 2), duration, ROW)
    box.set(facecolor=colour, edgecolor=EDGE, linewidth=line)
    axes.add_patch(box)
    number = str(span.micro_batch)
    size = min(font, _font_size(duration * points, len(number)))
    if size >= SMALLEST_FONT:
        luminance = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour, strict=True))
        axes.text(
            start + duration / 2,
            row,
            number,
            fontsize=size,
            color=DARK if luminance > BRIGHT else LIGHT,
            ha="center",
            va="center_baseline",
        )


def _draw_frame(axes: Axes, stages: dict[int, list[int]], milliseconds: float, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, pad=9)
    axes.set_xlabel("milliseconds", fontsize=9)
    axes.set_xlim(0, milliseconds)
    axes.set_ylim(len(stages) - 0.5, -0.5)  # the first rank on top
    names = [
        f"rank {rank}\nstage{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
        for rank, own in stages.items()
    ]
    axes.set_yticks(range(len(stages)), names, fontsize=7.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_legend(figure: Figure, kinds: set[str], stages: dict[int, list[int]]) -> None:
    entries = [Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in KINDS if kind in kinds]
    entries.append(Patch(color=WAITING, label="waiting"))
    several = any(len(own) > 1 for own in stages.values())
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=len(entries),
        fontsize=8.5,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.8,
        title="paler: later stages of a rank" if several else None,
        title_fontsize=7.5,
    )
