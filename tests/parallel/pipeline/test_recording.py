"""A recorded step has every action, in its order and its place, and the loop draws it."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from matplotlib.image import imread

from launch.cli.preflight import prepare_training
from parallel.pipeline.schedules import stages_per_rank
from parallel.pipeline.simulator import Action, Span, bubble_fraction
from parallel.pipeline.torch_schedules import list_actions
from parallel.pipeline.trace import Recording, merge_ranks
from parallel.strategy import StrategyConfig, world_size
from trainer import loop
from trainer.config.train import CheckpointConfig, EvalConfig, MetricsConfig, TrainConfig
from trainer.loss import cross_entropy_sum
from trainer.metrics import timeline_plot as timeline

LOSS_SECONDS = 0.02
LAYOUTS = {
    "gpipe": StrategyConfig(pipeline=2),
    "zbv": StrategyConfig(pipeline=2, schedule="zbv"),
    "dualpipev": StrategyConfig(pipeline=2, schedule="dualpipev"),
    "1f1b, ddp 2": StrategyConfig(pipeline=2, replicate=2, schedule="1f1b"),
}


def drawn(runtime, config: TrainConfig) -> tuple[list[tuple[list[Span], Path, str]], int]:
    """What this rank draws in training, and how many steps it records; a loss takes a while."""
    seen, recorded = [], []
    timeline_draw, start = timeline.draw_timeline, Recording.start

    def draw(spans, path, title):
        seen.append((spans, path, title))
        timeline_draw(spans, path, title)

    def slow_loss(*args, **options):
        time.sleep(LOSS_SECONDS)
        return cross_entropy_sum(*args, **options)

    with (
        mock.patch("trainer.metrics.timeline_plot.draw_timeline", draw),
        mock.patch("trainer.loss.cross_entropy_sum", slow_loss),
        mock.patch("trainer.metrics.recorder.DRAWN_STEP", 2),
        mock.patch.object(Recording, "start", lambda self: (start(self), recorded.append(self))),
    ):
        loop.train(config, runtime)
    return seen, len(recorded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_drawn_as_it_ran(ranks, tmp_path, layout):
    strategy = LAYOUTS[layout]
    world = world_size(strategy)
    config = TrainConfig(
        model=replace(tiny.LLAMA, layers=4, vocab_size=0, max_positions=0),
        data=tiny.text_data(tmp_path / "data"),
        strategy=strategy,
        eval=EvalConfig(every=0, samples=2, test=False),
        checkpoint=CheckpointConfig(every=0),
        metrics=MetricsConfig(timeline=True, sample_tokens=0),
        device="cpu",
        steps=3,
        batch_size=4 * strategy.replicate,
        micro_batch_size=1,
        run_dir=str(tmp_path / "run"),
    )
    results = ranks.run(world, drawn, prepare_training(config, world))
    assert [len(seen) for seen, _ in results] == [1] + [0] * (world - 1)
    assert [recorded for _, recorded in results] == [1] * world
    ((spans, path, title),) = results[0][0]
    assert path == tmp_path / "run" / "timeline.png" and imread(path).shape[0] > 200
    assert title.startswith(f"step 2, {strategy.schedule}: 2 ranks")
    lists = list_actions(strategy.schedule, 2, stages_per_rank(strategy), 4)
    for rank, listed in lists.items():
        own = [span for span in spans if span.rank == rank]
        ran = [Action(span.stage, span.kind, span.micro_batch) for span in own]
        assert ran == [action._replace(joined=False) for action in listed]
        assert all(before.end <= after.start for before, after in pairwise(own))
    assert min(span.start for span in spans) == 0
    assert 0 < bubble_fraction(spans) < 1
    ended = {
        (s.stage, "F" if s.kind == "F" else "B", s.micro_batch): s.end
        for s in spans
        if s.kind != "W"
    }
    last = max(span.stage for span in spans)
    for span in spans:
        if span.kind == "F" and span.stage:
            assert span.start >= ended[span.stage - 1, "F", span.micro_batch]
        if span.kind in "BI" and span.stage < last:
            assert span.start >= ended[span.stage + 1, "B", span.micro_batch]
        if span.kind == "F" and span.stage == last:  # the loss is part of it
            assert span.end - span.start >= LOSS_SECONDS


def test_ranks_of_one_host_share_its_clock():
    """Rank 1 left the meeting one second after rank 0."""
    first = [Span(0, 0, "F", 0, 2.0, 3.0)]
    second = [Span(1, 1, "F", 0, 4.0, 5.0)]
    assert merge_ranks([("a", 100.0, first), ("a", 101.0, second)]) == [
        Span(0, 0, "F", 0, 0.0, 1.0),
        Span(1, 1, "F", 0, 3.0, 4.0),
    ]
    assert merge_ranks([("a", 100.0, first), ("b", 5000.0, second)]) == [
        Span(0, 0, "F", 0, 0.0, 1.0),
        Span(1, 1, "F", 0, 2.0, 3.0),
    ]


def test_a_second_piece_prolongs_a_span():
    recording = Recording("1f1b", None, torch.device("cpu"))
    action = Action(1, "F", 0)
    with recording.record_span(action):
        pass
    between = time.perf_counter()
    with recording.record_span(action):
        pass
    ((start, end),) = recording._marks.values()
    assert start <= between <= end
