"""Start the ranks of one job on this host, without torchrun."""

import logging
import os
import signal
import time
import uuid
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.cli.errors import release_streams
from launch.cli.rank import Work, run_spawned
from trainer.run.status import read_status

# A signal makes the ranks save; they are given what that takes. A second one ends them at once.
SAVING_SECONDS = 24 * 3600
HANDLED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")


def spawn_ranks(job: dict[str, Any], count: int, work: Work) -> None:
    """Run a job on `count` new processes; SystemExit if one fails, after printing its error."""
    began = time.time()
    for logger in list(logging.root.manager.loggerDict):  # torch has set a level of many
        if logger.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
        monitor_interval=0.1,
        signals_to_handle=",".join(name for name in HANDLED if not _is_ignored(name)),
        shutdown_timeout=SAVING_SECONDS,
    )
    release_streams()  # multiprocessing flushes them where it starts a process
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, (os.cpu_count() or 1) // count))
    try:
        elastic_launch(config, run_spawned)(job, work)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        raise SystemExit(_left_with(job, began) or (2 if 2 in codes else 1)) from None
    except SignalException as error:
        raise SystemExit(_left_with(job, began) or 128 + int(error.sigval)) from None
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]


def _is_ignored(name: str) -> bool:
    """Return whether a signal was ignored when this process started, as nohup does with SIGHUP."""
    return signal.getsignal(signal.Signals[name]) is signal.SIG_IGN


def _left_with(job: dict[str, Any], began: float) -> int | None:
    """Return the exit code that the ranks of a training run recorded."""
    status = read_status(job["config"]["run_dir"]) if job["command"] == "train" else None
    return status.code if status and status.updated >= began else None
