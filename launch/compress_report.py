"""Tell what a compression is worth: `python launch/compress_report.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "compress_report",
        work="trainer.compress_report.report:report",
        prepare="launch.cli.preflight:comparing",
    )
