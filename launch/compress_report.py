"""Tell what a compression is worth: `python launch/compress_report.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def check_config(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import check_compare

    return check_compare(config, world_size, held)


def run_on_rank(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.compress_report.report import write_comparison

    write_comparison(config, runtime)


if __name__ == "__main__":
    run_command(Command("compress_report", check_config, run_on_rank))
