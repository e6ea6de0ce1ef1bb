"""Train on a cluster with Slurm: `python launch/submit.py --help`."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from launch.cli.entrypoint import Command, run_command
from launch.cli.errors import log_to_stderr, run_simple_command
from launch.slurm import commands as slurm
from parallel.errors import ConfigError

ASKED = ("status", "logs", "cancel")


def query_jobs(arguments: list[str]) -> int:
    """Print a folder's jobs or logs; 0 = done, 2 = a user's mistake."""
    parser = argparse.ArgumentParser(description="Look after jobs of launch/submit.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ASKED:
        command = commands.add_parser(name)
        command.add_argument("run_dir", type=Path, help="a run's folder, or a sweep's")
        if name == "logs":
            command.add_argument("--lines", type=int, default=40, help="shown of each log")
            command.add_argument("--follow", action="store_true", help="and those that come")
    given = parser.parse_args(arguments)
    log_to_stderr(0)
    if not given.run_dir.is_dir():
        raise ConfigError(f"{given.run_dir} is no folder; name that of a run or sweep")
    if given.command == "logs":
        return slurm.print_logs(given.run_dir, given.lines, given.follow)
    (slurm.print_jobs if given.command == "status" else slurm.cancel_jobs)(given.run_dir)
    return 0


def check_config(config: Any) -> Any:
    """Check a job, or raise ConfigError before any is submitted."""
    from launch.cli.preflight import prepare_submission

    return prepare_submission(config)


def submit_all(points: list[Any]) -> None:
    """Submit all jobs of the command line."""
    slurm.submit_job(points)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ASKED:
        sys.exit(run_simple_command(query_jobs, sys.argv[1:]))
    logging.getLogger("hydra").setLevel(logging.WARNING)  # that it launches a sweep "locally"
    sys.argv[1:] = ["cluster.dry_run=true" if a == "--dry-run" else a for a in sys.argv[1:]]
    run_command(Command("submit", check_config, run_on_all_points=submit_all))
