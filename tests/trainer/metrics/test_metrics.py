"""The recorder on a fake clock: right times, one writer."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorders import FakeClock, lines, make, shown
from rich.console import Console

from parallel.pipeline.simulator import Span
from trainer.config.train import MetricsConfig


def test_rates_are_those_since_the_last_line_without_pauses(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock) as recorder:
        clock.seconds += 50  # building the model
        recorder.start_clock(0)
        clock.seconds += 4
        recorder.log_training(2, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
        clock.seconds += 1
        with recorder.pause_training():
            clock.seconds += 30
            with recorder.pause_training():
                clock.seconds += 5
        clock.seconds += 1
        recorder.log_training(6, 2.5, 0.5, 1e-4, tokens=600, wait_seconds=1.5)
    first, second = lines(tmp_path)
    assert (first["step_seconds"], first["tokens_per_second"]) == (2.0, 50.0)
    assert first["data_wait_share"] == 0.25
    assert (second["step_seconds"], second["tokens_per_second"]) == (0.5, 200.0)
    assert second["data_wait_share"] == 0.25
    assert {k: second[k] for k in ("step", "loss", "grad_norm", "lr", "tokens")} == {
        "step": 6,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "tokens": 600,
    }
    assert 0.01 < second["memory_gib"] < 100
    assert "mfu" not in second  # the CPU's peak is not known


def test_a_resumed_run_does_not_count_the_tokens_before(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock, start_step=500) as recorder:
        recorder.start_clock(50_000)
        clock.seconds += 4
        recorder.log_training(502, 3.0, 1.0, 1e-3, tokens=50_200, wait_seconds=0.0)
    assert lines(tmp_path)[0]["step_seconds"] == 2.0
    assert lines(tmp_path)[0]["tokens_per_second"] == 50.0


def test_mfu_is_of_all_devices(tmp_path: Path) -> None:
    clock = FakeClock()
    config = MetricsConfig(peak_tflops=1.0)
    with make(tmp_path, clock=clock, config=config) as recorder:
        recorder.start_clock(0)
        clock.seconds += 1
        recorder.log_training(10, 3.0, 1.0, 1e-3, tokens=250, wait_seconds=0.0)
    # 2 GFLOP a token, 250 tokens/s: half a TFLOP/s, on two devices of one.
    assert lines(tmp_path)[0]["mfu"] == pytest.approx(0.25)


def test_a_pause_that_raises_ends_too(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock) as recorder:
        recorder.start_clock(0)
        with pytest.raises(KeyboardInterrupt), recorder.pause_training():
            clock.seconds += 9
            raise KeyboardInterrupt
        clock.seconds += 1
        recorder.log_training(1, 3.0, 1.0, 1e-3, tokens=10, wait_seconds=0.0)
    assert lines(tmp_path)[0]["step_seconds"] == 1.0


def test_an_evaluation_line(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.log_evaluation(250, "valid", {"eval_loss": 1.6, "bits_per_character": 2.31})
        console = shown(recorder)
    expected = {"step": 250, "split": "valid", "eval_loss": 1.6, "bits_per_character": 2.31}
    assert lines(tmp_path) == [expected]
    assert console == "step 250  valid: loss 1.6  bits_per_character 2.31\n"


def test_an_exception_passes_and_closes_everything(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path) as recorder:
        recorder.start_clock(0)
        raise KeyboardInterrupt
    assert recorder._file._file.closed


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    config = MetricsConfig(profile_steps=2, wandb="offline")
    with make(tmp_path, first=False, console=console, config=config) as recorder:
        recorder.start_clock(0)
        recorder.log_training(2, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
        with recorder.pause_training():
            recorder.log_evaluation(2, "valid", {"eval_loss": 1.0})
        recorder.print_line("text")
        recorder.step_done()
        assert recorder.profiler is None
    assert list(tmp_path.iterdir()) == []
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", [True, False])
def test_due_is_the_same_on_all_ranks(tmp_path: Path, first: bool) -> None:
    with make(tmp_path, first=first, config=MetricsConfig(every=10), steps=25) as recorder:
        assert [step for step in range(1, 26) if recorder.is_due(step)] == [10, 20, 25]


@pytest.mark.parametrize(
    ("start_step", "steps", "drawn"), [(0, 8, [5]), (0, 3, [3]), (20, 40, [25]), (8, 8, [])]
)
def test_one_step_is_drawn_after_warm_up(
    tmp_path: Path, start_step: int, steps: int, drawn: list[int]
) -> None:
    config = MetricsConfig(timeline=True)
    options = {"start_step": start_step, "steps": steps}
    taken = range(start_step + 1, steps + 1)
    for first in (True, False):  # the ranks record it together
        with make(tmp_path, config=config, first=first, **options) as recorder:
            assert [step for step in taken if recorder.records_timeline(step)] == drawn
    with make(tmp_path, **options) as recorder:
        assert not any(recorder.records_timeline(step) for step in taken)


@pytest.mark.parametrize(("steps", "first_traced"), [(16, 10), (5, 3)])
def test_profiler_traces_the_steps_after_warm_up(
    tmp_path: Path, steps: int, first_traced: int
) -> None:
    config = MetricsConfig(profile_steps=2)
    with make(tmp_path, config=config, steps=steps) as recorder:
        recorder.start_clock(0)
        for step in range(steps):
            with torch.profiler.record_function(f"training step {step}"):
                torch.ones(2).sum()
            recorder.step_done()
        assert f"profiler trace: {tmp_path / 'trace.json'}" in shown(recorder)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if "training step" in event.get("name", "")}
    assert names == {f"training step {first_traced + i}" for i in range(2)}


def test_goodput_is_the_last_line_of_a_run(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock) as recorder:
        clock.seconds += 10
        recorder.start_clock(0)
        for _ in range(3):
            with recorder.track_data_wait():
                clock.seconds += 1
            clock.seconds += 4
            recorder.step_done()
        recorder.log_training(3, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=3.0)
        written = json.loads((tmp_path / "goodput.json").read_text())  # at once: a kill may come
        with recorder.pause_training("evaluation"):
            clock.seconds += 20
        with recorder.pause_training("save"):
            clock.seconds += 5
    assert written["seconds"]["useful"] == 8.0
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], line["event"], line["total_seconds"]) == (3, "goodput", 50.0)
    seconds = {k.removesuffix("_seconds"): s for k, s in line.items() if k.endswith("_seconds")}
    assert {k: s for k, s in seconds.items() if s} == {
        "useful": 8.0,
        "restart": 15.0,
        "data_wait": 2.0,
        "evaluation": 20.0,
        "save": 5.0,
        "total": 50.0,
    }
    assert shown(recorder).splitlines()[-1].startswith("goodput 16.0 % of 50 s in 1 start; lost: ")


def test_a_picture_that_finds_no_room_ends_no_run(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        run = recorder._run
        recorder._run = replace(run, run_dir=tmp_path / "gone")
        recorder.draw_timeline(5, [Span(0, 0, "F", 0, 0.0, 1.0)], "gpipe")
        recorder._run = run
    assert "timeline.png cannot be written" in shown(recorder)
