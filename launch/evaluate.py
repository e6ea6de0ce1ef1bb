"""Measure a trained model: `python launch/evaluate.py --help`."""

from contextlib import ExitStack
from typing import Any

from launch.cli.entrypoint import Command, run_command


def prepare(config: Any, world_size: int, held: ExitStack) -> Any:
    """Complete the configuration, or raise ConfigError before any rank works."""
    from launch.cli.preflight import reading

    return reading(config, world_size, held)


def work(config: Any, runtime: Any) -> None:
    """Do the work of one rank."""
    from trainer.tasks.evaluate import evaluate_run

    evaluate_run(config, runtime)


if __name__ == "__main__":
    run_command(Command("evaluate", prepare, work))
