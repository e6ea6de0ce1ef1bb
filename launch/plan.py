"""Plan a training run without a GPU: `python launch/plan.py --help`.

`python launch/plan.py calibrate --help`: measure this machine first.
"""

import sys
from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any) -> Any:
    """Check a job, or raise ConfigError; nothing is written."""
    from launch.cli.asked import prepare_plan

    return prepare_plan(config)


def print_plans(points: list[Any]) -> None:
    """Print the plans of all jobs of the command line."""
    from launch.cli.planned import print_plan

    for point in points:
        print_plan(point)


def check_calibration(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration of a calibration, or raise ConfigError before any rank works."""
    from launch.cli.calibrated import prepare_calibration

    return prepare_calibration(config, world_size)


def calibrate_on_rank(config: Any, runtime: Any) -> None:
    """Measure on one rank."""
    from pathlib import Path

    from trainer.plan.calibrate import calibrate

    calibrate(config, runtime, Path(config.calibration))


if __name__ == "__main__":
    if sys.argv[1:2] == ["calibrate"]:
        del sys.argv[1]
        run_command(Command("calibrate", check_calibration, calibrate_on_rank))
    run_command(Command("plan", check_config, run_on_all_points=print_plans))
