"""Prepare a data set: `python launch/prepare.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def prepare(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import preparation

    return preparation(config, world_size, held)


def alone(config: Any) -> None:
    """Do all of the work in this process."""
    from launch.cli.inputs import prepare_data

    prepare_data(config)


if __name__ == "__main__":
    run_command(Command("prepare", prepare, alone=alone))
