"""Record a run: metrics.jsonl, console, trace, timeline, and mirrors such as wandb.

One rank writes. Everything here is plain Python on numbers that the loop already has; it waits for
the device only where a pause begins and ends, so that times are right.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule

from parallel.pipeline.simulator import Span
from trainer.atomic_files import write_atomically
from trainer.config.train import MetricsConfig
from trainer.metrics.console import Display, open_console
from trainer.metrics.goodput import Goodput, goodput_sentence
from trainer.metrics.jsonl import NAME, SAMPLE, MetricsFile
from trainer.metrics.trackers import TOOLS, Tracker
from trainer.nn.flops import peak_flops

PROFILER_WARMUP_STEPS = 10
DRAWN_STEP = 5  # relative to this process's first step; earlier steps warm up


class Stopwatch:
    """Seconds of training since the last lap, without pauses."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._mark = clock()
        self.paused_seconds = 0.0  # since the start

    def start(self) -> None:
        """Start the first lap."""
        self._mark = self._clock()
        self.paused_seconds = 0.0

    def lap(self) -> float:
        """Return the seconds since the previous lap, and start the next."""
        before, self._mark = self._mark, self._clock()
        return self._mark - before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time in this context; pauses may be nested."""
        began, mark, paused = self._clock(), self._mark, self.paused_seconds
        try:
            yield
        finally:  # assigned, not added: nested pauses are included
            seconds = self._clock() - began
            self._mark, self.paused_seconds = mark + seconds, paused + seconds


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: its tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class RunInfo:
    """The properties of a run that its metrics need, from this process's first step on."""

    run_dir: Path
    steps: int  # of the whole run
    start_step: int
    resolved: Mapping[str, Any]  # the whole configuration
    flops_per_token: float  # of training (flops.py)
    unit: str  # unit of throughput on the console
    precision_name: str
    device: torch.device
    devices: int  # over all ranks


