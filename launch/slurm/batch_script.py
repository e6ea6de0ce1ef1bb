"""The batch script of a job, as a pure function of its configuration."""

import hashlib
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from conf.submit import ClusterConfig
from trainer.config.train import TrainConfig

NAME = "job.sbatch"
TRAIN = Path(__file__).parents[1] / "train.py"


@dataclass(frozen=True)
class SlurmRun:
    """A run of a job: a single one, or one job of a sweep."""

    training: TrainConfig  # checked and completed
    cluster: ClusterConfig
    overrides: list[str]  # of launch/train.py, but for run_dir


@dataclass(frozen=True)
class Job:
    """The job to submit: one run, or the runs of a sweep as an array."""

    folder: Path  # of the script and the logs
    points: list[SlurmRun]
    swept: bool
    here: Path  # the folder that paths in the configuration are relative to
    python: str  # where cluster.python is empty

    @property
    def cluster(self) -> ClusterConfig:
        """Return the cluster section, the same for all runs."""
        return self.points[0].cluster


def ranks_per_node(cluster: ClusterConfig) -> int:
    """Return the number of processes per host."""
    return cluster.ranks_per_node or cluster.gpus_per_node or 1


def job_name(folder: Path) -> str:
    """Return the name of a folder's jobs, unique to the folder."""
    where = str(folder.resolve())
    plain = re.sub(r"[^\w.=-]", "_", folder.resolve().name)[:40]
    return f"{plain}-{hashlib.sha256(where.encode()).hexdigest()[:6]}"


def log_pattern(swept: bool) -> str:
    """Return sbatch's pattern of a job's log name: its number, in an array the sweep job's."""
    return "slurm-%A_%a.out" if swept else "slurm-%j.out"


def batch_script(job: Job) -> str:
    """Return the whole batch script; it can be read, changed and run by hand."""
    parts = [
        _sbatch_lines(job),
        _run_lines(job),
        SETUP,
        "\n".join([*job.cluster.setup, ""]),
        _rank_lines(job),
    ]
    return "\n".join([*parts, AFTER, _requeue_lines(job.cluster)])


def _sbatch_lines(job: Job) -> str:
    cluster = job.cluster
    log = _escape_pattern(job.folder / "") + "/" + log_pattern(job.swept)
    options = [
        f"--job-name={job_name(job.folder)}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={ranks_per_node(cluster)}",
        f"--output={shlex.quote(log)}",
        f"--chdir={shlex.quote(str(job.here))}",
        "--open-mode=append",
        f"--signal=USR1@{cluster.signal_seconds}",
        "--requeue" if cluster.requeue else "--no-requeue",
    ]
    own = [option.lstrip("-").partition("=")[0].partition(" ")[0] for option in cluster.options]
    if cluster.gpus_per_node and not any(name.startswith(("gres", "gpus")) for name in own):
        options.append(f"--gres=gpu:{cluster.gpus_per_node}")
    if cluster.cpus_per_rank:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if cluster.hours:
        options.append(f"--time={time_limit(cluster.hours)}")
    for name, value in {"partition": cluster.partition, "account": cluster.account}.items():
        if value:
            options.append(f"--{name}={shlex.quote(value)}")
    if job.swept:
        most = f"%{cluster.parallel}" if cluster.parallel else ""
        options.append(f"--array=0-{len(job.points) - 1}{most}")
    if cluster.chain > 1:
        options.append("--dependency=singleton")
    lines = [f"#SBATCH {option}" for option in [*options, *cluster.options]]
    return "\n".join(["#!/bin/bash", HEAD, *lines, ""])


def time_limit(hours: float) -> str:
    """Format hours as sbatch's time limit, in whole minutes."""
    minutes = math.ceil(round(hours * 60, 6))
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def _escape_pattern(path: Path) -> str:
    """Escape the characters of a path that sbatch would take for a pattern."""
    return str(path).replace("%", "%%")


