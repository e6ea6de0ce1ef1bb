"""What a run shows: plain lines, a live panel on a terminal, nothing to a reader that left."""

import errno
import io
import logging
import os
import pty
import select
from pathlib import Path

import pytest
from recorders import FakeClock, lines, make, shown
from rich.console import Console

from trainer.metrics.console import Display, TolerantStream, draw_sparkline


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    clock = FakeClock()
    # Colours forced on, as some CI does: still no bar, and no wrapping at the console's width.
    console = Console(file=io.StringIO(), width=20, force_terminal=True, color_system=None)
    with make(tmp_path, clock=clock, console=console, steps=120, unit="samples") as recorder:
        recorder.start_clock(0)
        clock.seconds += 10
        with recorder.pause_training():
            clock.seconds += 20
        recorder.log_training(20, 3.2144, 0.812, 1e-3, tokens=123_456, wait_seconds=0.02)
        recorder.print_line("[bold]any text[/bold]")
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
    monkeypatch.setenv("TERM", "xterm")  # one that is not dumb, whatever the tests run in
    with os.fdopen(theirs, "w") as file:
        monkeypatch.setattr("sys.stderr", file)
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        console = Console(file=file, width=110, force_interactive=True, force_terminal=True)
        with make(tmp_path, clock=clock, console=console) as recorder:
            recorder.start_clock(0)
            assert handler.stream is not file  # it writes above the panel, not through it
            clock.seconds += 10
            recorder.log_training(2, 3.2, 0.8, 1e-3, tokens=12_300, wait_seconds=1.0)
            recorder.log_save({"event": "save", "step": 2})
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
    "step": 20,
    "loss": 3.2144,
    "grad_norm": 0.812,
    "lr": 1e-3,
    "tokens_per_second": 12_345.6,
    "memory_gib": 1.204,
    "data_wait_share": 0.002,
    "mfu": 0.412,
}


def test_what_the_panel_tells() -> None:
    console = Console(file=io.StringIO(), width=100)
    display = Display(console, 120, "tok", name="a run [bold]")
    display.start(0)
    text = panel(display, console)
    assert "a run [bold]" in text and "0/120" in text and "none yet" in text and "loss" not in text
    for loss in (4.0, float("nan"), 3.0, 3.5):
        display.show_training(RECORD | {"loss": loss}, seconds_left=150.0)
    display.show_training(RECORD, seconds_left=150.0)
    display.advance(23)
    display.show_saved(10)
    display.show_evaluation(20, "valid", {"eval_loss": 3.4, "perplexity": 29.96})
    text = panel(display, console)
    for told in (
        "23/120",
        "19 %  eta 2:30",
        "3.214  █ ▁▅▃",
        "norm 0.81  lr 1.0e-03",
        "12.3k tok/s",
        "mfu 41 %",
        "data wait 0.2 %",
        "1.20 GiB",
        "step 10",
        "valid: loss 3.4  perplexity 29.96",
    ):
        assert told in text, told
    assert max(map(len, panel(display, Console(width=34)).splitlines())) == 34
    resumed = Display(console, 120, "tok")
    resumed.start(10)
    assert "step 10" in panel(resumed, console)  # the checkpoint that it came from


def test_sparklines() -> None:
    assert draw_sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert draw_sparkline([5.0, float("inf"), 5.0]) == "▁ ▁"
    assert draw_sparkline([]) == draw_sparkline([])[:0] == ""


class Broken(io.StringIO):
    """A stream without a descriptor whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_console_without_a_reader_is_switched_off(tmp_path: Path) -> None:
    with make(tmp_path, console=Console(file=TolerantStream(Broken()))) as recorder:  # type: ignore[arg-type]
        recorder.start_clock(0)
        for step in (2, 4):
            recorder.log_training(step, 3.0, 1.0, 1e-3, tokens=200, wait_seconds=1.0)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
