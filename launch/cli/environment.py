"""Check the installed packages before anything imports torch."""

import json
import logging
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.atomic_files import write_atomically

log = logging.getLogger(__name__)

OLDEST_TORCH = (2, 11)  # as in pyproject.toml
PACKAGES = ("samestep", "torch", "numpy", "hydra-core", "omegaconf", "tokenizers", "safetensors")


def torch_problem() -> str:
    """Return the problem of the installed torch in one line; empty if there is none."""
    wanted = "torch>=" + ".".join(map(str, OLDEST_TORCH))
    try:
        found = version("torch")
    except PackageNotFoundError:
        return f'torch is not installed; pip install "{wanted}", or make setup'
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        return f'torch is {found}, but must be {wanted}; pip install --upgrade "{wanted}"'
    return ""


def note_start(run_dir: Path, overrides: list[str]) -> None:
    """Append this start to the run's starts.json: command, commit, versions."""
    path = run_dir / "starts.json"
    try:
        starts = list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        starts = []
    packages = {name: found for name in PACKAGES if (found := _package_version(name))}
    start: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "overrides": overrides,
        "commit": _git_state("rev-parse", "HEAD"),
        "changed_files": _git_state("status", "--porcelain", "--untracked-files=no").splitlines(),
        "python": platform.python_version(),
        "packages": packages,
    }
    try:
        write_atomically(path, json.dumps([*starts, start], indent=1) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _git_state(*words: str) -> str:
    """Return the commit and state of this project's repository; empty if it is none."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.rstrip("\n")
