"""Measure what agreements cost as the world grows: simulated ranks over one real TCPStore.

`python benchmarks/control_plane.py [ranks …]` (64 512 4096). Rank 0 and the store are one process;
the other ranks are threads of a few others, each with a connection of its own, that speak the code
of a run: the plan of a checkpoint (1B parameters under FSDP), a save's agreement, the wait for all
ranks of a run that stops. Heartbeats, hangs and lost hosts are not simulated.
"""

import multiprocessing
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed as dist

from parallel.runtime import wait_for_count
from parallel.store_tree import StoreTree
from trainer.checkpoint import save_plan
from trainer.checkpoint.manifest import FileEntry, Manifest, write_manifest

PROCESSES = 4
LAYERS, WIDTH = 22, 2048
WEIGHTS = {
    **{f"attention.{name}.weight": (WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
    **{f"ffn.{name}.weight": (4 * WIDTH, WIDTH) for name in ("gate", "up", "down")},
    **{f"{name}.weight": (WIDTH,) for name in ("attention_norm", "ffn_norm")},
}


def section_of(ranks: int) -> save_plan.Section:
    """Return weights and two moments of each, sharded over all ranks."""
    names = [
        (f"{kind}.{layer}.{name}", "F32", shape, ((save_plan.SPLIT, 0),))
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        for layer in range(LAYERS)
        for name, shape in WEIGHTS.items()
    ]
    return save_plan.Section((ranks,), tuple(range(ranks)), tuple(names))


def act(rank: int, ranks: int, store: dist.Store, section: save_plan.Section, what: str) -> Any:
    """Do one thing as this rank; return rank 0's result."""
    tree = StoreTree(store, rank, ranks)
    if what == "plan":
        # Each rank describes its own tensors; that takes a real rank far less than it takes here,
        # where a thousand share a core, and is not repeated.
        return save_plan.plan_sections({section.digest: section}, tree)
    if what == "save":
        reports = tree.gather("1", asdict(FileEntry(1, f"{rank:064d}")))
        if rank == 0:
            tree.tell("1/all", {})
            return reports
        tree.hear("1/all")
    if what == "stop":
        wait_for_count(store, "here", ranks, 600.0)
    return None


def serve_ranks(port: int, mine: list[int], ranks: int, pipe: Connection) -> None:
    """Be several ranks, one thread each."""
    with ThreadPoolExecutor(128) as pool:  # a failing look-up of names takes 0.16 s each
        stores = list(pool.map(lambda _: dist.TCPStore("127.0.0.1", port, is_master=False), mine))
    section = section_of(ranks)
    pipe.send("connected")
    while (what := pipe.recv()) is not None:
        threads = [
            threading.Thread(target=act, args=(rank, ranks, store, section, what))
            for rank, store in zip(mine, stores, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(what)


def measure(ranks: int) -> None:
    """Print what each agreement takes, and what rank 0 and its store use meanwhile."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10)
    )
    context = multiprocessing.get_context("spawn")
    began, pipes, processes = time.monotonic(), [], []
    for number in range(PROCESSES):
        ours, theirs = context.Pipe()
        mine = list(range(1, ranks))[number::PROCESSES]
        arguments = store.port, mine, ranks, theirs
        processes.append(context.Process(target=serve_ranks, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    say(ranks, "connected", time.monotonic() - began, 0.0)
    for what in ("plan", "save", "stop"):
        began, busy = time.monotonic(), time.process_time()
        for pipe in pipes:
            pipe.send(what)
        found = act(0, ranks, store, section_of(ranks), what)
        seconds, cores = time.monotonic() - began, time.process_time() - busy
        for pipe in pipes:
            pipe.recv()
        say(ranks, what, seconds, cores)
        if what == "plan":
            entries = found[0]
    for pipe in pipes:
        pipe.send(None)
    print_manifest(ranks, entries)


def print_manifest(ranks: int, entries: dict) -> None:
    """Print the size of the checkpoint's manifest and the time to write it."""
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        files: dict[str, FileEntry] = {}
        record = Manifest("run", 1, {}, {}, "", None, entries, files)
        write_manifest(Path(folder), record)
        size = (Path(folder) / "manifest.json").stat().st_size
    sys.stdout.write(f"{ranks} ranks: manifest without files {size / 2**20:.2f} MiB, ")
    sys.stdout.write(f"{time.monotonic() - began:.2f} s\n")


def say(ranks: int, what: str, seconds: float, cores: float) -> None:
    """Print a line of the table."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    files = len(list(Path("/proc/self/fd").iterdir()))
    sys.stdout.write(
        f"{ranks} ranks: {what} {seconds:.2f} s; rank 0 and store: {cores:.2f} s of a core, "
        f"{memory:.2f} GiB, {files} descriptors\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for count in [int(word) for word in sys.argv[1:]] or [64, 512, 4096]:
        measure(count)