def _run_lines(job: Job) -> str:
    """Return the script lines that set the run's folder and launch/train.py's arguments."""
    if not job.swept:
        return "\n".join([*_run_arguments(job.points[0]), ""])
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for number, point in enumerate(job.points):
        folder, arguments = _run_arguments(point)
        lines += [f"{number})", f"  {folder}", f"  {arguments}", "  ;;"]
    return "\n".join([*lines, "esac", ""])


def _run_arguments(point: SlurmRun) -> tuple[str, str]:
    folder = str(Path(point.training.run_dir).absolute())
    arguments = [*point.overrides, f"run_dir={folder}"]
    return f"run_dir={shlex.quote(folder)}", f"set -- {shlex.join(arguments)}"


def _rank_lines(job: Job) -> str:
    cluster = job.cluster
    cores = cluster.cpus_per_rank
    options = ["--kill-on-bad-exit=1", "--distribution=block"]
    if cores:  # srun does not take it from sbatch
        options.append(f"--cpus-per-task={cores}")
    python = cluster.python or job.python
    command = " ".join(filter(None, [cluster.wrap, shlex.quote(python), shlex.quote(str(TRAIN))]))
    return RANKS.format(
        threads=cores or 1,
        options=shlex.join([*options, *cluster.srun_options]),
        local=ranks_per_node(cluster),
        command=command.replace("'", "'\\''"),
    )


def _requeue_lines(cluster: ClusterConfig) -> str:
    """Return the script lines that requeue a run that can resume."""
    if not cluster.requeue:
        return 'say "$again: the same command goes on"\nexit "$code"\n'
    chain = CHAIN if cluster.chain > 1 else ""
    return chain + REQUEUE


HEAD = "# A training run. The command that wrote this file writes it anew and goes on with the run."

SETUP = """\
say() { echo "[$(date +%T) job $SLURM_JOB_ID start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }
field() { sed -n "s/^ \\"$1\\": \\"\\?\\([^\\",]*\\).*/\\1/p" "$run_dir/status.json" 2> /dev/null; }

# Where the ranks meet: on the first host, at a port that no other job of it has.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "$head" > /dev/null || head=$(hostname)
export MASTER_ADDR=$head MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export TORCHELASTIC_RUN_ID=$SLURM_JOB_ID TORCHELASTIC_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
"""

RANKS = """\
# Slurm signals the ranks themselves: they agree on a step, save and leave. This script only waits.
trap : TERM USR1
before=$(field updated)
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}
say "on $SLURM_JOB_NODELIST, $run_dir"
srun {options} bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={local}
  exec {command} "$@"' rank "$@" &
ranks=$!
wait "$ranks"; code=$?
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; code=$?; done  # a signal ends a wait
"""

AFTER = """\
# What became of the run says status.json, which outlives this job. Slurm's own rules would not do:
# a job that saves and ends on its own, when it is preempted, counts as complete.
state=$(field state):$(field code):$(field reason)
again=""
if [ "$(field updated)" = "$before" ]; then  # it has not got as far as training
  early=$(($(cat "$run_dir/.early" 2> /dev/null || echo 0) + 1))
  echo "$early" > "$run_dir/.early"
  if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then again="a signal while it started"; fi
  if [ "$early" -gt 3 ]; then say "no start came as far as training"; again=""; fi
else
  rm -f "$run_dir/.early"
  case $state in
  stopped:*) again="stopped ($(field reason)) at step $(field step) of $(field steps)" ;;
  failed:77:*) again="a rank hung" ;;
  running:* | failed:1:*" gone "*) again="a rank was lost" ;;
  esac
fi
say "srun ended with $code, the run is ${state%%:*}"
if [ -z "$again" ]; then exit "$code"; fi
if [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" != RUNNING ]; then
  say "$again: Slurm has ended this job (scancel, time limit, lost host), what follows is its word"
  exit "$code"
fi
"""

CHAIN = """\
if [ "$(field reason)" = SIGUSR1 ]; then say "$again: the next job goes on"; exit 0; fi
"""

REQUEUE = """\
say "$again: queued again"
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
sleep 60  # until Slurm ends this script: had it ended by itself, the job would count as done
"""
