"""status.json: the state of a run for external observers; torchrun's exit code is always 1.

Written by the first rank, or by the first rank that fails.
"""

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.atomic_files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """The state of a run; times are seconds since 1970."""

    state: str  # running | finished | stopped (the same command resumes) | failed
    step: int  # optimizer steps done
    steps: int  # of the whole run
    checkpoint: int | None  # step of the newest one
    reason: str  # why it stopped or failed
    rank: int  # rank that reported it, or that is at fault
    code: int | None  # exit status; None = running
    from_step: int  # step of the start or resume
    attempts: int  # consecutive starts of one launch from that step
    pid: int
    host: str
    started: float
    updated: float
    error: str = ""  # class of the error: ConfigError, DataError, NumericalError, …


def read_status(run_dir: str | Path) -> Status | None:
    """Return the status of a run; None if there is none, or one of another version."""
    try:
        return Status(**json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class StatusFile:
    """Writer of a run's status; ignores a full disk, which must not stop training."""

    def __init__(self, run_dir: str | Path, steps: int):
        self._run_dir, self._steps = Path(run_dir), steps
        self._path = self._run_dir / "status.json"
        self._started = time.time()
        self._begun = self._warned = False
        self._from_step = 0
        self.attempts = 0  # consecutive starts from the same step; 0 = known by the first rank

    def begin_run(self, from_step: int, restarted: bool, first: bool) -> Status | None:
        """Record the first step, and return the previous status; only the first rank writes."""
        before = read_status(self._run_dir)
        if first:
            again = restarted and before is not None and before.from_step == from_step
            self.attempts = before.attempts + 1 if before and again else 1
            self._from_step = from_step
            self.write("running", from_step)
            self._begun = True
        return before

    def write(
        self,
        state: str,
        step: int,
        *,
        reason: str = "",
        error: str = "",
        rank: int = 0,
        code: int | None = None,
        checkpoint: int | None = None,
    ) -> None:
        """Replace the file, unless a rank has recorded a failure: the first failure is kept."""
        before = read_status(self._run_dir)
        if self._begun and before and before.state == "failed":
            return
        from_step, attempts = self._from_step, self.attempts
        if not attempts and before:
            from_step, attempts = before.from_step, before.attempts
        status = Status(
            state,
            step,
            self._steps,
            checkpoint,
            reason,
            rank,
            code,
            from_step,
            attempts,
            os.getpid(),
            socket.gethostname(),
            self._started,
            time.time(),
            error,
        )
        try:
            write_atomically(self._path, json.dumps(asdict(status), indent=1) + "\n")
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written: %s", self._path, error)
            self._warned = True
