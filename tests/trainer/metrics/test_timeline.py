"""The picture of a schedule shows every action where and when it ran."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from parallel.pipeline.simulator import UNIT_COSTS, Action, simulate_schedule
from parallel.pipeline.torch_schedules import list_actions
from trainer.metrics.timeline_plot import COLOURS, draw_timeline, timeline_figure, timeline_title

ROOT = Path(__file__).parents[3]


def steps(schedule, ranks, stages, micro_batches):
    """Spans of a step whose forwards take 3 milliseconds."""
    lists = list_actions(schedule, ranks, stages, micro_batches)
    return simulate_schedule(lists, lambda action: 0.003 * UNIT_COSTS[action.kind])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_written(tmp_path, suffix):
    path = tmp_path / f"timeline.{suffix}"
    draw_timeline(steps("1f1b", 2, 1, 4), path, "as it ran")
    if suffix == "svg":
        assert "<svg" in path.read_text() and path.stat().st_size > 10_000
        return
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] > 200 and pixels.shape[1] > 1000
    colours = {tuple(pixel) for pixel in pixels.reshape(-1, 3)[::7].round(2).tolist()}
    assert len(colours) > 10


@pytest.mark.parametrize(
    "layout", [("1f1b", 2, 1, 4), ("zero_bubble", 4, 2, 8), ("dualpipev", 4, 2, 8)], ids=str
)
def test_every_span_is_a_box_in_its_place(layout):
    spans = steps(*layout)
    axes = timeline_figure(spans, "as it ran").axes[0]
    assert len(axes.patches) == len(spans)
    assert axes.get_title(loc="left") == "as it ran" and axes.yaxis_inverted()
    for span, box in zip(spans, axes.patches, strict=True):
        assert box.get_x() == pytest.approx(1e3 * span.start)
        assert box.get_width() == pytest.approx(1e3 * (span.end - span.start))
        assert box.get_y() + box.get_height() / 2 == pytest.approx(span.rank)
    last = max(span.end for span in spans)
    assert axes.get_xlim() == pytest.approx((0, 1e3 * last))
    assert len(axes.collections) == layout[1]  # the grey behind each rank
    assert [text.get_text() for text in axes.texts] == [str(span.micro_batch) for span in spans]


def test_kinds_and_stages_have_their_colours():
    spans = steps("zbv", 2, 2, 4)
    figure = timeline_figure(spans, "as it ran")
    shown = {}
    for span, box in zip(spans, figure.axes[0].patches, strict=True):
        shown.setdefault((span.kind, span.stage in (0, 1)), set()).add(to_hex(box.get_facecolor()))
    assert all(len(colours) == 1 for colours in shown.values())
    assert len(set.union(*shown.values())) == 6  # three kinds, of a rank's first stage and last
    assert all(shown[kind, True] == {COLOURS[kind].lower()} for kind in "FIW")
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["forward", "backward of the inputs", "backward of the weights", "waiting"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "rank 0\nstages 0, 3",
        "rank 1\nstages 1, 2",
    ]


def test_a_run_that_began_late_starts_at_zero():
    spans = [s._replace(start=s.start + 5, end=s.end + 5) for s in steps("gpipe", 2, 1, 2)]
    axes = timeline_figure(spans, "as it ran").axes[0]
    assert axes.patches[0].get_x() == 0 and axes.get_xlim() == pytest.approx((0, 27))


def test_numbers_that_do_not_fit_are_left_out():
    spans = simulate_schedule(
        {0: [Action(0, "F", 0), Action(0, "F", 10), Action(0, "B", 0), Action(0, "B", 10)]},
        lambda action: 1.0 if action.micro_batch else 1e-4,
    )
    assert [text.get_text() for text in timeline_figure(spans, "").axes[0].texts] == ["10", "10"]


def test_heading_has_the_bubble_beside_the_formula():
    ran = simulate_schedule(
        list_actions("1f1b", 2, 1, 4), lambda action: 1 if action.kind == "F" else 1.5
    )
    assert timeline_title(ran, "1f1b") == (
        "1f1b: 2 ranks, 4 micro-batches, bubble 20.0 %, by formula 20.0 %"
    )
    # Rank 0 is busy for all of 36, rank 1 for 24.
    slow = simulate_schedule(list_actions("zbv", 2, 2, 4), lambda action: 1 + (action.stage == 0))
    assert timeline_title(slow, "zbv") == (
        "zbv: 2 ranks × 2 stages, 4 micro-batches, bubble 16.7 %, by formula 4.0 %"
    )
    assert timeline_title(ran, "own.csv") == "own.csv: 2 ranks, 4 micro-batches, bubble 20.0 %"


def test_help_does_not_load_it():
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "train.py"), "--help"]
    loaded = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert loaded.returncode == 0 and "hydra" in loaded.stderr
    assert "matplotlib" not in loaded.stderr
