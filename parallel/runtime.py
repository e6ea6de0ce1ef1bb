"""Ranks, their device and process group; a single process is a group of size 1."""

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import _collective_utils, _redistribute, debug

from parallel.errors import ConfigError
from parallel.strategy import restart_count

# Followers wait while rank 0 prepares: tokenising a large data set takes hours.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Runtime:
    """The rank of this process and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None  # of this job; outlives a stopped or killed rank


class JobQueue:
    """The job queue of one launch: rank 0 posts jobs, the other ranks receive them."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, restart: int = 0):
        self.launch = store  # outlives a restart of the ranks
        # The store still has the keys of the attempt before a restart; a prefix separates them.
        self.store = dist.PrefixStore(f"attempt{restart}", store)
        self.rank, self.world_size = rank, world_size
        # Without a launcher, these variables would belong to another job.
        environment = os.environ if "RANK" in os.environ else {}
        self.local_rank = int(environment.get("LOCAL_RANK", rank))
        self.local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        self.jobs = 0

    @classmethod
    def from_torchrun(cls) -> "JobQueue":
        """Return the queue of a launch by torchrun, or anything that sets its variables."""
        try:
            store, rank, world_size = next(dist.rendezvous("env://"))
        except dist.DistNetworkError as error:
            where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT"
            raise ConfigError(
                f"{where}={os.environ['MASTER_PORT']} cannot be used: "
                f"{str(error).splitlines()[0]}; choose a free port"
            ) from error
        # The agents' store outlives a restart. Otherwise rank 0 creates a new one, and the restart
        # counts of hosts that joined at different times differ.
        persistent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(store, rank, world_size, restart_count(os.environ) if persistent else 0)

    @classmethod
    def single_process(cls) -> "JobQueue":
        """Return the queue of a single rank in this process, without a network."""
        return cls(dist.HashStore(), 0, 1)

    def launch_time(self, now: float) -> float:
        """Return the start time of this launch: the same for every rank and after every restart."""
        return float(self.launch.compare_set("started", "", repr(now)))

    def post_job(self, job: Any) -> None:
        """Post a JSON-serialisable job to the follower ranks."""
        self.jobs += 1
        self.store.set(f"job{self.jobs}", json.dumps(job))

    def receive_jobs(self) -> Iterator[Any]:
        """Yield the jobs posted by rank 0, in order; blocks until the next one."""
        while True:
            self.jobs += 1
            self.store.wait([f"job{self.jobs}"], PATIENCE)
            yield json.loads(self.store.get(f"job{self.jobs}"))

    def leave(self) -> None:
        """Announce that this follower rank is about to exit."""
        with suppress(dist.DistError):
            count_up(self.store, "left", self.world_size - 1)

    def close_queue(self, seconds: float = 10.0) -> None:
        """Stop the follower ranks, and wait up to `seconds` until they have left.

        Without torchrun's agent store, the store is in rank 0's process and would exit with it.
        """
        self.post_job({"stop": 0})
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        if self.world_size > 1:
            with suppress(dist.DistError):
                self.store.wait(["all left"], timedelta(seconds=seconds))

    def is_first(self, event: str) -> bool:
        """Return whether this rank is the first to report `event` in the current job."""
        return self.store.add(f"{event}{self.jobs}", 1) == 1


def count_up(store: dist.Store, event: str, number: int) -> None:
    """Count one rank more; the last of `number` sets the key "all EVENT"."""
    if store.add(event, 1) == number:
        store.set(f"all {event}", "")


def wait_for_count(store: dist.Store, event: str, number: int, seconds: float) -> None:
    """Count one rank more, and wait up to `seconds` for all of `number`."""
    with suppress(dist.DistError):
        count_up(store, event, number)
        store.wait([f"all {event}"], timedelta(seconds=seconds))


