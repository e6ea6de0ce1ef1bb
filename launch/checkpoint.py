"""Show, check and compare checkpoints: `python launch/checkpoint.py --help`."""

import argparse
import sys
from pathlib import Path

from launch.cli.errors import run_simple_command
from trainer.checkpoint.inspect import print_checkpoints, verify_checksums


def main(arguments: list[str]) -> int:
    """Run one command; 0 = valid or equal, 1 = damaged or different, 2 = a user's mistake."""
    parser = argparse.ArgumentParser(description="Show, check and compare checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list", help="all checkpoints of a run, by name and size of files"
    )
    listing.add_argument("run_dir", type=Path)
    checking = commands.add_parser("verify", help="every byte of a checkpoint or of all of a run")
    checking.add_argument("path", type=Path, nargs="+", help="a checkpoint, or a run's folder")
    comparing = commands.add_parser("diff", help="the largest difference of each tensor")
    for name in ("first", "second"):
        comparing.add_argument(name, type=Path, help="a checkpoint, or a run (its newest one)")
    given = parser.parse_args(arguments)
    if given.command == "list":
        good = print_checkpoints(given.run_dir)
    elif given.command == "verify":
        found = [verify_checksums(path) for path in given.path]
        good = all(found)
    else:  # loads torch
        from trainer.checkpoint.diff import print_difference

        good = print_difference(given.first, given.second)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_simple_command(main, sys.argv[1:]))
