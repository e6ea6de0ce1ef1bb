"""Commands in forks of a process that has imported torch: to start one takes no seconds."""

import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.cli import spawn

ROOT = Path(__file__).parents[2]
PRELOADED = ["trainer.loop", "launch.cli.preflight", "launch.cli.spawn", __name__]


def call_in_fork(seconds: float, function: Callable[..., None], *args: Any) -> int | None:
    """Call a function in a fork; its exit status, None if it does not end in time."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return None
    return process.exitcode


def run_script(words: list[str], folder: Path, output: Path, ranks: int = 0) -> None:
    """Run a script in this process as `python` does, or torchrun; what it says is in a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    os.chdir(folder)
    spawn.LaunchConfig = _forking_config
    if ranks:
        _run_ranks(ranks, words)
    else:
        _run_main(words)


def _forking_config(**options: Any) -> LaunchConfig:
    return LaunchConfig(**options | {"start_method": "fork"})


def _run_ranks(ranks: int, words: list[str]) -> None:
    """Run torchrun with ranks that are forks: none of them has to import torch again."""
    torchrun.elastic_launch = lambda config, entrypoint: elastic_launch(config, _run_rank)
    torchrun.main(["--start-method=fork", f"--nproc_per_node={ranks}", *words])


def _run_rank(unbuffered: str, *words: str) -> None:
    """Run the script on a rank; torchrun waits for a function to return, not to exit."""
    assert unbuffered == "-u"
    try:
        _run_main(list(words))
    except SystemExit as stop:
        if stop.code:
            raise


def _run_main(words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