@contextmanager
def process_group(device: str, ranks: JobQueue, timeout_seconds: float = 0.0) -> Iterator[Runtime]:
    """Initialise the process group of one job on `device` (auto, cpu, cuda).

    `timeout_seconds` is the time-out of a collective, at least torch's default of 30 minutes.
    Raises ConfigError if the device is missing.
    """
    chosen = torch.device("cpu")
    if choose_device(device, ranks.local_world_size) == "cuda":
        chosen = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(chosen)
        # A full mesh of host connections per rank would not scale; few are ever used.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    record_few_collectives(KEPT_ON_CUDA if chosen.type == "cuda" else KEPT_COLLECTIVES)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        timeout=max(timedelta(minutes=30), timedelta(seconds=timeout_seconds)),
        # A prefix per group: the store still has the addresses of this launch's earlier groups.
        store=dist.PrefixStore(f"group{ranks.jobs}", ranks.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    failed = True
    try:
        yield Runtime(
            ranks.rank,
            ranks.world_size,
            ranks.local_rank,
            ranks.local_world_size,
            chosen,
            dist.PrefixStore(f"job{ranks.jobs}", ranks.store),
        )
        failed = False
    finally:
        # NCCL would first wait for collectives that the other ranks may never join; a failed rank
        # must exit immediately, so that the launcher terminates the others.
        if ranks.world_size == 1 or not failed:
            end_process_group()


def end_process_group() -> None:
    """Destroy the process group, and clear DTensor's caches of its meshes.

    A later mesh of the same layout compares equal to the old one: DTensor would reuse cached plans
    that refer to destroyed groups.
    """
    dist.destroy_process_group()
    # Private functions: a torch version without one of them has no such cache either.
    for owner, name in (
        (_redistribute, "clear_redistribute_planner_cache"),
        (getattr(_redistribute, "_gen_transform_infos", None), "cache_clear"),
        (debug, "_clear_sharding_prop_cache"),
        (getattr(_collective_utils.MeshTopoInfo, "build_from_mesh", None), "cache_clear"),
    ):
        getattr(owner, name, lambda: None)()
    # A model, its stages and hooks form reference cycles that hold process groups, and each group
    # keeps its threads as long as it is referenced.
    gc.collect()


def all_reduce_max(runtime: Runtime, values: list[int]) -> list[int]:
    """Return the elementwise maximum of `values` over all ranks; a collective call.

    The reduction runs on the host, so that no device is synchronised.
    """
    if runtime.world_size == 1:
        return values
    numbers = torch.tensor(values)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def broadcast_from_rank0(value: Any) -> Any:
    """Broadcast rank 0's (picklable) value; a collective call."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Gather the (picklable) values of the ranks of `group` (None = all), in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_same_on_all_ranks(runtime: Runtime, facts: dict[str, str]) -> None:
    """Raise ConfigError on every rank, naming the deviating ranks, if a fact differs between ranks.

    Files can differ if a folder is not mounted, or a different one is; training requires identical
    files on all ranks.
    """
    everyone = all_gather_objects(facts)
    problems = []
    for name in facts:
        found = [theirs[name] for theirs in everyone]
        usual = Counter(found).most_common(1)[0][0]
        odd = [str(rank) for rank, fact in enumerate(found) if fact != usual]
        if odd:
            ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(odd)}"
            problems.append(
                f"{name} is another on {ranks} than on the other {len(found) - len(odd)}; every "
                "host must see the same files and the same code"
            )
    if problems:
        raise ConfigError(*problems)


def choose_device(device: str, local_ranks: int) -> str:
    """Resolve `device` (auto, cpu or cuda) to cpu or cuda for `local_ranks` ranks on this host.

    Raises ConfigError if CUDA is requested and this host has too few GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    if not count:
        raise ConfigError(f"device={device}, but there is no CUDA device here; set device=cpu")
    if local_ranks > count:
        raise ConfigError(
            f"{local_ranks} ranks on this host, but it has {count} GPUs; "
            f"start {count} ranks, or set device=cpu"
        )
    return "cuda"


KEPT_COLLECTIVES = 16
KEPT_ON_CUDA = 4096  # the host runs ahead of the device, by some fifty collectives a step


def record_few_collectives(number: int = KEPT_COLLECTIVES) -> None:
    """Limit torch's flight recorder; call it before the first process group is created.

    Every group writes to it, and on a CPU every heartbeat reads it: its default of 2000 entries
    would take a hundred times as long.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(number))


def use_device(device: torch.device) -> None:
    """Let the calling thread use this rank's device: on CUDA a new thread has the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_group_timeouts(seconds: float) -> None:
    """Set the time-out of a collective on every group of this rank, at least 30 minutes.

    A group's own default may be shorter than the patience of a start or a save.
    """
    patience = max(timedelta(minutes=30), timedelta(seconds=seconds))
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(patience, group)
