"""A pool of persistent CPU ranks, as starting a process that imports torch takes seconds."""

import gc
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from parallel.runtime import Runtime, end_process_group, record_few_collectives

GRACE_SECONDS = 5.0  # for the other ranks, after one has failed


class RankFailedError(RuntimeError):
    """A rank raised, exited or timed out; the message has its number and its traceback."""


class RankPool:
    """A pool of `size` processes; `run` calls a function on a group of the first `world_size`."""

    def __init__(self, size: int):
        self.size = size
        self._tasks = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start_processes(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # The fork server imports torch once, and each rank is forked from it.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve_jobs, args=(rank, self._store.port, theirs), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(
        self, world_size: int, function: Callable, *args: Any, timeout_seconds: float = 300.0
    ) -> list:
        """Return the results of `function(runtime, *args)` in rank order.

        The function must be importable by name. Raises RankFailedError naming the rank that
        raised or was stuck at the time-out; the next call restarts the processes.
        """
        if not self._processes:
            self._start_processes()
        self._tasks += 1
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send((self._tasks, world_size, function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        failure = ""
        while len(results) < world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = [rank for rank in range(world_size) if rank not in results]
                failure = failure or f"stuck after {timeout_seconds:g} s: ranks {stuck}"
                break
            for pipe in waiting.keys() & set(ready):
                rank = waiting[pipe]
                good, results[rank] = _receive_result(pipe, rank)
                if not good:
                    failure = failure or f"rank {rank} of {world_size} failed:\n{results[rank]}"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failure:
            self.close()
            raise RankFailedError(failure)
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _receive_result(pipe: Connection, rank: int) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, f"rank {rank} died"


def _serve_jobs(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    record_few_collectives()
    # Exclude torch's modules from garbage collection: traversing them after each task would take
    # longer than a small task itself.
    gc.freeze()
    launch_store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            task, world_size, function, args = pipe.recv()
        except EOFError:
            return
        store = dist.PrefixStore(f"task{task}", launch_store)
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            # A function without a collective would destroy its group while others still connect.
            dist.barrier()
            runtime = Runtime(rank, world_size, rank, world_size, torch.device("cpu"), store)
            pipe.send((True, function(runtime, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                end_process_group()
