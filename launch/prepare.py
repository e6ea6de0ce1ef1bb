"""Prepare a data set: `python launch/prepare.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door(
        "prepare",
        work="",
        prepare="launch.before:preparation",
        alone="launch.inputs:prepare_data",
    )
