"""Write a trained model as one small file: `python launch/export.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def prepare(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import exporting

    return exporting(config, world_size, held)


def work(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.inference.trained_run import export_run

    export_run(config, runtime)


if __name__ == "__main__":
    run_command(Command("export", prepare, work))
