"""Slurm's commands: check, submit, list, cancel and show jobs."""

import difflib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from conf.submit import ClusterConfig
from launch.slurm.batch_script import NAME, Job, SlurmRun, batch_script, job_name
from parallel.errors import ConfigError
from trainer.run.run_dir import open_run_dir
from trainer.run.status import read_status

log = logging.getLogger(__name__)


# Options that ask for the least of a shape: where one makes the job possible, its key is the cause.
LEAST = {
    "nodes": "--nodes=1",
    "gpus_per_node": "--gres=none",
    "ranks_per_node": "--ntasks-per-node=1",
    "cpus_per_rank": "--cpus-per-task=1",
}
# Words of Slurm's refusals (slurm_strerror) → the keys that they are about.
REFUSALS = {
    "partition name": ("partition",),
    "time limit": ("hours",),
    "account or": ("account", "partition"),
    "qos": ("options",),
    "Node count": ("nodes",),
    "(gres)": ("gpus_per_node",),
    "node configuration": tuple(LEAST),
}


def submit_job(points: list[SlurmRun]) -> None:
    """Write the script of one run, or of a sweep as an array, and submit it."""
    job = _build_job(points)
    text = batch_script(job)
    if job.cluster.dry_run:
        Console(width=10_000).print(text, end="", markup=False, highlight=False, soft_wrap=True)
        return
    if found := problems(job.cluster, text):
        raise ConfigError(*found)
    _refuse_a_second(job.folder)
    path = job.folder / NAME
    for point in job.points:
        with ExitStack() as held:
            open_run_dir(point.training, held)
    path.write_text(text, encoding="utf-8")
    for _ in range(job.cluster.chain):
        number = _run_slurm("sbatch", "--parsable", str(path)).split(";")[0].strip()
        log.info("submitted as job %s: run_dir=%s", number, job.folder)
    log.info("python launch/submit.py status %s, or logs, or cancel", job.folder)


def _build_job(points: list[SlurmRun]) -> Job:
    """Build the job of these runs; ConfigError if they cannot be one array."""
    folders = [Path(point.training.run_dir).absolute() for point in points]
    swept = len(points) > 1
    if any(point.cluster != points[0].cluster for point in points):
        raise ConfigError(
            "the points of a sweep are one array of jobs of the same shape, but cluster.* differs "
            "between them; submit one sweep for each"
        )
    if len(set(folders)) < len(folders):
        raise ConfigError(
            f"run_dir={folders[0]} would be the folder of several points of the sweep; leave "
            "run_dir out"
        )
    if swept and points[0].cluster.chain > 1:
        raise ConfigError(
            f"cluster.chain={points[0].cluster.chain} does not go with a sweep, whose jobs have "
            "one name and would wait for each other; set cluster.chain=1"
        )
    folder = Path(os.path.commonpath([f.parent for f in folders])) if swept else folders[0]
    return Job(folder, points, swept, Path.cwd(), sys.executable)


def problems(cluster: ClusterConfig, text: str) -> list[str]:
    """Return the reasons that the cluster would never run a job with this script."""
    found = _time_problems(cluster)
    options = ["--time=1"] * len(found)
    if reason := _refusal(text, options):
        found.append(_explain(cluster, text, options, reason))
    return found


def _time_problems(cluster: ClusterConfig) -> list[str]:
    """Return a problem if the time limit is above the partition's.

    `sbatch --test-only` does not report it where EnforcePartLimits is off, the default, and the job
    would wait for ever.
    """
    if not cluster.hours:
        return []
    of = [f"--partition={cluster.partition}"] * bool(cluster.partition)
    lines = _run_slurm("sinfo", "-h", "-o", "%P|%l", *of).splitlines()
    limits = dict(line.split("|") for line in lines)
    limits = {name: limit for name, limit in limits.items() if of or name.endswith("*")}
    longest = max(map(_parse_minutes, limits.values()), default=float("inf"))
    if cluster.hours * 60 <= longest:
        return []
    name = cluster.partition or next(iter(limits)).rstrip("*")
    return [
        f"cluster.hours={cluster.hours:g} is more than partition {name} allows; set "
        f"cluster.hours={longest / 60:g} or less, and cluster.chain for a longer run"
    ]


