"""Train: `python launch/train.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door("train", work="trainer.loop:train", prepare="launch.cli.preflight:training")
