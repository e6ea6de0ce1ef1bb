"""The cluster that runs are planned for and submitted to: its keys and their constraints."""

import re
from dataclasses import dataclass, field, fields

from parallel.config_fields import key
from trainer.config.hardware import ACCELERATORS
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
    """Hosts, their devices, and a job there; read by launch/slurm/ and, up to network_gbit, by
    launch/cli/planned.py.
    """

    nodes: int = key(1, "Hosts of the job", at_least=1)
    gpu: str = key(
        "",
        "Kind of device of the hosts, for launch/plan.py",
        off="",
        off_means="not said",
        choices={"": ""} | {name: device.title for name, device in ACCELERATORS.items()},
    )
    gpus_per_node: int = key(
        0, "GPUs taken of each host", off=0, off_means="a job on CPUs", at_least=0
    )
    ranks_per_node: int = key(
        0, "Processes on each host", off=0, off_means="one for each GPU, on CPUs one", at_least=0
    )
    memory_gib: float = key(
        0.0,
        "Memory of one device",
        unit="GiB",
        off=0.0,
        off_means="what cluster.gpu has",
        at_least=0,
    )
    network_gbit: float = key(
        0.0,
        "Network of one device to other hosts: a host's bandwidth over its devices",
        unit="Gbit/s",
        off=0.0,
        off_means="what hosts of cluster.gpu usually have",
        at_least=0,
    )
    cpus_per_rank: int = key(
        0, "Cores of each process", off=0, off_means="what the cluster gives unasked", at_least=0
    )
    hours: float = key(
        24.0,
        "Time limit of one job",
        unit="hours",
        off=0.0,
        off_means="the partition's own",
        at_least=0,
    )
    partition: str = key("", "Partition of the cluster", off="", off_means="the cluster's default")
    account: str = key("", "Account that pays", off="", off_means="the user's default")
    signal_seconds: int = key(
        120,
        "So many seconds before the time limit the ranks are told to save and leave: what a "
        "save takes, and more",
        at_least=1,
        at_most=65535,  # of sbatch --signal
    )
    requeue: bool = key(
        True,
        "After a save on a signal (time limit, preemption), a hang or the loss of a rank, the "
        "job is queued again and goes on",
        off=False,
        off_means="it ends",
    )
    chain: int = key(
        1,
        "Jobs submitted at once that follow each other in the run's folder, for clusters that "
        "queue none again or for limits shorter than the run",
        off=1,
        at_least=1,
    )
    parallel: int = key(
        0,
        "Points of a sweep that run at the same time",
        off=0,
        off_means="as many as fit",
        at_least=0,
    )
    options: list[str] = key(
        [], 'More options of sbatch, e.g. ["--qos=high","--exclusive"]', off=[], off_means="none"
    )
    setup: list[str] = key(
        [],
        'Lines of shell before the ranks start, e.g. ["module load cuda/12.8"]',
        off=[],
        off_means="none",
    )
    srun_options: list[str] = key(
        [],
        'More options of srun, e.g. ["--container-image=nvcr.io/nvidia/pytorch:25.06-py3"]',
        off=[],
        off_means="none",
    )
    wrap: str = key(
        "",
        'What each rank\'s Python runs inside, e.g. "apptainer exec --nv image.sif"',
        off="",
        off_means="nothing",
    )
    python: str = key("", "Interpreter of the ranks", off="", off_means="the one that submits")
    dry_run: bool = key(
        False, "Show the script, and write and submit nothing (--dry-run is the same)"
    )


@dataclass
class SubmitConfig(TrainConfig):
    """A training job with the cluster that it runs on."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def training_part(config: SubmitConfig) -> TrainConfig:
    """Return the training configuration of a job."""
    return TrainConfig(**{part.name: getattr(config, part.name) for part in fields(TrainConfig)})


def cluster_problems(config: SubmitConfig) -> list[str]:
    """Return the problems of a job's keys that need no cluster to find."""
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
    return found + _time_problems(cluster) + _option_problems(cluster.options)


def _time_problems(cluster: ClusterConfig) -> list[str]:
    seconds = cluster.hours * 3600
    if not cluster.hours or seconds > cluster.signal_seconds:
        return []
    enough = max(1, round(cluster.signal_seconds / 36)) / 50  # twice as long
    return [
        f"cluster.hours={cluster.hours:g} is a time limit of {seconds:.0f} s, but the run is told "
        f"to save cluster.signal_seconds={cluster.signal_seconds} before it and would do nothing "
        f"else; set cluster.hours={enough:g} or more, or fewer cluster.signal_seconds"
    ]


def _option_problems(options: list[str]) -> list[str]:
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
