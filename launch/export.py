"""Write a trained model as one small file: `python launch/export.py --help`."""

from launch.cli.entrypoint import open_door

if __name__ == "__main__":
    open_door(
        "export",
        work="trainer.inference.trained_run:export_run",
        prepare="launch.cli.preflight:exporting",
    )
