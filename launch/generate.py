"""Use a trained model: `python launch/generate.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door("generate", work="trainer.generate:generate", prepare="launch.before:reading")
