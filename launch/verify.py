"""Prove a layout: `python launch/verify.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "verify",
        work="trainer.verify.compare:verify",
        prepare="launch.cli.preflight:verification",
        alone="trainer.verify.compare:walk",
    )
