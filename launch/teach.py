"""Keep what a trained run holds likely: `python launch/teach.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "teach",
        work="trainer.distill.precompute:teach_run",
        prepare="launch.cli.preflight:teaching",
    )
