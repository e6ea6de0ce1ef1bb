"""One HTML page about a run, or several side by side: `python launch/report.py --help`."""

import argparse
import difflib
import re
import sys
from pathlib import Path

from rich.console import Console

from launch.cli.errors import run_simple_command
from parallel.errors import ConfigError
from trainer.report.page import NAME, write_report

KEYS = ("run_dir", "output")


def main(arguments: list[str]) -> int:
    """Write the page and print its path; 0 = written, 2 = a user's mistake."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s run_dir=RUN [RUN ...] [output=FILE]",
        description="Write one HTML page with the curves, events and configuration of a run, or of "
        "several side by side, or of a sweep. It needs no network and is looked at in any browser.",
    )
    page = f"the page; {NAME} in the first folder unless given"
    parser.add_argument(
        "given", nargs="+", metavar="RUN", help=f"a run's or a sweep's folder. FILE: {page}"
    )
    run_dirs, output = parse_arguments(parser.parse_args(arguments).given)
    path, notes = write_report(run_dirs, output)
    console = Console()
    for line in (*notes, f"report: {path}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def parse_arguments(given: list[str]) -> tuple[list[Path], Path | None]:
    """Return the runs' folders and the page's file; a folder's name may contain an equals sign."""
    run_dirs: list[Path] = []
    output: Path | None = None
    for argument in given:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            if key == "output":
                output = Path(value)
            else:
                run_dirs.append(Path(value))
        elif equals and re.fullmatch(r"\w+", key) and not Path(argument).exists():
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)
            raise ConfigError(
                f"{argument}: the keys are run_dir and output; did you mean {near[0]}={value}?"
            )
        else:
            run_dirs.append(Path(argument))
    if not run_dirs:
        raise ConfigError("no run is named; say run_dir=RUN")
    return run_dirs, output


if __name__ == "__main__":
    sys.exit(run_simple_command(main, sys.argv[1:]))
