"""Plan a training run without a GPU: `python launch/plan.py --help`."""

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


if __name__ == "__main__":
    run_command(Command("plan", check_config, run_on_all_points=print_plans))
