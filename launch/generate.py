"""Use a trained model: `python launch/generate.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "generate", work="trainer.tasks.generate:generate", prepare="launch.cli.preflight:reading"
    )
