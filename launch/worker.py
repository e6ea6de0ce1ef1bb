"""What one rank does with a job: its process group, the work, and word of what went wrong."""

import signal
import traceback
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch.distributed as dist

from conf.schema import typed
from launch.messages import explain, let_go_of_streams, log_to_stderr, write_error
from parallel.config import ConfigError
from parallel.runtime import Ranks, process_group
from parallel.watch import LONG, SIGNALS, STOPPED, PeerLostError, StoppedError


def follow(ranks: Ranks) -> int:
    """Runs each job that rank 0 posts; the exit status that it leaves with."""
    try:
        for job in ranks.follow():
            if "stop" in job:
                return job["stop"]
            run(job, ranks)
    except dist.DistError:  # rank 0, or the launcher that has the store, is gone
        return 1
    finally:
        ranks.leave()
    raise AssertionError("rank 0 always posts a stop")


def run_alone(job: dict[str, Any]) -> None:
    """Runs a job in this process, a group of one."""
    run(job, Ranks.alone())


def run_spawned(job: dict[str, Any]) -> None:
    """Runs a job in a process that launch/spawn.py started."""
    try:
        run(job, Ranks.of_torchrun())
    finally:
        let_go_of_streams()  # multiprocessing flushes them before anything that is done at exit


def run(job: dict[str, Any], ranks: Ranks) -> None:
    """Does the work of this rank; SystemExit if it fails, after the first rank has said why."""
    log_to_stderr(ranks.rank)
    config = typed(job["door"], job["config"])
    module, _, name = job["work"].partition(":")
    with ExitStack() as stack:
        try:
            patience = LONG * getattr(config, "timeout_seconds", 0.0)
            runtime = stack.enter_context(process_group(config.device, ranks, patience))
            getattr(import_module(module), name)(config, runtime)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except StoppedError:
            for number in SIGNALS:  # the launcher may send it again
                signal.signal(number, signal.SIG_IGN)
            raise SystemExit(STOPPED) from None
        except Exception as error:
            # Said before the group ends: its end fails the other ranks, and theirs is no cause.
            raise SystemExit(_tell(error, job["door"], ranks)) from None


def _tell(error: Exception, door: str, ranks: Ranks) -> int:
    first = ranks.first("error")
    if not first:  # its end is a consequence of the first one's
        return 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, ConfigError | PeerLostError):
        write_error(explain(door, error))
        return 2 if isinstance(error, ConfigError) else 1
    text = traceback.format_exc()
    prefix = f"[rank {ranks.rank}] " if ranks.world_size > 1 else ""
    write_error("\n".join(prefix + line for line in text.splitlines()))
    return 1
