"""Write a trained model as one small file: `python launch/export.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door("export", work="trainer.trained:export_run", prepare="launch.before:exporting")