class Recorder:
    """Records a training run; on all but the first rank every method does nothing.

    `tokens` always counts the whole run, over all ranks. A context manager, which closes what it
    opened, after an exception too.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run: RunInfo,
        first: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._run, self._first = config, run, first
        peak = config.peak_tflops * 1e12 or _known_peak(run.device, run.precision_name)
        self._all_peaks = run.devices * peak if peak else None
        self._stopwatch = Stopwatch(clock)
        self._step = self._line_step = run.start_step
        self._line_tokens, self._line_wait_seconds = 0, 0.0
        self._started = False
        self.profiler: profile | None = None
        if first:
            name = run.run_dir.resolve().name
            self._display = Display(console or open_console(), run.steps, run.unit, name)
            self._file = MetricsFile(run.run_dir / NAME, run.start_step, self.print_line)
            self._trackers = [self._open_tracker(tool) for tool in TOOLS]
            self._goodput = Goodput(run.run_dir, clock)

    def _open_tracker(self, tool: str) -> Tracker:
        return Tracker(
            self._config,
            self._run.run_dir,
            dict(self._run.resolved),
            self.print_line,
            tool=tool,
            start_step=self._run.start_step,
            dropped=self._file.dropped,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._first:
            return
        try:
            if self.profiler is not None:
                self.profiler.stop()
            if self._started:
                self._log_goodput()
        finally:
            self._display.close()
            self._file.close()
            for tracker in self._trackers:
                tracker.close_tool()

    def log_start(self) -> None:
        """Write a record of this process's start: first step, ranks and time.

        Not called after a rollback within the process.
        """
        if self._first:
            number, now = self._goodput.ledger.starts, round(time.time(), 3)
            record = {"event": "start", "step": self._run.start_step, "start": number}
            record |= {"ranks": self._run.devices, "time": now, "unit": self._run.unit}
            self._file.append(record)

    def start_clock(self, tokens: int) -> None:
        """Start the clock just before the first step; `tokens` were seen before it."""
        self._line_tokens = tokens
        self._started = True
        if self._first:
            self._display.start(self._run.start_step)
            self._start_profiler()
        self._stopwatch.start()

    def is_due(self, step: int) -> bool:
        """Return whether a training record is due after this step: at metrics.every and at the end.

        The same on every rank: the loop may gather the record's numbers with a collective.
        """
        return step % self._config.every == 0 or step == self._run.steps

    def needs_evaluation(self, split: str, step: int) -> bool:
        """Return whether metrics.jsonl lacked a step's evaluation when this run resumed."""
        return self._first and not (step == self._run.start_step and split in self._file.evaluated)

    def records_timeline(self, step: int) -> bool:
        """Return whether this step's timeline is drawn; the same on every rank."""
        drawn = min(self._run.start_step + DRAWN_STEP, self._run.steps)
        return self._config.timeline and step == drawn

    def log_training(
        self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, wait_seconds: float
    ) -> None:
        """Write a training record; `wait_seconds` is this rank's time waiting for data so far."""
        if not self._first:
            return
        seconds = max(self._stopwatch.lap(), 1e-9)
        tokens_per_second = (tokens - self._line_tokens) / seconds
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds / max(1, step - self._line_step),
            "memory_gib": memory_gib(self._run.device),
            "data_wait_share": min(1.0, (wait_seconds - self._line_wait_seconds) / seconds),
        }
        if self._all_peaks is not None:
            record["mfu"] = self._run.flops_per_token * tokens_per_second / self._all_peaks
        self._line_step, self._line_tokens, self._line_wait_seconds = step, tokens, wait_seconds
        self._file.append(record)
        # Evaluations and checkpoints to come take their share of the remaining time too.
        paused_seconds = self._stopwatch.paused_seconds / max(1, step - self._run.start_step)
        seconds_left = (self._run.steps - step) * (record["step_seconds"] + paused_seconds)
        self._display.show_training(record, seconds_left)
        for tracker in self._trackers:
            tracker.poll_messages()
        self._goodput.save()

    def log_evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        """Write an evaluation record; `values` has `eval_loss` and the task's metrics."""
        if self._first:
            self._file.append({"step": step, "split": split, **values})
            self._display.show_evaluation(step, split, values)

    def log_event(self, record: dict[str, Any], text: str) -> None:
        """Write a record with `event` and `step`, and print `text` on the console."""
        if self._first:
            self._file.append(record)
            self.print_line(text)

    def log_save(self, record: dict[str, Any]) -> None:
        """Write the record of a finished save (save.py)."""
        if self._first:
            self._file.append(record)
            if record["event"] == "save":
                self._display.show_saved(record["step"])

    def draw_timeline(self, step: int, spans: Sequence[Span], schedule: str) -> None:
        """Draw a recorded pipeline step."""
        if not self._first:
            return
        from trainer.metrics.timeline_plot import draw_timeline, timeline_title  # noqa: PLC0415 (loads matplotlib: 0.5 s)

        path, title = self._run.run_dir / "timeline.png", timeline_title(spans, schedule)
        with self._tolerate_write_errors(path):
            draw_timeline(spans, path, f"step {step}, {title}")
            self.print_line(f"timeline of step {step}: {path} ({title})")

    def log_rollback(self, text: str) -> None:
        """Record a rollback to a checkpoint; the next recorder continues the sums."""
        self._started = False
        if self._first:
            self._goodput.close()
        self.print_line(text)

    def log_sample(self, text: str) -> None:
        """Write a sample of the model's output to the console, and to the run's folder."""
        self.print_line(f"a sample:\n{text}")
        path = self._run.run_dir / SAMPLE
        with self._tolerate_write_errors(path) if self._first else nullcontext():
            if self._first:
                write_atomically(path, f"{text}\n")

    def print_line(self, text: str) -> None:
        """Write one line to the console."""
        if self._first:
            self._display.print_line(text)

    @contextmanager
    def track_data_wait(self) -> Iterator[None]:
        """Count the time in this context as waiting for data."""
        with self._goodput.track("data_wait") if self._first else nullcontext():
            yield

    @contextmanager
    def pause_training(self, kind: str = "other") -> Iterator[None]:
        """Count the time in this context as `kind` (goodput.py), not as training."""
        self._synchronize()  # steps that the device still works on are training
        with (
            self._stopwatch.pause(),
            self._goodput.track(kind) if self._first else nullcontext(),
        ):
            try:
                yield
            finally:
                self._synchronize()

    def step_done(self) -> None:
        """Advance the progress bar and the profiler; call once after every step."""
        self._step += 1
        if self._first:
            self._goodput.step_done(self._step)
            self._display.advance(self._step)
        if self.profiler is not None:
            # Writing the trace takes seconds.
            with self._stopwatch.pause(), self._goodput.track("other"):
                self.profiler.step()

    def _log_goodput(self) -> None:
        values = self._goodput.close()
        self._file.append({"step": self._step, **values})
        self.print_line(goodput_sentence(values))

    @contextmanager
    def _tolerate_write_errors(self, path: Path) -> Iterator[None]:
        """Log an error of writing an optional file, and continue."""
        try:
            yield
        except OSError as error:
            self.print_line(
                f"{path} cannot be written ({error.strerror or error}); training goes on"
            )

    def _synchronize(self) -> None:
        if self._first and self._run.device.type == "cuda":
            torch.cuda.synchronize(self._run.device)

    def _start_profiler(self) -> None:
        left = self._run.steps - self._run.start_step
        active = min(self._config.profile_steps, left)
        if active <= 0:
            return
        warmup = min(PROFILER_WARMUP_STEPS, left - active)
        on_cuda = [ProfilerActivity.CUDA] if self._run.device.type == "cuda" else []
        # The profiler traces in its own warm-up too, at a cost: one step of that is enough.
        plan = schedule(wait=max(0, warmup - 1), warmup=min(1, warmup), active=active, repeat=1)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *on_cuda],
            schedule=plan,
            on_trace_ready=self._write_trace,
            acc_events=True,
        )
        self.profiler.start()

    def _write_trace(self, profiler: profile) -> None:
        path = self._run.run_dir / "trace.json"
        with self._tolerate_write_errors(path):
            profiler.export_chrome_trace(str(path))
            self.print_line(f"profiler trace: {path}; open it at https://ui.perfetto.dev")


def _known_peak(device: torch.device, precision_name: str) -> float | None:
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision_name)
