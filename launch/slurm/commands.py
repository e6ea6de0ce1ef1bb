"""Slurm's commands: what a cluster has, what it is given to do, and what becomes of it."""

import difflib
import logging
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from conf.submit import ClusterConfig
from launch.slurm.batch_script import NAME, Job, Point, job_name, ranks_per_node, script
from parallel.errors import ConfigError
from trainer.run.run_dir import open_run_dir
from trainer.run.status import read_status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosts:
    """Hosts of one kind in a partition."""

    partition: str
    default: bool
    minutes: float  # longest time limit of the partition
    count: int
    gpus: int  # of each
    cores: int


def submit(points: list[Point]) -> None:
    """Write the script of one run, or of a sweep's points as an array, and submit it."""
    job = _job(points)
    text = script(job)
    if job.cluster.dry_run:
        Console(width=10_000).print(text, end="", markup=False, highlight=False, soft_wrap=True)
        return
    found = problems(job.cluster, hosts())
    if found:
        raise ConfigError(*found)
    _refuse_a_second(job.folder)
    path = job.folder / NAME
    for point in job.points:
        with ExitStack() as held:
            open_run_dir(point.training, held)
    path.write_text(text, encoding="utf-8")
    _command("sbatch", "--test-only", str(path))
    for _ in range(job.cluster.chain):
        number = _command("sbatch", "--parsable", str(path)).split(";")[0].strip()
        log.info("submitted as job %s: run_dir=%s", number, job.folder)
    log.info("python launch/submit.py status %s, or logs, or cancel", job.folder)


def _job(points: list[Point]) -> Job:
    """Return the job of these points; ConfigError if they cannot be one."""
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


def problems(cluster: ClusterConfig, there: list[Hosts]) -> list[str]:
    """Return what a cluster with these hosts cannot give; empty = nothing."""
    names = sorted({kind.partition for kind in there})
    name = cluster.partition or next((kind.partition for kind in there if kind.default), "")
    if not name:
        return []
    kinds = [kind for kind in there if kind.partition in name.split(",")]
    if not kinds:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [f"cluster.partition={name} does not exist; it is one of {', '.join(names)}{hint}"]
    found = []
    longest = max(kind.minutes for kind in kinds)
    if cluster.hours * 60 > longest:
        found.append(
            f"cluster.hours={cluster.hours:g} is more than partition {name} allows; set "
            f"cluster.hours={longest / 60:g} or less, and cluster.chain for a longer run"
        )
    wanted = {"gpus": cluster.gpus_per_node, "cores": _cores(cluster)}
    keys = {"gpus": "cluster.gpus_per_node", "cores": "cluster.cpus_per_rank"}
    for what, number in wanted.items():
        most = max(getattr(kind, what) for kind in kinds)
        if number > most:
            given = number if what == "gpus" else cluster.cpus_per_rank
            ranks = f" for {ranks_per_node(cluster)} ranks" if what == "cores" else ""
            found.append(
                f"{keys[what]}={given}{ranks} is more than a host of partition {name} has, "
                f"{most} {what}; ask for less, or choose another cluster.partition"
            )
    fit = sum(k.count for k in kinds if k.gpus >= wanted["gpus"] and k.cores >= wanted["cores"])
    if not found and cluster.nodes > fit:
        found.append(
            f"cluster.nodes={cluster.nodes} is more than the {fit} such hosts of partition {name}"
        )
    return found


def _cores(cluster: ClusterConfig) -> int:
    return cluster.cpus_per_rank * ranks_per_node(cluster)


def hosts() -> list[Hosts]:
    """Return the kinds of hosts of every partition."""
    lines = _command("sinfo", "-h", "-e", "-o", "%P|%l|%D|%G|%c").splitlines()
    found = []
    for line in lines:
        name, limit, count, gres, cores = line.split("|")
        gpus = sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)))
        kind = Hosts(name.rstrip("*"), name.endswith("*"), _minutes(limit), int(count), gpus, 0)
        found.append(replace(kind, cores=int(cores.rstrip("+"))))
    return found


def _minutes(limit: str) -> float:
    """Return a time limit as Slurm shows it: [days-]hours:minutes:seconds, shortened from the
    left.
    """
    if not re.fullmatch(r"[\d:-]+", limit):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    hours, minutes, seconds = ([0, 0, 0] + [int(part) for part in rest.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def queued(folder: Path) -> list[list[str]]:
    """Return the jobs of a folder that wait or run: number, state, reason or hosts, time left."""
    form = "%i|%T|%R|%L"
    lines = _command("squeue", "-h", "--me", "-n", job_name(folder), "-o", form).splitlines()
    return [line.split("|") for line in lines]


def _refuse_a_second(folder: Path) -> None:
    jobs = queued(folder)
    if jobs:
        shown = ", ".join(f"{number} ({state})" for number, state, *_ in jobs)
        raise ConfigError(
            f"run_dir={folder} has a job already: {shown}; wait for its end, or "
            f"python launch/submit.py cancel {folder}"
        )


def cancel(folder: Path) -> None:
    """End the jobs of a folder; those that run save first. ConfigError if there is none."""
    jobs = queued(folder)
    if not jobs:
        raise ConfigError(f"{folder} has no job that waits or runs")
    _command("scancel", "--me", "-n", job_name(folder))
    numbers = ", ".join(number for number, *_ in jobs)
    log.info("cancelled: %s; the same command goes on with the run", numbers)


def show(folder: Path) -> None:
    """The jobs of a run or sweep that wait or run, and what its runs have come to."""
    console = Console(soft_wrap=True)
    for number, state, why, left in queued(folder):
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


def logs(folder: Path, lines: int, follow: bool) -> int:
    """Show the end of a run's newest log, or of each log of a sweep; the exit status of `tail`."""
    found = sorted(folder.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{folder} has no log yet; python launch/submit.py status {folder}")
    shown = found if any("_" in path.name for path in found) else found[-1:]
    return subprocess.call(["tail", "-n", str(lines), *(["-F"] * follow), *map(str, shown)])


def _command(*command: str) -> str:
    """Return what one of Slurm's commands says.

    ConfigError if there is none here, or it refuses.
    """
    # What a job around this process has set would change the one that is submitted.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {command[0]} here: a job is submitted where Slurm's commands are, on a "
            "login node of the cluster; --dry-run shows the script without them"
        ) from error
    if done.returncode:
        said = [line.split("error: ")[-1] for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"{command[0]}: {'; '.join(said)}")
    return done.stdout
