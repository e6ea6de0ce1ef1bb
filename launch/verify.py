"""Prove a layout: `python launch/verify.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door(
        "verify",
        work="trainer.verify:verify",
        prepare="launch.before:verification",
        alone="trainer.verify:walk",
    )
