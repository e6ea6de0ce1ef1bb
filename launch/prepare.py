"""Prepare a data set: `python launch/prepare.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "prepare",
        work="",
        prepare="launch.cli.preflight:preparation",
        alone="launch.cli.inputs:prepare_data",
    )
