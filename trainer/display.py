"""The console of a run: a live bar on a terminal, one plain line per record elsewhere."""

import math
import os
import sys
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SHOWN_WAIT_SHARE = 0.01  # the live bar mentions waiting for data from here on


class Lasting:
    """A stream that outlives its reader: once it cannot be written, it is switched off.

    Everything else is the stream's own.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._switch_off()
            return len(text)

    def flush(self) -> None:
        """Flush, or lose what is held back."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._switch_off()

    def _switch_off(self) -> None:
        """Lead the stream nowhere: what it holds back would fail again when the process ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        except (OSError, ValueError):  # it has no descriptor
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        finally:
            os.close(nowhere)


def open_console() -> Console:
    """The console on stdout; whoever reads it may leave."""
    return Console(file=cast(IO[str], Lasting(sys.stdout)) if sys.stdout else None)


class Display:
    """What is shown of a run."""

    def __init__(self, console: Console, steps: int, unit: str):
        self._console = console
        self._steps = steps
        self._unit = unit
        # Colours may be forced on a log file; a bar that redraws itself must not be.
        live = console.is_interactive and console.file.isatty()
        columns = (BarColumn(bar_width=10), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, console=console, refresh_per_second=4) if live else None
        self._seconds_left = math.nan
        self._details = ""

    def start(self, step: int) -> None:
        """Show the bar."""
        if self._bar is not None:
            self._bar.add_task(f"step {step}/{self._steps}", total=self._steps, completed=step)
            self._bar.start()

    def close(self) -> None:
        """Leave the terminal as it was, the bar at its last state."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a finished step."""
        if self._bar is not None and self._bar.tasks:
            head = f"step {step}/{self._steps}"
            self._bar.update(
                self._bar.tasks[0].id, completed=step, description=head + self._details
            )

    def training(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show a training record; `seconds_left` of the whole run."""
        rate, wait = record["tokens_per_second"], record["data_wait_share"]
        parts = [f"  loss {record['loss']:.4g}"]
        if self._bar is None:  # the bar must fit a narrow terminal
            parts.append(f"  grad {record['grad_norm']:.2g}")
        parts += [f"  lr {record['lr']:.1e}", f"  {_short(rate)} {self._unit}/s"]
        if "mfu" in record:
            parts.append(f"  mfu {100 * record['mfu']:.0f} %")
        if self._bar is None or wait > SHOWN_WAIT_SHARE:
            parts.append(f"  wait {100 * wait:.1f} %")
        self._details = "".join(parts) + f"  eta {duration(seconds_left)}"
        if self._bar is None:
            self.say(f"step {record['step']}/{self._steps}{self._details}")
        self.advance(record["step"])

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """Show an evaluation."""
        parts = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items()]
        self.say(f"step {step}  {split}: {'  '.join(parts)}")

    def say(self, text: str) -> None:
        """One line, never wrapped nor coloured by its content; above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(number: float) -> str:
    """Three digits and a unit: 12345 is 12.3k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """4:10, 1:02:03, 2d 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"