def _parse_minutes(limit: str) -> float:
    """Parse Slurm's time limit, [days-]hours:minutes:seconds, shortened from the left."""
    if not re.fullmatch(r"[\d:-]+", limit):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in rest.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _refusal(text: str, options: list[str]) -> str:
    """Return Slurm's reason to refuse this script with additional options; empty if it accepts."""
    done = _run(["sbatch", "--test-only", *options], text)
    return _errors(done).rpartition("allocation failure: ")[2] if done.returncode else ""


def _explain(cluster: ClusterConfig, text: str, options: list[str], reason: str) -> str:
    """Return the message of a refusal, with the keys concerned and a remedy."""
    keys = next((keys for words, keys in REFUSALS.items() if words in reason), ())
    hint = ""
    if keys == tuple(LEAST):  # Slurm does not say which of them
        asked = tuple(key for key in LEAST if getattr(cluster, key))
        keys = tuple(k for k in asked if not _refusal(text, [*options, LEAST[k]])) or asked
        hint = "; ask for less, or choose another cluster.partition"
    elif keys == ("partition",):
        names = sorted(set(_run_slurm("sinfo", "-h", "-o", "%R").split()))
        near = difflib.get_close_matches(cluster.partition, names, n=1)
        hint = f"; it is one of {', '.join(names)}" + "".join(f"; did you mean {n}?" for n in near)
    shown = ", ".join(f"cluster.{key}={getattr(cluster, key)}" for key in keys)
    return f"{shown}: sbatch says: {reason}{hint}" if shown else f"sbatch: {reason}"


def list_queued_jobs(folder: Path) -> list[list[str]]:
    """Return a folder's pending and running jobs: number, state, reason or hosts, time left."""
    form = "%i|%T|%R|%L"
    lines = _run_slurm("squeue", "-h", "--me", "-n", job_name(folder), "-o", form).splitlines()
    return [line.split("|") for line in lines]


def _refuse_a_second(folder: Path) -> None:
    jobs = list_queued_jobs(folder)
    if jobs:
        shown = ", ".join(f"{number} ({state})" for number, state, *_ in jobs)
        raise ConfigError(
            f"run_dir={folder} has a job already: {shown}; wait for its end, or "
            f"python launch/submit.py cancel {folder}"
        )


def cancel_jobs(folder: Path) -> None:
    """Cancel a folder's jobs; running ones save first. ConfigError if there is none."""
    jobs = list_queued_jobs(folder)
    if not jobs:
        raise ConfigError(f"{folder} has no job that waits or runs")
    _run_slurm("scancel", "--me", "-n", job_name(folder))
    numbers = ", ".join(number for number, *_ in jobs)
    log.info("cancelled: %s; the same command goes on with the run", numbers)


def print_jobs(folder: Path) -> None:
    """Print a folder's pending and running jobs, and the status of its runs."""
    console = Console(soft_wrap=True)
    for number, state, why, left in list_queued_jobs(folder):
        console.print(f"job {number}: {state} {why}, {left} left", markup=False, highlight=False)
    runs = [folder] if (folder / "config.yaml").exists() else sorted(folder.glob("*/"))
    for run in runs:
        status = read_status(run)
        told = (
            "not started"
            if status is None
            else (
                f"{status.state} at step {status.step} of {status.steps}, newest checkpoint "
                f"{status.checkpoint if status.checkpoint is not None else 'none'}"
                + (f" ({status.reason})" if status.reason else "")
            )
        )
        console.print(f"{run}: {told}", markup=False, highlight=False)


def print_logs(folder: Path, lines: int, follow: bool) -> int:
    """Print the end of a run's newest log, or of each log of a sweep; return `tail`'s status."""
    found = sorted(folder.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{folder} has no log yet; python launch/submit.py status {folder}")
    shown = found if any("_" in path.name for path in found) else found[-1:]
    return subprocess.call(["tail", "-n", str(lines), *(["-F"] * follow), *map(str, shown)])


def _run_slurm(*command: str) -> str:
    """Return the output of a Slurm command; ConfigError if it is missing or refuses."""
    done = _run(command)
    if done.returncode:
        raise ConfigError(f"{command[0]}: {_errors(done)}")
    return done.stdout


def _run(command: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a Slurm command on this input; ConfigError if it is not installed."""
    # What a job around this process has set would change the one that is submitted.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, env=clean, check=False
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {command[0]} here: a job is submitted where Slurm's commands are, on a "
            "login node of the cluster; --dry-run shows the script without them"
        ) from error


def _errors(done: subprocess.CompletedProcess[str]) -> str:
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line) for line in done.stderr.splitlines()]
    return "; ".join(filter(None, lines))
