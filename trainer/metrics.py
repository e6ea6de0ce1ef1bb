"""What a run tells: metrics.jsonl, the console, a trace, a picture and, mirrored, wandb.

One rank writes. Everything here is plain Python on numbers that the loop already has; the one thing
it asks of the device is to be idle where a pause begins and ends, so that times are right.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.profiler import ProfilerActivity, profile, schedule

from parallel.simulate import Span
from trainer.config import MetricsConfig
from trainer.flops import peak_flops
from trainer.tracker import Tracker

PROFILER_WARMUP_STEPS = 10
DRAWN_STEP = 5  # counted from where this process starts; the steps before warm up
SHOWN_WAIT_SHARE = 0.01  # the live bar mentions waiting for data from here on


class Stopwatch:
    """Seconds of training since the last lap; pauses do not count."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._mark = clock()
        self.paused_seconds = 0.0  # since the start

    def start(self) -> None:
        """Begin the first lap."""
        self._mark = self._clock()
        self.paused_seconds = 0.0

    def lap(self) -> float:
        """Seconds since the lap before; the next begins."""
        before, self._mark = self._mark, self._clock()
        return self._mark - before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here does not count; pauses may be nested."""
        began, mark, paused = self._clock(), self._mark, self.paused_seconds
        try:
            yield
        finally:  # set, not added to: a pause inside this one is part of it
            seconds = self._clock() - began
            self._mark, self.paused_seconds = mark + seconds, paused + seconds


class MetricsFile:
    """metrics.jsonl: one JSON object a line, whole at any moment."""

    def __init__(self, path: Path, start_step: int):
        """Open to append; lines that a resumed run would write a second time are dropped."""
        self.evaluated: set[str] = set()  # splits that a run which goes on has measured already
        if path.exists():
            kept = _keep_until(path, start_step)
            lines = map(json.loads, kept)
            self.evaluated = {line.get("split", "") for line in lines if line["step"] == start_step}
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write one line, at once; numbers that are not finite become null."""
        finite = {k: None if _is_bad(value) else value for k, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_until(path: Path, start_step: int) -> list[str]:
    """Drop what an interrupted run wrote beyond its checkpoint, and a line cut in the middle.

    Returns the lines that stay.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, start_step)]
    if len(kept) < len(lines):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
    return kept


def _is_before(line: str, start_step: int) -> bool:
    # A run that starts over keeps nothing: its evaluation at step 0 comes again too.
    if start_step == 0 or not line.endswith("\n"):
        return False
    try:
        return json.loads(line)["step"] <= start_step
    except (ValueError, TypeError, KeyError):
        return False


def _is_bad(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Display:
    """The console: a live bar on a terminal, one plain line per record elsewhere."""

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
        self._details = "".join(parts) + f"  eta {_duration(seconds_left)}"
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


def _duration(seconds: float) -> str:
    """4:10, 1:02:03, 2d 3:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of its tensors on a GPU, all that is resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Recorder:
    """Writes what a training run does; on all but the first rank every method does nothing.

    `resolved` is the whole configuration; `flops_per_token` are those of training (flops.py);
    `tokens` everywhere are those of the whole run, over all ranks. Use it as a context manager: it
    closes what it opened, after an exception too.
    """

    def __init__(
        self, config: MetricsConfig, run_dir: Path, *, first: bool, steps: int, start_step: int,
        resolved: dict[str, Any], flops_per_token: float, devices: int, device: torch.device,
        precision_name: str, unit: str = "tok", console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self._config, self._run_dir = config, Path(run_dir)
        self._first, self._steps, self._start_step = first, steps, start_step
        self._device = device
        self._flops_per_token = flops_per_token
        peak = config.peak_tflops * 1e12 or _known_peak(device, precision_name)
        self._all_peaks = devices * peak if peak else None
        self._stopwatch = Stopwatch(clock)
        self._step = self._line_step = start_step
        self._line_tokens, self._line_wait_seconds = 0, 0.0
        self.profiler: profile | None = None
        if first:
            console = console or Console()
            self._display = Display(console, steps, unit)
            self._file = MetricsFile(self._run_dir / "metrics.jsonl", start_step)
            self._tracker = Tracker(config, self._run_dir, resolved, self.say)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._first:
            return
        try:
            if self.profiler is not None:
                self.profiler.stop()
        finally:
            self._display.close()
            self._file.close()
            self._tracker.close()

    def start(self, tokens: int) -> None:
        """Start the clock, just before the first step; `tokens` seen before it: 0 of a new run."""
        self._line_tokens = tokens
        if self._first:
            self._display.start(self._start_step)
            self._start_profiler()
        self._stopwatch.start()

    def due(self, step: int) -> bool:
        """Whether a training line is written after this step: every metrics.every-th and the last.

        The same on every rank: the loop may gather the line's numbers with a collective.
        """
        return step % self._config.every == 0 or step == self._steps

    def lacks(self, split: str) -> bool:
        """Whether no evaluation of the step that this run goes on from is in the file."""
        return self._first and split not in self._file.evaluated

    def draws(self, step: int) -> bool:
        """Whether this step is the one whose timeline is drawn; the same on every rank."""
        drawn = min(self._start_step + DRAWN_STEP, self._steps)
        return self._config.timeline and step == drawn

    def training(
        self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, wait_seconds: float
    ) -> None:
        """A training line; `wait_seconds` that this rank has waited for data since the start."""
        if not self._first:
            return
        seconds = max(self._stopwatch.lap(), 1e-9)
        tokens_per_second = (tokens - self._line_tokens) / seconds
        record = {
            "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds / max(1, step - self._line_step),
            "memory_gib": memory_gib(self._device),
            "data_wait_share": min(1.0, (wait_seconds - self._line_wait_seconds) / seconds),
        }  # fmt: skip
        if self._all_peaks is not None:
            record["mfu"] = self._flops_per_token * tokens_per_second / self._all_peaks
        self._line_step, self._line_tokens, self._line_wait_seconds = step, tokens, wait_seconds
        self._file.append(record)
        # Evaluations and checkpoints to come take their share of the remaining time too.
        paused_seconds = self._stopwatch.paused_seconds / max(1, step - self._start_step)
        seconds_left = (self._steps - step) * (record["step_seconds"] + paused_seconds)
        self._display.training(record, seconds_left)
        self._tracker.poll()

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """An evaluation line; `values` holds `eval_loss` and the task's metrics."""
        if self._first:
            self._file.append({"step": step, "split": split, **values})
            self._display.evaluation(step, split, values)

    def timeline(self, step: int, spans: Sequence[Span], schedule: str) -> None:
        """Draw a pipeline's step as it ran."""
        if not self._first:
            return
        from trainer.timeline import draw, heading  # noqa: PLC0415 (loads matplotlib: 0.5 s)

        path, title = self._run_dir / "timeline.png", heading(spans, schedule)
        draw(spans, path, f"step {step}, {title}")
        self.say(f"timeline of step {step}: {path} ({title})")

    def say(self, text: str) -> None:
        """One line on the console."""
        if self._first:
            self._display.say(text)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens in here (evaluation, checkpoint, sample) is not counted as training."""
        self._synchronize()  # steps that the device still works on are training
        with self._stopwatch.pause():
            try:
                yield
            finally:
                self._synchronize()

    def step_done(self) -> None:
        """Call once after every step: moves the bar and the profiler."""
        self._step += 1
        if self._first:
            self._display.advance(self._step)
        if self.profiler is not None:
            with self._stopwatch.pause():  # writing the trace takes seconds
                self.profiler.step()

    def _synchronize(self) -> None:
        if self._first and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _start_profiler(self) -> None:
        left = self._steps - self._start_step
        active = min(self._config.profile_steps, left)
        if active <= 0:
            return
        warmup = min(PROFILER_WARMUP_STEPS, left - active)
        on_cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        # The profiler traces in its own warm-up too, at a cost: one step of that is enough.
        plan = schedule(wait=max(0, warmup - 1), warmup=min(1, warmup), active=active, repeat=1)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *on_cuda], schedule=plan,
            on_trace_ready=self._write_trace, acc_events=True,
        )  # fmt: skip
        self.profiler.start()

    def _write_trace(self, profiler: profile) -> None:
        path = self._run_dir / "trace.json"
        profiler.export_chrome_trace(str(path))
        self.say(f"profiler trace: {path}; open it at https://ui.perfetto.dev")


def _known_peak(device: torch.device, precision_name: str) -> float | None:
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision_name)
