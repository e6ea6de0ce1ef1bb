"""A job on one rank: its process group, its work, and its error report."""

import signal
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.schema import to_dataclass
from launch.cli.errors import (
    LOG,
    ensure_standard_streams,
    explain_error,
    log_to_file,
    log_to_stderr,
    redirect_streams,
    release_streams,
    stdout_problem,
    write_error,
)
from parallel.errors import UserError
from parallel.health.watchdog import LONG, SIGNALS, STOPPED, RankLostError, StoppedError
from parallel.runtime import JobQueue, process_group

Work = Callable[..., None] | None  # (config, runtime), or nothing to do


def run_posted_jobs(ranks: JobQueue, work: Work) -> int:
    """Run each job that rank 0 posts; return the exit status."""
    try:
        for job in ranks.receive_jobs():
            if "stop" in job:
                return job["stop"]
            run_rank(job, ranks, work)
    except dist.DistError:  # rank 0, or the launcher with the store, has exited
        return 1
    finally:
        ranks.leave()
    raise AssertionError("rank 0 always posts a stop")


def run_alone(job: dict[str, Any], work: Work) -> None:
    """Run a job in this process, as a group of one rank."""
    run_rank(job, JobQueue.single_process(), work)


def run_spawned(job: dict[str, Any], work: Work) -> None:
    """Run a job in a process that launch/cli/spawn.py started."""
    ensure_standard_streams()
    if job.get("console"):
        redirect_streams(job["console"])
    try:
        run_rank(job, JobQueue.from_torchrun(), work)
    finally:
        release_streams()  # multiprocessing flushes them before anything that is done at exit


def run_rank(job: dict[str, Any], ranks: JobQueue, work: Work) -> None:
    """Run this rank's work; SystemExit if it fails, after the first rank has printed the error."""
    log_to_stderr(ranks.rank)
    config = to_dataclass(job["command"], job["config"])
    with ExitStack() as stack:
        log = _log_path(job)
        if log and ranks.rank == 0:
            stack.enter_context(log_to_file(log))
        try:
            patience = LONG * getattr(config, "timeout_seconds", 0.0)
            runtime = stack.enter_context(process_group(config.device, ranks, patience))
            if work:
                work(config, runtime)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except StoppedError:
            for number in SIGNALS:  # the launcher may send it again
                signal.signal(number, signal.SIG_IGN)
            raise SystemExit(STOPPED) from None
        except Exception as error:
            # Said before the group ends: its end fails the other ranks, and theirs is no cause.
            raise SystemExit(_print_error(error, job, ranks)) from None


def _log_path(job: dict[str, Any]) -> Path | None:
    """Return the log file of a run, unless its whole console goes there."""
    kept = job["command"] == "train" and not job.get("console")
    return Path(job["config"]["run_dir"]) / LOG if kept else None


def _print_error(error: Exception, job: dict[str, Any], ranks: JobQueue) -> int:
    code = getattr(error, "status", 1)
    if not ranks.is_first("error"):  # its failure is a consequence of the first one
        return code
    if isinstance(error, UserError | RankLostError):
        text = explain_error(job["command"], error)
    elif not (text := stdout_problem(error)):
        prefix = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
        text = "\n".join(prefix + line for line in traceback.format_exc().splitlines())
    write_error(text)
    if log := _log_path(job):
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return code
