"""Measure a trained model: `python launch/evaluate.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door("evaluate", work="trainer.evaluate:evaluate_run", prepare="launch.before:reading")
