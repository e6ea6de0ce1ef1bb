"""Prove a layout: `python launch/verify.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def prepare(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import verification

    return verification(config, world_size, held)


def work(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.verify.compare import verify

    verify(config, runtime)


def alone(config: Any) -> None:
    """Do all of the work in this process."""
    from trainer.verify.compare import walk

    walk(config)


if __name__ == "__main__":
    run_command(Command("verify", prepare, work, alone=alone))
