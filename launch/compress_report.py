"""Tell what a compression is worth: `python launch/compress_report.py --help`."""

from launch.door import open_door

if __name__ == "__main__":
    open_door(
        "compress_report", work="trainer.compress.report:report",
        prepare="launch.before:comparing",
    )  # fmt: skip
