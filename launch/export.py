"""Write a trained model as one small file: `python launch/export.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import check_export

    return check_export(config, world_size, held)


def run_on_rank(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.inference.trained_run import export_run

    export_run(config, runtime)


if __name__ == "__main__":
    run_command(Command("export", check_config, run_on_rank))
