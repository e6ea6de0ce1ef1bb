"""The console of a run: a live panel on a terminal, one plain line per record elsewhere."""

import logging
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REDRAWS_PER_SECOND = 2
LOSSES = 60  # newest ones in the sparkline
MARGIN = 32  # columns of the panel beside the sparkline
BLOCKS = "▁▂▃▄▅▆▇█"


# The logger of the lines that a console without a panel shows; for a file, they are not said twice.
CONSOLE = "samestep.console"
_lines = logging.getLogger(CONSOLE)
_lines.propagate = False


class TolerantStream:
    """A stream that is switched off once it cannot be written; otherwise a transparent wrapper."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; drop it if the stream cannot be written."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._switch_off()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop its buffer if it cannot be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._switch_off()

    def _switch_off(self) -> None:
        """Redirect the stream to the null device: its buffer would fail again at exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        except (OSError, ValueError):  # it has no descriptor
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        finally:
            os.close(nowhere)


def open_console() -> Console:
    """Return the console on stdout, whose reader may close it."""
    return Console(file=cast(IO[str], TolerantStream(sys.stdout)) if sys.stdout else None)


def print_whole(table: Table) -> None:
    """Print a table on stdout in its full width: a narrow terminal cuts no number off."""
    console = Console()
    # A log file's width is 80, and nothing is measured as more than that.
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)


@contextmanager
def live_display(live: Live) -> Iterator[None]:
    """Show a live display; log lines are printed above it."""
    before, moved = sys.stderr, []
    try:
        with live:
            for handler in logging.getLogger().handlers if sys.stderr is not before else ():
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    handler.setStream(sys.stderr)
                    moved.append(handler)
            yield
    finally:
        for handler in moved:
            handler.setStream(before)


class Display:
    """The display of a run: a live panel on a terminal, lines elsewhere."""

    def __init__(self, console: Console, steps: int, unit: str, name: str = ""):
        self._console, self._steps, self._unit, self._name = console, steps, unit, name
        self._drawn = ExitStack()
        self._step = 0
        self._saved: int | None = None  # step of the newest checkpoint
        self._record: dict[str, Any] = {}  # the last training record
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._seconds_left = math.nan
        self._evaluation = ""
        # Colours may be forced on a log file; a panel that redraws itself must not be.
        live = console.is_interactive and console.file.isatty()
        # It is drawn by a thread of its own, from plain values: a step only sets a number.
        self._live = self._panel_of(console) if live else None

    def start(self, step: int) -> None:
        """Show the panel."""
        self._step, self._saved = step, step or None
        if self._live is not None:
            self._drawn.enter_context(live_display(self._live))

    def close(self) -> None:
        """Restore the terminal, with the panel in its last state."""
        self._drawn.close()

    def advance(self, step: int) -> None:
        """Advance the progress by one step."""
        self._step = step

    def show_saved(self, step: int) -> None:
        """Show a finished checkpoint."""
        self._saved = step

    def show_training(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show a training record; `seconds_left` of the whole run."""
        self._record, self._seconds_left, self._step = record, seconds_left, record["step"]
        self._losses.append(record["loss"])
        parts = [
            f"step {record['step']}/{self._steps}",
            f"loss {record['loss']:.4g}",
            f"grad {record['grad_norm']:.2g}",
            f"lr {record['lr']:.1e}",
            *self._speed_parts("wait"),
            f"eta {format_duration(seconds_left)}",
        ]
        if self._live is None:
            self.print_line("  ".join(parts))
        else:
            _lines.info("  ".join(parts))

    def show_evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """Show an evaluation record."""
        parts = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items()]
        text = f"{split}: {'  '.join(parts)}"
        self._evaluation = f"{text}  at step {step}"
        self.print_line(f"step {step}  {text}")

    def print_line(self, text: str) -> None:
        """Print one line above the panel, without wrapping or colouring."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        _lines.info(text)

    def _speed_parts(self, wait: str) -> list[str]:
        record = self._record
        mfu = [f"mfu {100 * record['mfu']:.0f} %"] if "mfu" in record else []
        rate = f"{format_number(record['tokens_per_second'])} {self._unit}/s"
        return [rate, *mfu, f"{wait} {100 * record['data_wait_share']:.1f} %"]

    def _panel_of(self, console: Console) -> Live:
        return Live(
            get_renderable=self.panel,
            console=console,
            refresh_per_second=REDRAWS_PER_SECOND,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )

    def panel(self) -> Panel:
        """Return the panel of the run's current state."""
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(ratio=1)
        for title, value in self._panel_rows().items():
            rows.add_row(title, value)
        return Panel(
            rows,
            title=Text(self._name, overflow="ellipsis"),
            title_align="left",
            border_style="dim",
            box=box.ROUNDED,
        )

    def _panel_rows(self) -> dict[str, RenderableType]:
        record = self._record
        rows: dict[str, RenderableType] = {"step": self._progress_table()}
        if record:
            finite = math.isfinite(record["loss"])
            loss = Text(f"{record['loss']:.4g}  ", style="bold" if finite else "bold red")
            if not self._console.options.ascii_only:
                room = max(8, self._console.width - MARGIN)
                loss.append(draw_sparkline(list(self._losses)[-room:]), style="cyan")
            rows["loss"] = loss
            norm, lr = f"{record['grad_norm']:.2g}", f"{record['lr']:.1e}"
            rows["gradient"] = Text(f"norm {norm}  lr {lr}")
            rows["speed"] = Text("  ".join(self._speed_parts("data wait")))
            rows["memory"] = Text(f"{record['memory_gib']:.2f} GiB")
        if self._evaluation:
            rows["eval"] = Text(self._evaluation)
        there = "none yet" if self._saved is None else f"step {self._saved}"
        rows["checkpoint"] = Text(there)
        return rows

    def _progress_table(self) -> Table:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        left = (
            "" if math.isnan(self._seconds_left) else f"  eta {format_duration(self._seconds_left)}"
        )
        line.add_row(
            f"{self._step}/{self._steps}",
            ProgressBar(self._steps, self._step),
            f"{100 * self._step / self._steps:.0f} %{left}",
        )
        return line


def draw_sparkline(values: Sequence[float]) -> str:
    """Draw values as blocks of eight heights; a gap for no number."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )


def format_number(number: float) -> str:
    """Format a number with three digits and a unit: 12345 is 12.3k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as 4:10, 1:02:03 or 2d 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"
