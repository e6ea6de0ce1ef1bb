"""Keep what a trained run holds likely: `python launch/teach.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import check_precompute

    return check_precompute(config, world_size, held)


def run_on_rank(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.distill.precompute import teach_run

    teach_run(config, runtime)


if __name__ == "__main__":
    run_command(Command("teach", check_config, run_on_rank))
