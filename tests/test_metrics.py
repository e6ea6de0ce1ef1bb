"""The recorder on a fake clock: right times, no step twice, valid JSON, one writer."""

import errno
import io
import json
import logging
import os
import pty
import select
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from parallel.simulate import Span
from trainer.config import ConfigError, MetricsConfig
from trainer.display import Display, Lasting, sparkline
from trainer.metrics import Recorder


class FakeClock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make(run_dir: Path, **changes: Any) -> Recorder:
    options: dict[str, Any] = {
        "config": MetricsConfig(every=2), "run_dir": run_dir, "first": True, "steps": 1000,
        "start_step": 0, "resolved": {"seed": 1}, "flops_per_token": 2e9, "devices": 2,
        "device": torch.device("cpu"), "precision_name": "fp32", "clock": FakeClock(),
        "console": Console(file=io.StringIO()),
    }  # fmt: skip
    return Recorder(**(options | changes))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in found if line.get("event") != "goodput"]


def shown(recorder: Recorder) -> str:
    file = recorder._display._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_rates_are_those_since_the_last_line_without_pauses(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock) as recorder:
        clock.seconds += 50  # building the model
        recorder.start(0)
        clock.seconds += 4
        recorder.training(2, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
        clock.seconds += 1
        with recorder.pause():
            clock.seconds += 30
            with recorder.pause():
                clock.seconds += 5
        clock.seconds += 1
        recorder.training(6, 2.5, 0.5, 1e-4, tokens=600, wait_seconds=1.5)
    first, second = lines(tmp_path)
    assert (first["step_seconds"], first["tokens_per_second"]) == (2.0, 50.0)
    assert first["data_wait_share"] == 0.25
    assert (second["step_seconds"], second["tokens_per_second"]) == (0.5, 200.0)
    assert second["data_wait_share"] == 0.25
    assert {k: second[k] for k in ("step", "loss", "grad_norm", "lr", "tokens")} == {
        "step": 6, "loss": 2.5, "grad_norm": 0.5, "lr": 1e-4, "tokens": 600
    }  # fmt: skip
    assert 0.01 < second["memory_gib"] < 100
    assert "mfu" not in second  # the CPU's peak is not known


def test_a_resumed_run_does_not_count_the_tokens_before(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock, start_step=500) as recorder:
        recorder.start(50_000)
        clock.seconds += 4
        recorder.training(502, 3.0, 1.0, 1e-3, tokens=50_200, wait_seconds=0.0)
    assert lines(tmp_path)[0]["step_seconds"] == 2.0
    assert lines(tmp_path)[0]["tokens_per_second"] == 50.0


def test_mfu_is_of_all_devices(tmp_path: Path) -> None:
    clock = FakeClock()
    config = MetricsConfig(peak_tflops=1.0)
    with make(tmp_path, clock=clock, config=config) as recorder:
        recorder.start(0)
        clock.seconds += 1
        recorder.training(10, 3.0, 1.0, 1e-3, tokens=250, wait_seconds=0.0)
    # 2 GFLOP a token, 250 tokens/s: half a TFLOP/s, on two devices of one.
    assert lines(tmp_path)[0]["mfu"] == pytest.approx(0.25)


def test_a_pause_that_raises_ends_too(tmp_path: Path) -> None:
    clock = FakeClock()
    with make(tmp_path, clock=clock) as recorder:
        recorder.start(0)
        with pytest.raises(KeyboardInterrupt), recorder.pause():
            clock.seconds += 9
            raise KeyboardInterrupt
        clock.seconds += 1
        recorder.training(1, 3.0, 1.0, 1e-3, tokens=10, wait_seconds=0.0)
    assert lines(tmp_path)[0]["step_seconds"] == 1.0


@pytest.mark.parametrize(
    ("start_step", "kept"), [(4, [0, 2, 4, 4]), (5, [0, 2, 4, 4]), (0, []), (6, [0, 2, 4, 4, 6])]
)
def test_a_resumed_run_repeats_no_step(tmp_path: Path, start_step: int, kept: list[int]) -> None:
    steps = (0, 2, 4, 4, 6)
    whole = "".join(json.dumps({"step": step}) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 1, "lo')  # killed while writing
    with make(tmp_path, start_step=start_step) as recorder:
        recorder.start(0)
        recorder.evaluation(8, "test", {"eval_loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goodput.json", "metrics.jsonl"]


@pytest.mark.parametrize(("start_step", "kept"), [(0, ["rollback"]), (4, ["skip", "rollback"])])
def test_what_was_left_out_of_the_data_stays_said(
    tmp_path: Path, start_step: int, kept: list[str]
) -> None:
    # The other lines behind the checkpoint come again, but for those of earlier starts.
    with make(tmp_path) as recorder:
        for step, action in ((3, "skip"), (5, "rollback"), (6, "skip"), (7, "stop")):
            record = {"event": "bad_step", "step": step, "rank": None, "action": action}
            recorder.event(record, f"step {step} is bad")
        assert "step 7 is bad\n" in shown(recorder)
    with make(tmp_path, start_step=start_step):
        pass
    assert [line["action"] for line in lines(tmp_path)] == kept


def test_starts_and_saves_are_lines(tmp_path: Path) -> None:
    save = {"event": "save", "step": 4, "seconds": 0.5, "gib": 0.1}
    for starts, start_step in ((1, 0), (2, 6), (3, 4)):  # the last one from an older checkpoint
        (tmp_path / "goodput.json").write_text(json.dumps({"starts": starts}))
        with make(tmp_path, start_step=start_step) as recorder:
            recorder._goodput.ledger.starts = starts
            recorder.begins()
            recorder.saved(save | {"step": start_step + 4})
        with make(tmp_path, first=False) as recorder:
            recorder.begins()
            recorder.saved(save)
    found = lines(tmp_path)
    kept = [(line["event"], line["step"], line.get("start")) for line in found]
    # Every start is told, however far the run went back; a save only if the run still has it.
    assert kept == [("start", 0, 1), ("save", 4, None), ("start", 6, 2), ("start", 4, 3),
                    ("save", 8, None)]  # fmt: skip
    assert found[0]["ranks"] == 2 and found[0]["time"] > 1.7e9


def test_an_evaluation_line(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.evaluation(250, "valid", {"eval_loss": 1.6, "bits_per_character": 2.31})
        console = shown(recorder)
    expected = {"step": 250, "split": "valid", "eval_loss": 1.6, "bits_per_character": 2.31}
    assert lines(tmp_path) == [expected]
    assert console == "step 250  valid: loss 1.6  bits_per_character 2.31\n"


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.start(0)
        recorder.training(2, float("nan"), float("inf"), 1e-3, tokens=10, wait_seconds=0.0)
        recorder.evaluation(2, "valid", {"eval_loss": float("-inf")})
        console = shown(recorder)
    training, evaluation = lines(tmp_path)
    assert training["loss"] is training["grad_norm"] is evaluation["eval_loss"] is None
    assert "loss nan  grad inf" in console


def test_a_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder.evaluation(1, "valid", {"eval_loss": 1.0})
        assert len(lines(tmp_path)) == 1


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    clock = FakeClock()
    # Colours forced on, as some CI does: still no bar, and no wrapping at the console's width.
    console = Console(file=io.StringIO(), width=20, force_terminal=True, color_system=None)
    with make(tmp_path, clock=clock, console=console, steps=120, unit="samples") as recorder:
        recorder.start(0)
        clock.seconds += 10
        with recorder.pause():
            clock.seconds += 20
        recorder.training(20, 3.2144, 0.812, 1e-3, tokens=123_456, wait_seconds=0.02)
        recorder.say("[bold]any text[/bold]")
        text = shown(recorder)
    assert text == (
        "step 20/120  loss 3.214  grad 0.81  lr 1.0e-03  12.3k samples/s  wait 0.2 %  eta 2:30\n"
        "[bold]any text[/bold]\n"
    )


def read_until(terminal: int, end: str) -> str:
    """A terminal hands out what was written in pieces as it likes."""
    written = b""
    while not written.endswith(end.encode()):
        ready, _, _ = select.select([terminal], [], [], 10)
        assert ready, f"{end!r} never came after {written!r}"
        written += os.read(terminal, 1 << 16)
    return written.decode()


def test_a_live_panel_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    clock = FakeClock()
    with os.fdopen(theirs, "w") as file:
        monkeypatch.setattr("sys.stderr", file)
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        console = Console(file=file, width=110, force_interactive=True, force_terminal=True)
        with make(tmp_path, clock=clock, console=console) as recorder:
            recorder.start(0)
            assert handler.stream is not file  # it writes above the panel, not through it
            clock.seconds += 10
            recorder.training(2, 3.2, 0.8, 1e-3, tokens=12_300, wait_seconds=1.0)
            recorder.saved({"event": "save", "step": 2})
            recorder.step_done()
        logging.getLogger().removeHandler(handler)
        assert handler.stream is file
        file.flush()
        written = read_until(ours, "\x1b[?25h")  # the cursor is back
    os.close(ours)
    assert "3.2" in written and "data wait 10.0 %" in written
    # Drawn whole, after its cursor moved up over the panel before.
    assert written.count("checkpoint") > written.count("none yet") >= 0
    assert "2/1000" in written or "1/1000" in written


def panel(display: Display, console: Console) -> str:
    with console.capture() as captured:
        console.print(display.panel())
    return captured.get()


RECORD = {
    "step": 20, "loss": 3.2144, "grad_norm": 0.812, "lr": 1e-3, "tokens_per_second": 12_345.6,
    "memory_gib": 1.204, "data_wait_share": 0.002, "mfu": 0.412,
}  # fmt: skip


def test_what_the_panel_tells() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = Display(console, 120, "tok", name="a run [bold]")
    display.start(0)
    text = panel(display, console)
    assert "a run [bold]" in text and "0/120" in text and "none yet" in text and "loss" not in text
    for loss in (4.0, float("nan"), 3.0, 3.5):
        display.training(RECORD | {"loss": loss}, seconds_left=150.0)
    display.training(RECORD, seconds_left=150.0)
    display.advance(23)
    display.saved(10)
    display.evaluation(20, "valid", {"eval_loss": 3.4, "perplexity": 29.96})
    text = panel(display, console)
    for told in (
        "23/120", "19 %  eta 2:30", "3.214  █ ▁▅▃", "norm 0.81  lr 1.0e-03", "12.3k tok/s",
        "mfu 41 %", "data wait 0.2 %", "1.20 GiB", "step 10", "valid: loss 3.4  perplexity 29.96",
    ):  # fmt: skip
        assert told in text, told
    assert max(map(len, panel(display, Console(width=34)).splitlines())) == 34
    resumed = Display(console, 120, "tok")
    resumed.start(10)
    assert "step 10" in panel(resumed, console)  # the checkpoint that it came from


def test_sparklines() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([5.0, float("inf"), 5.0]) == "▁ ▁"
    assert sparkline([]) == sparkline([])[:0] == ""


def test_an_exception_passes_and_closes_everything(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path) as recorder:
        recorder.start(0)
        raise KeyboardInterrupt
    assert recorder._file._file.closed


def test_other_ranks_write_and_say_nothing(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    config = MetricsConfig(profile_steps=2, wandb="offline")
    with make(tmp_path, first=False, console=console, config=config) as recorder:
        recorder.start(0)
        recorder.training(2, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
        with recorder.pause():
            recorder.evaluation(2, "valid", {"eval_loss": 1.0})
        recorder.say("text")
        recorder.step_done()
        assert recorder.profiler is None
    assert list(tmp_path.iterdir()) == []
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", [True, False])
def test_due_is_the_same_on_all_ranks(tmp_path: Path, first: bool) -> None:
    with make(tmp_path, first=first, config=MetricsConfig(every=10), steps=25) as recorder:
        assert [step for step in range(1, 26) if recorder.due(step)] == [10, 20, 25]


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
            assert [step for step in taken if recorder.draws(step)] == drawn
    with make(tmp_path, **options) as recorder:
        assert not any(recorder.draws(step) for step in taken)


@pytest.mark.parametrize(("steps", "first_traced"), [(16, 10), (5, 3)])
def test_profiler_traces_the_steps_after_warm_up(
    tmp_path: Path, steps: int, first_traced: int
) -> None:
    config = MetricsConfig(profile_steps=2)
    with make(tmp_path, config=config, steps=steps) as recorder:
        recorder.start(0)
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
        recorder.start(0)
        for _ in range(3):
            with recorder.waiting():
                clock.seconds += 1
            clock.seconds += 4
            recorder.step_done()
        recorder.training(3, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=3.0)
        written = json.loads((tmp_path / "goodput.json").read_text())  # at once: a kill may come
        with recorder.pause("evaluation"):
            clock.seconds += 20
        with recorder.pause("save"):
            clock.seconds += 5
    assert written["seconds"]["useful"] == 8.0
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], line["event"], line["total_seconds"]) == (3, "goodput", 50.0)
    seconds = {k.removesuffix("_seconds"): s for k, s in line.items() if k.endswith("_seconds")}
    assert {k: s for k, s in seconds.items() if s} == {
        "useful": 8.0, "restart": 15.0, "data_wait": 2.0, "evaluation": 20.0, "save": 5.0,
        "total": 50.0,
    }  # fmt: skip
    assert shown(recorder).splitlines()[-1].startswith("goodput 16.0 % of 50 s in 1 start; lost: ")


class FullDisk:
    """Stands in for an open file: takes so many bytes more, then there is no room."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        disk = FullDisk(recorder._file._file, room=70)
        recorder._file._file = disk
        for step in (1, 2, 3):  # the second is cut in the middle
            recorder.evaluation(step, "valid", {"eval_loss": 1.0})
            assert [line["step"] for line in lines(tmp_path)] == [1]
        disk.room = 10_000
        recorder.evaluation(4, "valid", {"eval_loss": 1.0})
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
        disk.room = 0
        recorder.evaluation(5, "valid", {"eval_loss": 1.0})
    said = [line for line in shown(recorder).splitlines() if "metrics.jsonl" in line]
    assert len(said) == 3  # once for each time that it was full, and at the end
    assert "cannot be written (No space left on device); training goes on" in said[0]
    assert said[-1].endswith("there was no room for the last 1 lines")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_metrics_file_that_cannot_be_opened_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(Is a directory\)"):
        make(tmp_path)


def test_bytes_that_are_no_text_are_dropped_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\xfe\x00p": 2}\n{"step": 2}\n')
    with make(tmp_path, start_step=2):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_picture_that_finds_no_room_ends_no_run(tmp_path: Path) -> None:
    with make(tmp_path) as recorder:
        recorder._run_dir = tmp_path / "gone"
        recorder.timeline(5, [Span(0, 0, "F", 0, 0.0, 1.0)], "gpipe")
        recorder._run_dir = tmp_path
    assert "timeline.png cannot be written" in shown(recorder)


class Broken(io.StringIO):
    """A stream without a descriptor whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_console_without_a_reader_is_switched_off(tmp_path: Path) -> None:
    with make(tmp_path, console=Console(file=Lasting(Broken()))) as recorder:  # type: ignore[arg-type]
        recorder.start(0)
        for step in (2, 4):
            recorder.training(step, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
