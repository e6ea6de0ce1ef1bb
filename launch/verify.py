"""Prove a layout: `python launch/verify.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import check_verify

    return check_verify(config, world_size, held)


def run_on_rank(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.verify.compare import verify_layout

    verify_layout(config, runtime)


def run_in_process(config: Any) -> None:
    """Do all of the work in this process."""
    from trainer.verify.compare import verify_all

    verify_all(config)


if __name__ == "__main__":
    run_command(Command("verify", check_config, run_on_rank, run_in_process=run_in_process))
