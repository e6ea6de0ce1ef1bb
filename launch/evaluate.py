"""Measure a trained model: `python launch/evaluate.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "evaluate",
        work="trainer.tasks.evaluate:evaluate_run",
        prepare="launch.cli.preflight:reading",
    )
