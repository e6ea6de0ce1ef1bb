"""A training run as a job of a cluster: its keys, and what must hold of them."""

import re
from dataclasses import dataclass, field, fields

from trainer.config.train import TrainConfig

# Options of sbatch that other keys set, or that the script relies on.
OWN_OPTIONS = {
    **dict.fromkeys(("nodes", "N"), "cluster.nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "cluster.ranks_per_node"),
    **dict.fromkeys(("cpus-per-task", "c"), "cluster.cpus_per_rank"),
    **dict.fromkeys(("time", "t"), "cluster.hours"),
    **dict.fromkeys(("partition", "p"), "cluster.partition"),
    **dict.fromkeys(("account", "A"), "cluster.account"),
    "signal": "cluster.signal_seconds",
    **dict.fromkeys(("requeue", "no-requeue"), "cluster.requeue"),
    **dict.fromkeys(("dependency", "d"), "cluster.chain"),
    **dict.fromkeys(("array", "a"), "a sweep (-m)"),
    **dict.fromkeys(("job-name", "J", "output", "o", "chdir", "D"), "run_dir"),
}


@dataclass
class ClusterConfig:
    """A job of Slurm; read by launch/slurm/batch_script.py and launch/slurm/commands.py."""

    nodes: int = 1  # hosts of the job
    gpus_per_node: int = 0  # GPUs taken of each host; 0 = a job on CPUs
    ranks_per_node: int = 0  # processes on each host; 0 = one for each GPU, on CPUs one
    cpus_per_rank: int = 0  # cores of each process; 0 = what the cluster gives unasked
    hours: float = 24.0  # time limit of one job; 0.0 = the partition's own
    partition: str = ""  # empty = the cluster's default
    account: str = ""  # that pays; empty = the user's default
    # So many seconds before the time limit the ranks are told to save and leave: what a save
    # takes, and more.
    signal_seconds: int = 120
    # After a save on a signal (time limit, preemption), a hang or the loss of a rank, the job is
    # queued again and goes on; false = it ends.
    requeue: bool = True
    # Jobs submitted at once that follow each other in the run's folder, for clusters that queue
    # none again or for limits shorter than the run; 1 = off.
    chain: int = 1
    parallel: int = 0  # points of a sweep that run at the same time; 0 = as many as fit
    # More options of sbatch, e.g. ["--qos=high","--exclusive"]; empty = none.
    options: list[str] = field(default_factory=list)
    # Lines of shell before the ranks start, e.g. ["module load cuda/12.8"]; empty = none.
    setup: list[str] = field(default_factory=list)
    # More options of srun, e.g. ["--container-image=nvcr.io/nvidia/pytorch:25.06-py3"].
    srun_options: list[str] = field(default_factory=list)
    # What each rank's Python runs inside, e.g. "apptainer exec --nv image.sif"; empty = nothing.
    wrap: str = ""
    python: str = ""  # interpreter of the ranks; empty = the one that submits
    dry_run: bool = False  # show the script, and write and submit nothing (--dry-run is the same)


@dataclass
class SubmitConfig(TrainConfig):
    """A training job with the cluster that it runs on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def training_part(config: SubmitConfig) -> TrainConfig:
    """Return the configuration of the run without that of its job."""
    return TrainConfig(**{part.name: getattr(config, part.name) for part in fields(TrainConfig)})


def cluster_problems(config: SubmitConfig) -> list[str]:
    """Return what is wrong with a job's keys, as far as they tell; empty = nothing."""
    cluster, found = config.cluster, []
    if config.launch.ranks:
        found.append(
            f"launch.ranks={config.launch.ranks} starts ranks on one host, but those of a job are "
            "started by Slurm; set cluster.ranks_per_node instead, and launch.ranks=0"
        )
    if cluster.ranks_per_node > cluster.gpus_per_node > 0:
        found.append(
            f"cluster.ranks_per_node={cluster.ranks_per_node} is more than cluster.gpus_per_node="
            f"{cluster.gpus_per_node}, and a GPU has one rank; set cluster.ranks_per_node=0"
        )
    if config.device == "cuda" and not cluster.gpus_per_node:
        found.append(
            "device=cuda, but cluster.gpus_per_node=0 takes no GPU; set cluster.gpus_per_node, or "
            "device=cpu"
        )
    if config.device == "cpu" and cluster.gpus_per_node:
        found.append(
            f"device=cpu leaves cluster.gpus_per_node={cluster.gpus_per_node} idle; set "
            "cluster.gpus_per_node=0, or device=auto"
        )
    return found + _time(cluster) + _options(cluster.options)


def _time(cluster: ClusterConfig) -> list[str]:
    seconds = cluster.hours * 3600
    if not cluster.hours or seconds > cluster.signal_seconds:
        return []
    enough = max(1, round(cluster.signal_seconds / 36)) / 50  # twice as long
    return [
        f"cluster.hours={cluster.hours:g} is a time limit of {seconds:.0f} s, but the run is told "
        f"to save cluster.signal_seconds={cluster.signal_seconds} before it and would do nothing "
        f"else; set cluster.hours={enough:g} or more, or fewer cluster.signal_seconds"
    ]


def _options(options: list[str]) -> list[str]:
    found = []
    for option in options:
        name = re.match(r"--?([\w-]+)", option)
        if name is None or "\n" in option:
            found.append(
                f"cluster.options holds {option!r}, but each must be an option of sbatch, e.g. "
                '["--qos=high","--exclusive"]'
            )
        elif name[1] in OWN_OPTIONS:
            found.append(
                f"cluster.options holds {option}, which {OWN_OPTIONS[name[1]]} sets; set that"
            )
    return found
