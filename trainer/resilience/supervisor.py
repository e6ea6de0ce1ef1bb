"""Supervision of a training run: signals, heartbeats, status.json and the run folder's lock."""

import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from parallel.errors import UserError
from parallel.health.watchdog import STOPPED, RankLostError, StoppedError, Watchdog
from parallel.runtime import Runtime, all_reduce_max
from parallel.strategy import restart_count
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.train import ConfigError
from trainer.run.lock import share_lock
from trainer.run.status import StatusFile

PACKAGES = ("parallel", "trainer", "conf", "launch")
ATTEMPTS = 3  # torchrun restarts from one step before giving up
# Messages of a collective whose peer process is gone.
BROKEN = re.compile(r"gloo|nccl|connection|peer|socket|closed", re.IGNORECASE)

log = logging.getLogger(__name__)


class Supervisor:
    """Progress of the loop as published to observers, and the decision to continue or stop."""

    def __init__(self, run_dir: str, steps: int, timeout_seconds: float, runtime: Runtime):
        self._run_dir, self._steps, self._runtime = run_dir, steps, runtime
        self._status = StatusFile(run_dir, steps)
        self.watch = Watchdog(runtime, timeout_seconds, self._record_verdict)
        self.stopping = False  # the same on all ranks
        self.step = 0

    def begin_at(self, step: int) -> None:
        """Record the first step; ConfigError if torchrun keeps restarting the run at this step."""
        self.step = step
        attempt = restart_count(os.environ)
        allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
        before = self._status.begin_run(step, attempt > 0, first=self._runtime.rank == 0)
        why = f": {before.reason}" if before and before.reason else ""
        if attempt and self._runtime.rank == 0:
            of = f" of {allowed}" if allowed else ""
            log.info("restart %d%s, from step %d%s", attempt, of, step, why)
        (attempts,) = all_reduce_max(self._runtime, [self._status.attempts])
        if attempts >= ATTEMPTS:
            raise ConfigError(
                f"no progress since step {step}: {attempts} attempts from there have failed{why}"
            )

    def write_status(
        self, state: str = "running", reason: str = "", code: int | None = None
    ) -> None:
        """Write status.json, on the first rank."""
        if self._runtime.rank == 0:
            self._write_file(state, reason, 0, code)

    def finish_step(self, step: int, settle: bool = False) -> bool:
        """Report a finished step, and decide whether to stop; the same on every rank.

        What another rank was told counts two steps later, or at once with `settle`, which waits.
        """
        self.step = step
        self.watch.report_progress(step)
        return self.should_stop(settle)

    def should_stop(self, settle: bool = False) -> bool:
        """Return whether to stop, identical on every rank (collective)."""
        self.stopping = self.stopping or self.watch.stop_requested(settle)
        return self.stopping

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank (collective)."""
        return bool(all_reduce_max(self._runtime, [int(flag)])[0])

    def raise_if_stopping(self, settle: bool = True) -> None:
        """Raise StoppedError, on every rank, if the run is to stop; see `finish_step`."""
        self.watch.report_progress(self.step)
        if self.should_stop(settle):
            raise StoppedError

    def record_failure(self, error: Exception) -> None:
        """Record the error that ends this rank."""
        reason = str(error).splitlines()[0] if str(error) else ""
        named = isinstance(error, UserError | RankLostError)
        text = reason if named else f"{type(error).__name__}: {reason}"
        status, kind = getattr(error, "status", 1), type(error).__name__
        self._write_file("failed", text, self._runtime.rank, status, kind)
        self.watch.announce_failure()

    def record_stop(self) -> None:
        """Record that the same command resumes the run; wait for the other ranks."""
        saved = self._newest_checkpoint()
        how = f"the same command goes on from step {saved}" if saved else "nothing was saved yet"
        if self._runtime.rank == 0:
            log.info("stopped at step %d of %d; %s", self.step, self._steps, how)
        self.write_status("stopped", signal.Signals(self.watch.signal).name, STOPPED)
        self.watch.wait_for_all()

    def _record_verdict(self, reason: str, rank: int, code: int) -> None:
        """Record the watchdog's reason before it ends this process."""
        log.error("%s", reason)
        self._write_file("stopped" if code > 128 else "failed", reason.splitlines()[0], rank, code)

    def _write_file(
        self, state: str, reason: str, rank: int, code: int | None, error: str = ""
    ) -> None:
        self._status.write(
            state,
            self.step,
            reason=reason,
            error=error,
            rank=rank,
            code=code,
            checkpoint=self._newest_checkpoint(),
        )

    def _newest_checkpoint(self) -> int | None:
        saved = list_checkpoints(self._run_dir)
        return saved[-1][0] if saved else None


@contextmanager
def supervise_run(
    run_dir: str, steps: int, timeout_seconds: float, runtime: Runtime
) -> Iterator[Supervisor]:
    """Supervise a run on this rank; record how it ends in status.json and tell the other ranks."""
    supervisor = Supervisor(run_dir, steps, timeout_seconds, runtime)
    with share_lock(run_dir), supervisor.watch:
        try:
            yield supervisor
            supervisor.write_status("finished", code=0)
        except StoppedError:
            supervisor.record_stop()
            raise
        except Exception as error:
            lost = None
            if not isinstance(error, UserError) and BROKEN.search(str(error)):
                lost = supervisor.watch.find_lost_ranks()
            supervisor.record_failure(lost or error)
            if lost:
                raise lost from error
            raise


def source_digest() -> str:
    """Return a digest of this project's source files, which must be the same on all ranks."""
    root = Path(__file__).parents[2]
    digest = blake2b()
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
