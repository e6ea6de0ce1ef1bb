"""Keep what a trained run holds likely: `python launch/teach.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door("teach", work="trainer.teach:teach_run", prepare="launch.before:teaching")
