"""Goodput: the wall time of a run by category, over all of its starts.

Every second of a process belongs to one category, so that they add up. The sums are in
run_dir/goodput.json, replaced atomically with every metrics record: a kill loses the time since the
last one, which shows as time between two starts.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.atomic_files import write_atomically

NAME = "goodput.json"
# Categories of time, with the console's names of the lost ones.
LOST = {
    "restart": "restart",  # from process start to the end of its first step
    "save": "save",  # training was blocked by a checkpoint
    "data_wait": "data wait",
    "evaluation": "evaluation",
    "repeated": "steps done again",  # already taken by an earlier start or before a rollback
    "other": "other",  # a profiler's trace, a picture, a sample of text
}
KINDS = ("useful", *LOST)


@dataclass
class TimeLedger:
    """The sums of a run, as stored in goodput.json."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    step: int = 0  # furthest step of any start
    starts: int = 0
    down_seconds: float = 0.0  # between a start's last write and the next start
    written: float = 0.0  # seconds since the epoch of the last write; 0.0 = never
    opened: float | None = None  # what was not booked yet began here, by the monotonic clock


def read_ledger(run_dir: Path) -> TimeLedger:
    """Return the ledger of a run; an empty one if it is missing or damaged."""
    try:
        values = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        ledger = TimeLedger(**values)
        ledger.seconds = {kind: float(ledger.seconds[kind]) for kind in KINDS}
    except (OSError, ValueError, TypeError, KeyError):
        return TimeLedger()
    return ledger


def write_ledger(run_dir: Path, ledger: TimeLedger, now: float) -> None:
    """Replace goodput.json atomically; `now` is seconds since the epoch.

    A full disk loses one update and does not stop the run.
    """
    ledger.written = now
    with suppress(OSError):
        write_atomically(run_dir / NAME, json.dumps(asdict(ledger)))


def begin_start(run_dir: Path, opened: float, now: float) -> None:
    """Record a new start, at `opened` by the monotonic clock and `now` since the epoch."""
    ledger = read_ledger(run_dir)
    ledger.starts += 1
    if ledger.written:
        age_seconds = max(0.0, time.monotonic() - opened)
        ledger.down_seconds += max(0.0, now - age_seconds - ledger.written)
    ledger.opened = opened
    write_ledger(run_dir, ledger, now)


def process_seconds() -> float:
    """Return the seconds since this process started; its CPU time if the system does not tell."""
    try:
        # The name of the program, in parentheses, may hold spaces; `starttime` is the 20th behind.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return max(0.0, since_boot - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


class Goodput:
    """Accounts for the seconds of one start, by category or as part of a step."""

    def __init__(self, run_dir: Path, clock: Callable[[], float]):
        """`clock` is the monotonic one; tests have their own."""
        self._run_dir, self._clock = run_dir, clock
        self.ledger = read_ledger(run_dir)
        self.ledger.starts = max(1, self.ledger.starts)
        self._mark = clock() if self.ledger.opened is None else self.ledger.opened
        self.ledger.opened = None
        self._step_seconds = 0.0  # of the current step
        self._kind: str | None = None  # the current category, if not a step
        self._restarting = True  # until the first step has finished

    @contextmanager
    def track(self, kind: str) -> Iterator[None]:
        """Count the time in this context as this category, not as part of a step; may be nested."""
        assert kind in KINDS, kind
        self._account()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._account()
            self._kind = outer

    def step_done(self, step: int) -> None:
        """Account for the time of a step: useful the first time that the run takes it."""
        self._account()
        kind = "useful" if step > self.ledger.step else "repeated"
        self._add_seconds("restart" if self._restarting else kind)
        self.ledger.step = max(self.ledger.step, step)
        self._restarting = False

    def save(self) -> None:
        """Write the sums to disk."""
        write_ledger(self._run_dir, self.ledger, time.time())

    def close(self) -> dict[str, Any]:
        """Account for the remaining time, save, and return the final record without its step."""
        self._account()
        self._add_seconds("restart" if self._restarting else "other")
        self.ledger.opened = self._mark  # this process may go on: back from a rollback
        self.save()
        return goodput_record(self.ledger)

    def _account(self) -> None:
        now = self._clock()
        seconds, self._mark = max(0.0, now - self._mark), now
        if self._kind is None or self._restarting:
            self._step_seconds += seconds
        else:
            self.ledger.seconds[self._kind] += seconds

    def _add_seconds(self, kind: str) -> None:
        self.ledger.seconds[kind] += self._step_seconds
        self._step_seconds = 0.0


def goodput_record(ledger: TimeLedger) -> dict[str, Any]:
    """Return the figures of a ledger: seconds and, except for `down`, fractions of their sum."""
    total_seconds = sum(ledger.seconds.values())
    shares = {f"{k}_share": s / (total_seconds or 1.0) for k, s in ledger.seconds.items()}
    seconds = {f"{kind}_seconds": round(s, 3) for kind, s in ledger.seconds.items()}
    return {
        "event": "goodput",
        "starts": ledger.starts,
        **{name: round(share, 6) for name, share in shares.items()},
        **seconds,
        "total_seconds": round(total_seconds, 3),
        "down_seconds": round(ledger.down_seconds, 3),
    }


def goodput_sentence(values: dict[str, Any]) -> str:
    """Format a record as one line for the console."""
    starts = f"{values['starts']} start{'s' * (values['starts'] > 1)}"
    lost = [f"{name} {100 * values[f'{kind}_share']:.1f} %" for kind, name in LOST.items()]
    useful = 100 * values["useful_share"]
    return (
        f"goodput {useful:.1f} % of {values['total_seconds']:.0f} s in {starts}; "
        f"lost: {', '.join(lost)}"
    )
