"""Prepare a data set: `python launch/prepare.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import check_prepare

    return check_prepare(config, world_size, held)


def run_in_process(config: Any) -> None:
    """Do all of the work in this process."""
    from launch.cli.inputs import prepare_data

    prepare_data(config)


if __name__ == "__main__":
    run_command(Command("prepare", check_config, run_in_process=run_in_process))
