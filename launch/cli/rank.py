"""A job on one rank: its process group, the work, and the report of what went wrong."""

import signal
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.schema import typed
from launch.cli.errors import (
    LOG,
    explain,
    lead_streams_to,
    let_go_of_streams,
    log_to_stderr,
    logged_to,
    occupy_standard_streams,
    unprinted,
    write_error,
)
from parallel.errors import UserError
from parallel.health.watchdog import LONG, SIGNALS, STOPPED, PeerLostError, StoppedError
from parallel.runtime import Ranks, process_group

Work = Callable[..., None] | None  # (config, runtime), or nothing to do


def follow(ranks: Ranks, work: Work) -> int:
    """Run each job that rank 0 posts; the exit status that it leaves with."""
    try:
        for job in ranks.follow():
            if "stop" in job:
                return job["stop"]
            run(job, ranks, work)
    except dist.DistError:  # rank 0, or the launcher that has the store, is gone
        return 1
    finally:
        ranks.leave()
    raise AssertionError("rank 0 always posts a stop")


def run_alone(job: dict[str, Any], work: Work) -> None:
    """Run a job in this process, a group of one."""
    run(job, Ranks.alone(), work)


def run_spawned(job: dict[str, Any], work: Work) -> None:
    """Run a job in a process that launch/cli/spawn.py started."""
    occupy_standard_streams()
    if job.get("console"):
        lead_streams_to(job["console"])
    try:
        run(job, Ranks.of_torchrun(), work)
    finally:
        let_go_of_streams()  # multiprocessing flushes them before anything that is done at exit


def run(job: dict[str, Any], ranks: Ranks, work: Work) -> None:
    """Do the work of this rank; SystemExit if it fails, after the first rank has said why."""
    log_to_stderr(ranks.rank)
    config = typed(job["command"], job["config"])
    with ExitStack() as stack:
        log = _log(job)
        if log and ranks.rank == 0:
            stack.enter_context(logged_to(log))
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
            raise SystemExit(_tell(error, job, ranks)) from None


def _log(job: dict[str, Any]) -> Path | None:
    """Return the file that keeps what a run says, unless all of its console goes there."""
    kept = job["command"] == "train" and not job.get("console")
    return Path(job["config"]["run_dir"]) / LOG if kept else None


def _tell(error: Exception, job: dict[str, Any], ranks: Ranks) -> int:
    code = getattr(error, "status", 1)
    if not ranks.first("error"):  # its end is a consequence of the first one's
        return code
    if isinstance(error, UserError | PeerLostError):
        text = explain(job["command"], error)
    elif not (text := unprinted(error)):
        prefix = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
        text = "\n".join(prefix + line for line in traceback.format_exc().splitlines())
    write_error(text)
    if log := _log(job):
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return code
